"""Compacting, verifying, converting and exporting a checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from des_core import storage
from des_core.checkpoint import compaction, conversion
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.layers import Layers
from des_core.checkpoint.manifest import Last
from des_core.checkpoint.verification import verify
from des_core.contracts import FieldSpec, Reference
from des_core.data.feed.batches import ids_of, keys_of
from des_core.engine.weights.exporting import export_parquet
from des_core.engine.weights.optimizer import Decay
from des_core.errors import CheckpointError
from tests.checkpoint.histories import SHAPE, TABLES, K, Known, Z, history, manifest_of


def content(reference: Reference) -> dict[str, Any]:
    """All rows and waiting ids by table and id."""
    layers = Layers(reference, manifests.read(reference))
    found: dict[str, Any] = {}
    for table in TABLES:
        for rows, waiting in layers.between(table):
            columns = (rows.ids, rows.last, rows.counts, rows.rows_nK, rows.state_nZ)
            found |= {f"{table} {one}": rest for one, *rest in zip(*(c.tolist() for c in columns), strict=True)}
            columns = (waiting.ids, waiting.last, waiting.counts)
            found |= {f"{table} {one}": rest for one, *rest in zip(*(c.tolist() for c in columns), strict=True)}
    return found


def silent(table: str, rows: int) -> None:
    """Nobody is told."""


@pytest.mark.parametrize("seed", range(3))
def test_a_compacted_chain_says_the_same_in_one_layer(tmp_path: Path, seed: int) -> None:
    reference, _, _ = history(str(tmp_path), seed, 4, 60)
    Last(checkpoint=str(reference)).write(str(tmp_path / "run" / "last.json"))
    made = compaction.compact(reference, silent)
    assert len(manifests.read(made).layers) == 1 and content(made) == content(reference)
    assert manifests.last(str(tmp_path / "run")) == made
    assert compaction.compact(made, silent) == made, "nothing is left to do"
    # Where the chain goes, the compacted one is whole by itself.
    manifests.prune(str(tmp_path / "run"), {made.uri})
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last.json", "step-0000000004-whole"]
    assert len(content(made)) and not verify(made).faults


def test_two_compactions_at_once_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one starts and ends while the first has written one table."""
    reference, _, _ = history(str(tmp_path), 1, 3, 60)
    started: list[Reference] = []

    def another(table: str, rows: int) -> None:
        if table == TABLES[0] and not started:
            started.append(reference)
            with monkeypatch.context() as other_process:
                other_process.setattr(os, "getpid", lambda: 1)
                started.append(compaction.compact(reference, silent))

    made = compaction.compact(reference, another)
    assert made == started[1] and content(made) == content(reference) and not verify(made).faults


def test_pruning_keeps_the_layers_that_a_kept_manifest_names(tmp_path: Path) -> None:
    reference, manifest, _ = history(str(tmp_path), 2, 3, 30)
    lone = manifest_of(manifest.layers[:1], 1).write(manifests.manifest_uri(str(tmp_path / "run"), 1))
    before = content(reference)
    manifests.prune(str(tmp_path / "run"), {reference.uri})
    assert not storage.exists(lone.uri) and content(reference) == before


def test_every_fault_is_listed(tmp_path: Path) -> None:
    reference, *_ = history(str(tmp_path), 3, 3, 60)
    assert verify(reference).blocks > 6 and not verify(reference).faults
    files = sorted((tmp_path / "run").rglob("weights-*.arrow"))
    data = bytearray(files[0].read_bytes())
    data[-700] ^= 1
    files[0].write_bytes(data)
    files[-1].unlink()
    (tmp_path / "run" / "step-0000000002" / "blocks-00000.json").unlink()
    faults = " ".join(verify(reference).faults)
    for named in (f"{files[0].name}: the weights of table", f"{files[-1].name} is missing", "its layer of step 2"):
        assert named in faults


def old_checkpoint(folder: Path, known: Known) -> Reference:
    """A checkpoint of format 3 by two workers, whose rows lie in the order of their slots."""
    here = folder / "step-0000000007"
    here.mkdir(parents=True)
    files = {}
    for worker in range(2):
        mine = [place for number, place in enumerate(known) if number % 2 == worker]
        rows = [place for place in mine if known[place][0] == "row"]
        waits = [place for place in mine if known[place][0] == "waits"]
        numbers = np.array([known[place][1] for place in rows], np.float32).reshape(-1, K + Z)
        counts = [known[place][1] for place in waits]
        arrays = {"counts": numbers[:, 0].astype(np.uint32), "rows": numbers[:, :K], "state": numbers[:, K:]}
        for prefix, places in (("", rows), ("candidate_", waits)):
            arrays |= {
                f"{prefix}ids": np.array([place[1] for place in places], np.int64),
                f"{prefix}tables": np.array([place[0] for place in places], np.uint16),
                f"{prefix}last": np.full(len(places), 7, np.uint32),
            }
        arrays["candidate_counts"] = np.array(counts, np.uint32)
        for name, array in arrays.items():
            path = here / f"{name}-{worker:05d}.npy"
            np.save(path, array)
            files[path.name] = storage.digest_file(str(path))
    dense = {"model.bias": np.ones((), np.float32), "optimizer.0.step": np.full((), 7, np.float32)}
    files["dense.safetensors"] = storage.write_bytes(str(here / "dense.safetensors"), safetensors.numpy.save(dense))
    manifest = {"format": 3, "run_key": "k", "trajectory": "t", "shape": SHAPE.model_dump(mode="json"), "workers": 2}
    manifest |= {"trainer": {"step": 7, "decays": [], "epoch": 0}, "files": files}
    return Reference(str(here / "manifest.json"), storage.write_json(str(here / "manifest.json"), manifest))


def test_an_old_checkpoint_is_refused_until_it_is_converted(tmp_path: Path) -> None:
    _, _, known = history(str(tmp_path / "new"), 5, 2, 50)
    old = old_checkpoint(tmp_path / "run", known)
    Last(checkpoint=str(old)).write(str(tmp_path / "run" / "last.json"))
    with pytest.raises(CheckpointError, match=r"has format 3, .* convert it: des checkpoint convert"):
        manifests.read(old)
    made = conversion.convert(old)
    assert manifests.last(str(tmp_path / "run")) == made and conversion.convert(made) == made
    numbers = {
        f"{TABLES[table]} {one}": [7, int(v[0]), v[:K], v[K:]] if kind == "row" else [7, v]
        for (table, one), (kind, v) in known.items()
    }
    assert content(made) == numbers
    folder = Path(made.uri).parent
    assert list(safetensors.numpy.load_file(str(folder / "dense.safetensors"))) == ["bias"]
    assert list(safetensors.numpy.load_file(str(folder / "dense-state.safetensors"))) == ["0.step"]
    for damage in ("rows-00001.npy", "ids-00000.npy"):
        path = Path(old.uri).parent / damage
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=damage):
            conversion.convert(old)
        path.write_bytes(whole)
    other = json.loads(Path(old.uri).read_text()) | {"format": 2}
    unknown = Reference(old.uri, storage.write_json(old.uri, other))
    with pytest.raises(CheckpointError, match="has format 2; formats 3 and 4 can be read"):
        conversion.convert(unknown)


def test_keys_come_back_from_ids() -> None:
    keys = np.random.default_rng(0).integers(-(1 << 63), 1 << 63, 1000)
    np.testing.assert_array_equal(keys_of(ids_of(keys, "user"), "user"), keys)


@pytest.mark.parametrize("decays", [[], [(1, 0.25)]])
def test_exported_tables_hold_the_weights(tmp_path: Path, decays: list[tuple[int, float]]) -> None:
    """All rows that are not zero, by key, with the decay that they missed."""
    reference, manifest, known = history(str(tmp_path), 6, 3, 60)
    trainer = {"step": 9, "decays": decays, "epoch": 0}
    reference = manifest.model_copy(update={"trainer": trainer}).write(reference.uri)
    fields = [
        FieldSpec(name="item", column="item", kind="categorical", table="a"),
        FieldSpec(name="seen", column="seen", kind="multi", table="a"),
        FieldSpec(name="user", column="user", kind="categorical", table="b"),
    ]
    export_parquet(reference, fields, str(tmp_path / "out"), silent)
    last = {key: rest[0] for key, rest in content(reference).items()}
    for number, (table, names) in enumerate((("a", "item|seen"), ("b", "user"))):
        rows = pq.read_table(tmp_path / "out" / f"{table}.parquet").to_pylist()
        wanted = {one: v[:K] for (of, one), (kind, v) in known.items() if of == number and kind == "row"}
        assert len(rows) == len(wanted) > 5 and {row["field"] for row in rows} == {names}
        for row in rows:
            (one,) = ids_of(np.array([row["key"]]), table).tolist()
            factor = Decay(decays).missed(np.array([last[f"{table} {one}"]], np.uint32), 10)[0] if decays else 1.0
            np.testing.assert_allclose([row["weight"], *row["factors"]], np.array(wanted[one]) * factor, rtol=1e-6)
