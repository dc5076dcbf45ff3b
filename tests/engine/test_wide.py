"""A wide field is read by the linear part alone, by every exchange, for any number of workers, and when served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from des_core.contracts import Dataset
from des_core.run import pin
from tests.engine import tiny
from tests.engine.dense_reference import dense_logits
from tests.engine.group import Group

WIDE = ("user", "tags", "age")
FIELDS = tuple(field.model_copy(update={"wide": field.name in WIDE}) for field in tiny.FIELDS)
"""One, a list and a bucketed number between fields that are not wide."""

TURNS = [
    ("deepfm", 1, {}),
    ("deepfm", 2, {"exchange": "gather"}),
    ("deepfm", 3, {"exchange": "sum"}),
    ("deepfm", 3, {"exchange": "rows"}),
    ("fm", 7, {"exchange": "sum"}),
    ("fm", 2, {"upper": "replicated", "exchange": "sum"}),
    ("fibinet", 3, {"exchange": "gather"}),
]


@pytest.mark.parametrize(("name", "workers", "how"), TURNS)
def test_only_the_linear_part_reads_a_wide_field(
    group: Callable[[int], Group], tmp_path: Path, name: str, workers: int, how: dict[str, str]
) -> None:
    """As plain torch trains one dense table in which these rows' factors are zero and stay so."""
    rows, dense = {"name": "sgd", "learning_rate": 0.5}, {"name": "sgd", "learning_rate": 0.1}
    config = tiny.config(
        tmp_path,
        model={"name": name},
        train={"precision": "fp64", "max_steps": 9, "epochs": 1, **how},
        optimizer={"rows": rows, "dense": dense},
    )
    dataset = tiny.store(config, fields=FIELDS)
    answers = group(workers).do("train", config=config.model_dump_json(), dataset=str(dataset), dump=True)

    def rules(rows: list[Tensor], dense: list[Tensor]) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(rows, lr=0.5), torch.optim.SGD(dense, lr=0.1)]

    expected = dense_logits(config, dataset, 9, rules)
    np.testing.assert_allclose(answers[0]["logits"], expected, rtol=1e-9, atol=1e-9)
    table: dict[str, list[float]] = {}
    for answer in answers:
        table |= answer["table"]
    bare = [row for row in table.values() if not any(row[1:])]
    assert 50 < len(bare) < len(table) and all(row[0] for row in bare), "linear weights are trained"


def test_a_served_model_scores_wide_fields_as_evaluation_did(group: Callable[[int], Group], tmp_path: Path) -> None:
    from des_core.release.serve import serving

    config = tiny.config(tmp_path, model={"name": "deepfm"})
    dataset = tiny.store(config, fields=FIELDS)
    arguments: dict[str, Any] = {"config": config.model_dump_json(), "dataset": str(dataset)}
    group(2).do("train", **arguments)
    group(2).do("report", **arguments)
    run = pin(config, dataset)
    folder = str(tmp_path / "model")
    serving.write(run, folder)
    _, _, scores = serving.Scorer(folder).score_dataset(run.dataset, "test")
    assert len(scores) == Dataset.load(dataset).rows("test") and np.std(scores) > 1e-4
    found = pq.read_table(next(Path(run.folder).glob("predictions*"))).column("probability").to_numpy()
    np.testing.assert_allclose(scores, found, rtol=0, atol=1e-6)


def test_a_model_without_a_linear_part_refuses_wide_fields(group: Callable[[int], Group], tmp_path: Path) -> None:
    config = tiny.config(tmp_path, model={"name": "dcn"})
    dataset = tiny.store(config, fields=FIELDS)
    with pytest.raises(AssertionError, match=r"wide = true needs a model with a linear part, which dcn has not"):
        group(1).do("train", config=config.model_dump_json(), dataset=str(dataset))
