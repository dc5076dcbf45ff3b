"""An exported model scores a feature store as evaluation did, whatever was trained and however."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from des_core import storage
from des_core.config import parse_config
from des_core.contracts import Reference
from des_core.errors import DataError, StorageError, UserError
from des_core.release.serve import serving
from des_core.run import Run, pin
from tests.engine import tiny
from tests.engine.group import Group

SECTIONS: dict[str, dict[str, Any]] = {
    "deepfm, decay to catch up": {
        "model": {"name": "deepfm", "batch_norm": True},
        "optimizer": {"rows": {"name": "adamw", "learning_rate": 0.05, "weight_decay": 2.0}},
    },
    "dlrm, dense inputs": {"model": {"name": "dlrm"}, "train": {"exchange": "rows"}},
    "autoint, dense inputs": {"model": {"name": "autoint"}},
    "dcn stacked": {"model": {"name": "dcn", "structure": "stacked"}},
    "fm, rows at zero": {
        "model": {"name": "fm"},
        "optimizer": {"rows": {"name": "group_ftrl", "learning_rate": 0.1, "group_l1": 0.4}},
    },
    "lr, admitted late": {"model": {"name": "lr"}, "table": {"admit_count": 4}},
}


def trained(group: Group, root: Path, sections: dict[str, Any]) -> Run:
    config = tiny.config(root, **sections)
    arguments = {"config": config.model_dump_json(), "dataset": str(tiny.store(config))}
    group.do("train", **arguments)
    group.do("report", **arguments)
    return pin(parse_config(arguments["config"]), Reference.parse(arguments["dataset"]))


@pytest.mark.parametrize("name", SECTIONS)
def test_the_exported_model_scores_as_evaluation_did(group: Callable[[int], Group], tmp_path: Path, name: str) -> None:
    run = trained(group(2), tmp_path, SECTIONS[name])
    scorer = serving.Scorer(serving.export(run))
    samples, labels, scores = scorer.score_dataset(run.dataset, "test")
    expected = pq.read_table(run.path("predictions.parquet")).to_pydict()
    assert samples == expected["sample"] and labels.tolist() == expected["label"]
    np.testing.assert_allclose(scores, expected["probability"], rtol=0, atol=1e-6)
    assert np.std(scores) > 1e-4
    rows = storage.read_json(run.path("report.json"))["table"][-1]["rows"]
    if "zero" in name:
        assert 0 < scorer.description.rows < rows, "rows at zero leave the model"


def test_a_model_of_another_format_is_refused(group: Callable[[int], Group], tmp_path: Path) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "lr"}})
    folder = serving.export(run)
    described = storage.read_json(f"{folder}/des.json")
    storage.write_json(f"{folder}/des.json", described | {"format": 1})
    with pytest.raises(UserError, match=r"des\.json: the model has format 1, this version of DES reads 3; train"):
        serving.Scorer(folder)


@pytest.mark.parametrize("name", ["dense.safetensors", "index.npy", "rows.npy"])
def test_a_flipped_bit_in_a_model_is_found(group: Callable[[int], Group], tmp_path: Path, name: str) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "fm"}})
    path = Path(serving.export(run)) / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="has other bytes than"):
        serving.Scorer(str(path.parent))


def test_a_number_that_leaves_no_score_is_named(group: Callable[[int], Group], tmp_path: Path) -> None:
    run = trained(group(1), tmp_path, {"model": {"name": "dcn"}})
    scorer = serving.Scorer(serving.export(run))
    records = {column: pa.nulls(3, pa.string()) for column in scorer.columns}
    assert np.isfinite(scorer.score(pa.table(records))).all()
    with pytest.raises(DataError, match=r"^record 2: its score is not a finite number; field width is too large"):
        scorer.score(pa.table(records | {"width": pa.array([1.0, -3e38, 2.0])}))
