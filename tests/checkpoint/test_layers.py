"""Blocks and layers: of each id what the newest layer says, whatever the blocks' edges and the range asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from des_core.checkpoint import blocks as form
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import PREFIXES, prefixes
from des_core.checkpoint.layers import Layers
from des_core.errors import CheckpointError, DesError
from tests.checkpoint.histories import TABLES, K, Known, Z, history, manifest_of, write_layer


def read(layers: Layers, table: int, first: int, last: int) -> Known:
    """What the layers say of a range; ids ascend, and none comes twice."""
    found: Known = {}
    before = -1
    for rows, waiting in layers.between(TABLES[table], first, last):
        for ids in (rows.ids, waiting.ids):
            ascending = [int(one) for one in ids.view(np.uint64)]
            assert ascending == sorted(set(ascending)) and all(one > before for one in ascending)
        both = [*rows.ids.view(np.uint64).tolist(), *waiting.ids.view(np.uint64).tolist()]
        before = max([before, *both])
        numbers = np.concatenate([rows.rows_nK, rows.state_nZ], 1) if len(rows.ids) else np.zeros((0, K + Z))
        np.testing.assert_array_equal(numbers[:, 0].astype(np.uint32), rows.counts)
        found |= {(table, one): ("row", row) for one, row in zip(rows.ids.tolist(), numbers.tolist(), strict=True)}
        counts = waiting.counts.tolist()
        found |= {(table, one): ("waits", count) for one, count in zip(waiting.ids.tolist(), counts, strict=True)}
    return found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), depth=st.integers(1, 5), many=st.integers(1, 40), data=st.data())
def test_the_newest_layer_speaks(
    tmp_path_factory: pytest.TempPathFactory, seed: int, depth: int, many: int, data: st.DataObject
) -> None:
    reference, manifest, whole = history(str(tmp_path_factory.mktemp("layers")), seed, depth, many)
    layers = Layers(reference, manifest)
    for table in range(len(TABLES)):
        assert read(layers, table, 0, PREFIXES - 1) == {p: v for p, v in whole.items() if p[0] == table}
        first = data.draw(st.integers(0, PREFIXES - 1))
        last = data.draw(st.integers(first, PREFIXES - 1))
        wanted = {
            place: value
            for place, value in whole.items()
            if place[0] == table and first <= int(prefixes(np.array([place[1]], np.int64))[0]) <= last
        }
        assert read(layers, table, first, last) == wanted
    weights = [rows for table in TABLES for rows, _ in Layers(reference, manifest, state=False).between(table)]
    assert sum(len(rows.ids) for rows in weights) == sum(kind == "row" for kind, _ in whole.values())


def test_every_byte_is_read_once_by_any_number_of_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of other readers than wrote: at most a block at each of a range's ends is read in vain."""
    generator = np.random.default_rng(0)
    ids = np.unique(generator.integers(-(1 << 63), 1 << 63, 30_000))
    known: Known = {(0, one): ("row", [1.0] * (K + Z)) for one in ids.tolist()}
    layer = write_layer(str(tmp_path), "step-0000000001", 1, known, set(), 2)
    manifest = manifest_of((layer,), 1)
    reference = manifest.write(manifests.manifest_uri(str(tmp_path / "run"), 1))
    for readers in (1, 2, 3, 5):
        edges = np.linspace(0, PREFIXES, readers + 1).astype(int).tolist()
        bytes_read, rows = 0, 0
        for first, stop in zip(edges[:-1], edges[1:], strict=True):
            layers = Layers(reference, manifest)
            rows += len(read(layers, 0, first, stop - 1))
            bytes_read += layers.read_bytes
        assert rows == len(ids) and 0.9 * layer.size < bytes_read <= 1.1 * layer.size, readers


def test_a_flipped_bit_names_its_block(tmp_path: Path) -> None:
    reference, manifest, _ = history(str(tmp_path), 3, 2, 40)
    (file, *_) = sorted((tmp_path / "run").rglob("weights-*.arrow"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-800] + bytes([whole[-800] ^ 4]) + whole[-799:])
    with pytest.raises(
        CheckpointError, match=rf"{file.name}: the weights of table \w, prefixes \d+ to \d+ .*other content"
    ):
        for table in range(2):
            read(Layers(reference, manifest), table, 0, PREFIXES - 1)
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing"):
        for table in range(2):
            read(Layers(reference, manifest), table, 0, PREFIXES - 1)


def test_a_gap_in_the_chain_is_named_with_the_checkpoint_before(tmp_path: Path) -> None:
    reference, manifest, _ = history(str(tmp_path), 4, 3, 20)
    manifest.model_copy(update={"layers": manifest.layers[:1]}).write(manifests.manifest_uri(str(tmp_path / "run"), 1))
    (tmp_path / "run" / "step-0000000002" / "blocks-00000.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"needs its layer of step 2; the checkpoint before it is .*step-0000000001"
    ):
        Layers(reference, manifest)


def test_a_file_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """Same names, other content: the digest of the directory, or of a block, says so."""
    reference, manifest, _ = history(str(tmp_path / "one"), 5, 1, 30)
    history(str(tmp_path / "two"), 6, 1, 30)
    for name in ("blocks-00000.json", "weights-00000-000.arrow"):
        mine, other = (tmp_path / one / "run" / "step-0000000001" / name for one in ("one", "two"))
        kept = mine.read_bytes()
        mine.write_bytes(other.read_bytes())
        with pytest.raises(DesError, match=name):
            for table in range(2):
                read(Layers(reference, manifest), table, 0, PREFIXES - 1)
        mine.write_bytes(kept)


def test_files_and_blocks_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "FILE_BYTES", 4096)
    known: Known = {
        (0, one): ("row", [float(number)] * (K + Z))
        for number, one in enumerate(np.unique(np.random.default_rng(1).integers(-(1 << 63), 1 << 63, 2000)).tolist())
    }
    layer = write_layer(str(tmp_path), "step-0000000001", 1, known, set(), 1)
    files = sorted((tmp_path / "run").rglob("weights-*.arrow"))
    assert len(files) > 5 and max(file.stat().st_size for file in files) < 4096 + 2 * form.LEAST_BYTES
    manifest = manifest_of((layer,), 1)
    reference = manifest.write(manifests.manifest_uri(str(tmp_path / "run"), 1))
    assert read(Layers(reference, manifest), 0, 0, PREFIXES - 1) == known
