"""A registered model scores a feature store as evaluation did, bit for bit, whatever was trained and however saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.layers import Layers
from des_core.checkpoint.manifest import Manifest
from des_core.config import parse_config
from des_core.contracts import Reference
from des_core.data.store import predictions
from des_core.errors import CheckpointError, DataError, UserError
from des_core.release.serve import serving
from des_core.run import Run, pin
from tests.engine import tiny
from tests.engine.group import Group

DECAY = {"optimizer": {"rows": {"name": "adamw", "learning_rate": 0.05, "weight_decay": 2.0}}}
EVICTED = {
    "train": {"checkpoint_steps": 3, "shuffle": True},
    "table": {"max_rows": 120, "budget_keeps": "recent", "evict_every": 2, "admit_count": 2},
}
SECTIONS: dict[str, dict[str, Any]] = {
    "deepfm, decay to catch up": {"model": {"name": "deepfm", "batch_norm": True}, **DECAY},
    "dlrm, dense inputs": {"model": {"name": "dlrm"}, "train": {"exchange": "rows"}},
    "autoint, dense inputs": {"model": {"name": "autoint"}},
    "dcn stacked": {"model": {"name": "dcn", "structure": "stacked"}},
    "fm, rows at zero": {
        "model": {"name": "fm"},
        "optimizer": {"rows": {"name": "group_ftrl", "learning_rate": 0.1, "group_l1": 0.4}},
    },
    "lr, deltas and gone ids": {"model": {"name": "lr"}, **EVICTED},
    "fm, deltas, gone ids and decay in double precision": {
        "model": {"name": "fm"},
        **EVICTED,
        **DECAY,
        "train": {"checkpoint_steps": 3, "precision": "fp64"},
    },
}


def trained(group: Group, root: Path, sections: dict[str, Any], one: Group | None = None) -> Run:
    """A run that was trained by a group, and evaluated by it or by another."""
    config = tiny.config(root, **sections)
    arguments = {"config": config.model_dump_json(), "dataset": str(tiny.store(config))}
    group.do("train", **arguments, deltas=True, unpruned=True)
    (one or group).do("report", **arguments)
    return pin(parse_config(arguments["config"]), Reference.parse(arguments["dataset"]))


def checkpoint_of(run: Run) -> tuple[Reference, Manifest]:
    reference = Reference.parse(storage.read_json(run.path("training.json"))["checkpoint"])
    return reference, manifests.read(reference)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_scores_as_a_worker_does(
    group: Callable[[int], Group], tmp_path: Path, name: str, workers: int
) -> None:
    run = trained(group(workers), tmp_path, SECTIONS[name], group(1))
    serving.write(run, str(tmp_path / "model"))
    scorer = serving.Scorer(str(tmp_path / "model"))
    samples, labels, scores = scorer.score_dataset(run.dataset, "test")
    expected = predictions.read(run.path("predictions")).to_pydict()
    assert samples == expected["sample"] and labels.tolist() == expected["label"]
    np.testing.assert_array_equal(scores, expected["probability"])
    assert np.std(scores) > 1e-4
    _, manifest = checkpoint_of(run)
    assert all(len(layer.directories) == workers for layer in manifest.layers)
    if "deltas" in name:
        assert len(manifest.layers) > 2 and sum(layer.gone for layer in manifest.layers) > 20
    assert scorer.rows.dtype == (np.float64 if "double" in name else np.float32)


def test_a_lookup_says_what_the_layers_say(group: Callable[[int], Group], tmp_path: Path) -> None:
    run = trained(group(3), tmp_path, SECTIONS["lr, deltas and gone ids"])
    serving.write(run, str(tmp_path / "model"))
    scorer = serving.Scorer(str(tmp_path / "model"))
    reference, manifest = checkpoint_of(run)
    for number, table in enumerate(manifest.shape.tables):
        for piece, _ in Layers(reference, manifest, state=False).between(table):
            found = scorer.rows.find(piece.ids, np.full(len(piece.ids), number))
            np.testing.assert_array_equal(
                scorer.rows.rows(found), piece.rows_nK.reshape(len(piece.ids), scorer.rows.width)
            )
            np.testing.assert_array_equal(scorer.rows.last(found), piece.last)


def described(run: Run, tmp_path: Path, limit: int) -> tuple[Path, Path]:
    """The folder of a model, and of its weights."""
    registry = run.config.registry.model_copy(update={"embed_limit": limit})
    run = Run(run.config.model_copy(update={"registry": registry}), run.dataset, run.key)
    serving.write(run, str(tmp_path / "model"))
    place = storage.read_json(f"{tmp_path}/model/des.json")["checkpoint"].partition("#")[0]
    assert place.startswith("checkpoints/")
    return tmp_path / "model", Path(tmp_path if limit == 0 else tmp_path / "model", place).parent


def test_registering_copies_no_weights_and_a_small_models_files_alone(
    group: Callable[[int], Group], tmp_path: Path
) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "fm"}})
    folder, _ = described(run, tmp_path, 0)
    assert [path.name for path in folder.iterdir()] == ["des.json"]
    expected = serving.Scorer(str(folder)).score_dataset(run.dataset, "test")[2]
    # Storage has moved since.
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"the model's checkpoint is missing .*DES_STORAGE_ROOT"):
        serving.Scorer(str(folder))
    moved = serving.Scorer(str(folder), str(tmp_path / "elsewhere"))
    np.testing.assert_array_equal(moved.score_dataset(run.dataset, "test")[2], expected)
    (tmp_path / "elsewhere" / "checkpoints").rename(tmp_path / "checkpoints")
    folder, weights = described(run, tmp_path, 1 << 20)
    assert not list(folder.rglob("state-*"))
    for path in weights.rglob("*.arrow"):
        original = tmp_path / "checkpoints" / path.relative_to(folder / "checkpoints")
        assert path.read_bytes() == original.read_bytes()
    (tmp_path / "checkpoints").rename(tmp_path / "gone")
    np.testing.assert_array_equal(serving.Scorer(str(folder)).score_dataset(run.dataset, "test")[2], expected)


def test_a_model_whose_weights_are_gone_is_not_registered(group: Callable[[int], Group], tmp_path: Path) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "lr"}})
    (weights,) = Path(checkpoint_of(run)[0].uri).parent.glob("weights-*")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"weights-00000-000\.arrow is missing, .* names it; train again"):
        serving.write(run, str(tmp_path / "model"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_format(path: Path) -> None:
    """A manifest of an earlier form, with a digest that is right."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    described = path.parents[3] / "model" / "des.json"
    document = json.loads(described.read_text())
    place = document["checkpoint"].partition("#")[0]
    described.write_text(json.dumps(document | {"checkpoint": f"{place}#sha256:{storage.digest_file(str(path))}"}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights-00000-000.arrow", flip, r"the weights of table \w+, prefixes \d+ to \d+ .* other content"),
        ("weights-00000-000.arrow", Path.unlink, r"weights-00000-000.arrow is missing, .*; bring it back, or train"),
        ("blocks-00000.json", flip, r"blocks-00000\.json has other bytes .* needs its layer of step"),
        ("blocks-00000.json", Path.unlink, r"blocks-00000\.json is missing.* needs its layer of step"),
        ("dense.safetensors", flip, r"dense\.safetensors has other bytes .*, or train and register"),
        ("dense.safetensors", Path.unlink, r"dense\.safetensors is missing.*, or train and register"),
        ("manifest.json", flip, r"manifest\.json has other bytes"),
        ("manifest.json", other_format, r"manifest\.json has format 3, this version of DES reads 4"),
        ("manifest.json", Path.unlink, r"the model's checkpoint is missing \(.*manifest\.json.* bring it back"),
    ],
)
def test_weights_that_are_not_whole_are_one_line(
    group: Callable[[int], Group], tmp_path: Path, name: str, change: Callable[[Path], None], message: str
) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "fm"}})
    folder, weights = described(run, tmp_path, 0)
    change(weights / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        serving.Scorer(str(folder))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_weights_of_another_run_and_a_model_of_another_format_are_refused(
    group: Callable[[int], Group], tmp_path: Path
) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "lr"}})
    folder, weights = described(run, tmp_path, 0)
    other = trained(group(1), tmp_path / "other", {"model": {"name": "lr"}, "run": {"seed": 6}})
    its = Path(checkpoint_of(other)[0].uri).parent
    for name in ("manifest.json", "blocks-00000.json", "weights-00000-000.arrow"):
        kept = (weights / name).read_bytes()
        (weights / name).write_bytes((its / name).read_bytes())
        with pytest.raises(CheckpointError, match=name):
            serving.Scorer(str(folder))
        (weights / name).write_bytes(kept)
    serving.Scorer(str(folder))
    described_ = storage.read_json(f"{folder}/des.json")
    storage.write_json(f"{folder}/des.json", described_ | {"format": 3})
    with pytest.raises(UserError, match=r"des\.json: the model has format 3, this version of DES reads 4; train and r"):
        serving.Scorer(str(folder))


def test_a_number_that_leaves_no_score_is_named(group: Callable[[int], Group], tmp_path: Path) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "dcn"}})
    scorer = serving.Scorer(str(described(run, tmp_path, 0)[0]))
    records = {column: pa.nulls(3, pa.string()) for column in scorer.columns}
    assert np.isfinite(scorer.score(pa.table(records))).all()
    with pytest.raises(DataError, match=r"^record 2: its score is not a finite number; field width is too large"):
        scorer.score(pa.table(records | {"width": pa.array([1.0, -3e38, 2.0])}))
