"""Learning rates over steps are torch's schedules; gradients are clipped as torch clips one dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from des_core.config import TrainConfig
from des_core.engine.schedule import rate_factor
from tests.engine import tiny
from tests.engine.dense_reference import dense_logits
from tests.engine.group import Group

SCHEDULES = {
    "cosine": lambda rule: lr_scheduler.CosineAnnealingLR(rule, T_max=12),
    "step": lambda rule: lr_scheduler.StepLR(rule, step_size=5, gamma=0.3),
    "constant": lambda rule: lr_scheduler.ConstantLR(rule, factor=1.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(name: str) -> None:
    rule = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = SCHEDULES[name](rule)
    steps = {"step": 5}.get(name, 12 if name == "cosine" else 0)
    settings = TrainConfig.model_validate({"lr_schedule": name, "lr_decay_steps": steps, "lr_gamma": 0.3})
    for step in range(1, 13):
        assert rate_factor(settings, step, 1000) == pytest.approx(rule.param_groups[0]["lr"], rel=1e-12)
        rule.step()
        schedule.step()


def test_a_warm_up_rises_and_the_schedule_follows() -> None:
    settings = TrainConfig(warmup_steps=4, lr_schedule="cosine")
    found = [rate_factor(settings, step, 12) for step in range(1, 15)]
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[8] == pytest.approx(0.5) and found[11] > found[12] == found[13] == 0, "eight steps after the warm-up"


CLIPPED = [
    ("deepfm", 1, {}),
    ("deepfm", 2, {"exchange": "gather"}),
    ("deepfm", 3, {"exchange": "sum"}),
    ("deepfm", 3, {"exchange": "rows"}),
    ("fm", 2, {"upper": "replicated", "exchange": "sum"}),
    ("dcn_v2", 3, {"upper": "replicated", "exchange": "sum"}),
]


@pytest.mark.parametrize(("name", "workers", "how"), CLIPPED)
def test_gradients_are_clipped_as_those_of_one_dense_model(
    group: Callable[[int], Group], tmp_path: Path, name: str, workers: int, how: dict[str, str]
) -> None:
    """Rows and dense weights by one norm, in some steps above the bound and in some below."""
    sgd = {"name": "sgd", "learning_rate": 0.5}
    logits = {}
    for bound in (0.0, 0.15):
        config = tiny.config(
            tmp_path / str(bound),
            model={"name": name, "cross_rank": 3},
            train={"precision": "fp64", "max_steps": 9, "epochs": 1, "max_grad_norm": bound, **how},
            optimizer={"rows": sgd, "dense": sgd},
        )
        dataset = tiny.store(config)
        answers = group(workers).do("train", config=config.model_dump_json(), dataset=str(dataset))
        logits[bound] = np.array(answers[0]["logits"])

    def rules(rows: list[Tensor], dense: list[Tensor]) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(rows + dense, lr=0.5)]

    expected = dense_logits(config, dataset, 9, rules, max_norm=0.15)
    np.testing.assert_allclose(logits[0.15], expected, rtol=1e-9, atol=1e-9)
    assert np.abs(logits[0.15] - logits[0.0]).max() > 1e-3
