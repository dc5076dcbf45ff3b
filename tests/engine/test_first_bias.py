"""The first bias predicts the mean label of the training part, whoever reads the labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from des_core.contracts import LABEL, Dataset
from des_core.engine import first_bias as module
from tests.engine import tiny
from tests.engine.group import Group


def labels_of(root: Path) -> np.ndarray[Any, Any]:
    """The training part's, by reading the stored file alone."""
    table = pq.read_table(root / "features" / "all" / "data.parquet")
    return np.asarray(table.column(LABEL).to_numpy()[: table.num_rows * 8 // 10], np.float64)


@pytest.mark.parametrize("task", ["click", "rating"])
def test_the_bias_starts_at_the_mean_label_for_any_number_of_workers(
    group: Callable[[int], Group], tmp_path: Path, task: str
) -> None:
    """A step that moves nothing shows the first weights."""
    still = {"name": "sgd", "learning_rate": 1e-300}
    config = tiny.config(
        tmp_path,
        source={"task": task},
        model={"name": "lr"},
        train={"max_steps": 1, "precision": "fp64"},
        optimizer={"rows": still, "dense": still},
    )
    dataset = tiny.store(config)
    answers = {
        workers: group(workers).do("train", config=config.model_dump_json(), dataset=str(dataset), dump=True)[0]
        for workers in (1, 3)
    }
    mean = labels_of(tmp_path).mean()
    expected = mean if task == "rating" else math.log(mean / (1 - mean))
    for answer in answers.values():
        assert answer["bias"] == pytest.approx(expected, rel=1e-12)
    assert answers[1]["bias"] == answers[3]["bias"]


@pytest.mark.parametrize(("clicks", "odds"), [(0.0, 0.5 / 879.5), (880.0, 879.5 / 0.5), (46.0, 46 / 834)])
def test_labels_all_alike_give_finite_odds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clicks: float, odds: float
) -> None:
    run = tiny.run(tmp_path)
    monkeypatch.setattr(module, "_sum_of_labels", lambda *_: clicks)
    peers: Any = None
    assert module.first_bias(run.dataset, Dataset.load(run.dataset), peers) == pytest.approx(math.log(odds))
