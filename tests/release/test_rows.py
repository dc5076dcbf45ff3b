"""Rows in mapped files: what a lookup finds is what the layers say, and no more is in memory than was asked for."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.manifest import Layer, Manifest
from des_core.contracts import Reference
from des_core.errors import CheckpointError
from des_core.release.serve import weight_files
from des_core.release.serve.rows import Rows
from tests.checkpoint.histories import TABLES, K, Known, Z, history, manifest_of, write_layer

ROOT = Path(__file__).parent.parent.parent


def rows_of(reference: Reference, manifest: Manifest, memory: int = 0) -> Rows:
    layers = weight_files.mapped(reference, manifest, {})
    return Rows([list(layer.values()) for layer in layers], manifest.shape.tables, K, memory)


def check(rows: Rows, asked: list[tuple[int, int]], known: Known) -> None:
    """Looked up in any order, some twice."""
    tables, ids = (np.array([place[at] for place in asked], np.int64) for at in (0, 1))
    found = rows.find(ids, tables)
    expected = [known.get(place, ("", None)) for place in asked]
    assert [at >= 0 for at in found.block_U.tolist()] == [kind == "row" for kind, _ in expected]
    wanted = np.array([value[:K] if kind == "row" else [0] * K for kind, value in expected], np.float32)
    np.testing.assert_array_equal(rows.rows(found), wanted.reshape(len(asked), K))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 30), depth=st.integers(1, 5), many=st.integers(1, 60))
def test_the_newest_layer_speaks(tmp_path_factory: pytest.TempPathFactory, seed: int, depth: int, many: int) -> None:
    reference, manifest, known = history(str(tmp_path_factory.mktemp("rows")), seed, depth, many)
    random = np.random.default_rng(seed)
    ids = sorted({one for _, one in known} | set(random.integers(-(1 << 63), 1 << 63, 50).tolist()))
    near = [one + by for one in ids for by in (-1, 0, 1) if -(1 << 63) <= one + by < 1 << 63]
    asked = [(table, one) for table in range(len(TABLES)) for one in [*near, -1, 0, (1 << 63) - 1, -(1 << 63)]]
    random.shuffle(asked)
    check(rows_of(reference, manifest), asked + asked[:20], known)


def whole(root: Path, many: int, workers: int) -> tuple[Reference, Manifest, Known]:
    """A table of many blocks, and one without rows."""
    ids = np.unique(np.random.default_rng(0).integers(-(1 << 63), 1 << 63, many))
    known: Known = {(0, one): ("row", [float(place % 9973)] * (K + Z)) for place, one in enumerate(ids.tolist())}
    layer = write_layer(str(root), "step-0000000001", 1, known, set(), workers)
    manifest = manifest_of((layer,), 1)
    return manifest.write(manifests.manifest_uri(str(root / "run"), 1)), manifest, known


@pytest.mark.parametrize("workers", [1, 3])
def test_many_blocks_and_an_empty_table(tmp_path: Path, workers: int) -> None:
    reference, manifest, known = whole(tmp_path, 20_000, workers)
    blocks = sum(len(found) for _, found in manifests.readers(reference, manifest.layers[0]))
    assert blocks > 40
    rows = rows_of(reference, manifest)
    check(rows, [*known, *((1, one) for _, one in known)], known)
    smallest, largest = (pick((one for _, one in known), key=lambda one: one % (1 << 64)) for pick in (min, max))
    check(rows, [(0, smallest - 1), (0, largest + 1), (0, smallest), (0, largest)], known)
    check(rows, [], known)


def test_an_id_that_went_and_came_back_in_one_save_has_its_new_row(tmp_path: Path) -> None:
    old: Known = {(0, one): ("row", [1.0] * (K + Z)) for one in range(9)}
    new: Known = {(0, one): ("row", [2.0] * (K + Z)) for one in range(3)} | {(0, 3): ("waits", 1)}
    layers = (
        write_layer(str(tmp_path), "step-0000000001", 1, old, set(), 1),
        write_layer(str(tmp_path), "step-0000000002", 2, new, {(0, one) for one in range(5)}, 1),
    )
    manifest = manifest_of(layers, 2)
    reference = manifest.write(manifests.manifest_uri(str(tmp_path / "run"), 2))
    known = {place: old[place] for place in old if place[1] >= 5} | new
    check(rows_of(reference, manifest), [(0, one) for one in range(10)], known)


def test_without_layers_no_id_has_a_row() -> None:
    rows = Rows([], TABLES, K)
    assert rows.find(np.arange(3), np.zeros(3, np.int64)).block_U.tolist() == [-1, -1, -1]


def test_ids_that_do_not_lie_evenly_are_found_too(tmp_path: Path) -> None:
    """All in one prefix and at its two ends: guesses are far off."""
    low = np.concatenate([np.arange(5000), (1 << 47) + np.arange(0, 50_000, 7), [(1 << 48) - 1]])
    known: Known = {(0, one): ("row", [float(place)] * (K + Z)) for place, one in enumerate(low.tolist())}
    layer = write_layer(str(tmp_path), "step-0000000001", 1, known, set(), 1)
    manifest = manifest_of((layer,), 1)
    reference = manifest.write(manifests.manifest_uri(str(tmp_path / "run"), 1))
    asked = [(0, one + by) for one in low.tolist() for by in (0, 1, 2)]
    check(rows_of(reference, manifest), asked, known)


def test_a_file_that_is_mapped_is_verified_once_and_stays_readable_when_it_is_deleted(tmp_path: Path) -> None:
    reference, manifest, known = history(str(tmp_path), 3, 3, 40)
    older = manifest.model_copy(update={"layers": manifest.layers[:2]})
    before = weight_files.mapped(reference, older, {})
    parts = {sha256: part for layer in before for sha256, part in layer.items()}
    for layer in manifest.layers[:2]:
        for file in (tmp_path / "run" / layer.name).iterdir():
            file.unlink()
    layers = weight_files.mapped(reference, manifest, parts)
    gc.collect()
    check(Rows([list(layer.values()) for layer in layers], TABLES, K), list(known), known)


def test_blocks_of_one_range_twice_are_refused(tmp_path: Path) -> None:
    reference, manifest, _ = whole(tmp_path, 100, 1)
    parts = list(weight_files.mapped(reference, manifest, {})[0].values())
    with pytest.raises(CheckpointError, match=r"two blocks of table a hold ids of prefix \d+"):
        Rows([parts * 2], TABLES, K)
    with pytest.raises(CheckpointError, match=r"rows are .* and the model's have 4 numbers"):
        Rows([parts], TABLES, K + 1)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from des_core.checkpoint import manifest as manifests
from des_core.contracts import Reference
from tests.release.test_rows import rows_of

def held(kind):
    for line in open("/proc/self/status"):
        if line.startswith(kind):
            return int(line.split()[1]) << 10

reference = Reference.parse(sys.argv[1])
manifest = manifests.read(reference)
rows = rows_of(reference, manifest)
rows.rows(rows.find(np.arange(3), np.zeros(3, np.int64)))
del rows
pieces = np.array_split(np.random.default_rng(1).permutation(np.load(sys.argv[3])), 300)
anon, file = held("RssAnon"), held("RssFile")
rows = rows_of(reference, manifest, int(sys.argv[2]))
most = total = 0
for _ in range(3):
    for piece in pieces:
        found = rows.find(piece, np.zeros(len(piece), np.int64))
        assert (found.block_U >= 0).all()
        total += float(rows.rows(found)[:, 0].astype(np.float64).sum())
        most = max(most, held("RssFile") - file)
print(rows.size, most, held("RssAnon") - anon, int(total))
"""


@pytest.mark.parametrize("share", [0, 4])
def test_a_model_four_times_as_large_as_the_memory_is_served(tmp_path: Path, share: int) -> None:
    """Without a bound all of it comes to be in memory, as files; with one no more than that, and the same rows."""
    many = 500_000
    reference, manifest, ids, total = large(tmp_path, many)
    size = manifest.layers[0].size
    words = [str(reference), str(size // share if share else 0), str(ids)]
    done = subprocess.run([sys.executable, "-c", MEMORY, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mapped, most, anonymous, found = map(int, done.stdout.split())
    assert mapped > 8e6 and found == 3 * total
    if share:
        # What one lookup of a few hundred ids brings in comes on top.
        assert most < mapped / share + 3e6
    else:
        assert most > 0.9 * mapped
    assert anonymous < 4e6


def large(root: Path, many: int) -> tuple[Reference, Manifest, Path, int]:
    """A table of many rows, its ids in a file, and the sum of its first column."""
    from des_core.checkpoint.blocks import BlockWriter
    from des_core.checkpoint.ordering import sorted_blocks

    ids = np.unique(np.random.default_rng(0).integers(-(1 << 63), 1 << 63, many))
    rows = np.arange(len(ids) * K, dtype=np.float32).reshape(-1, K) % 1000
    with BlockWriter(str(root / "run" / "step-0000000001"), 0, K, 0, "float32") as writer:
        for _, places in sorted_blocks(ids, np.zeros(len(ids), np.uint16), 5000):
            steps = np.ones(len(places), np.uint32)
            writer.add_rows("a", ids[places], steps, rows[places], steps, np.zeros((len(places), 0), np.float32))
        part = writer.finish()
    layer = Layer(
        run="run", name="step-0000000001", step=1, rows=part.rows, size=part.size, directories=(part.directory,)
    )
    manifest = manifest_of((layer,), 1)
    np.save(root / "ids.npy", ids)
    reference = manifest.write(manifests.manifest_uri(str(root / "run"), 1))
    return reference, manifest, root / "ids.npy", int(rows[:, 0].astype(np.float64).sum())
