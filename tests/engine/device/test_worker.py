"""A worker with its rows on a device trains the model that a worker with its rows on the CPU trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from des_core.errors import ConfigError
from tests.engine import tiny
from tests.engine.group import Group

ADAMW = {"name": "adamw", "learning_rate": 0.02, "weight_decay": 0.05}


@pytest.fixture
def on(device: torch.device) -> dict[str, Any]:
    """Settings of [train] under which the kernels run."""
    return {"kernels": "triton", "device": device.type}


def train(group: Group, root: Path, kernels: dict[str, Any], resume: bool = False, **sections: Any) -> dict[str, Any]:
    """What worker 0 answers after a few steps."""
    settings = {"batch": 32, "epochs": 1, "max_steps": 3, "precision": "fp64", "exchange": "sum", "shuffle": False}
    sections["train"] = settings | sections.get("train", {}) | kernels
    config = tiny.config(root, **sections)
    dataset = tiny.store(config, rows=400)
    answer: dict[str, Any] = group.do(
        "train", config=config.model_dump_json(), dataset=str(dataset), dump=True, resume=resume
    )[0]
    return answer


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"name": "deepfm"}},
        {"model": {"name": "lr"}, "optimizer": {"rows": {"name": "ftrl", "learning_rate": 0.1, "l1": 0.01}}},
        {"model": {"name": "fm"}, "table": {"admit_count": 2, "idle_steps": 3, "evict_every": 2}},
        {"model": {"name": "dcn"}, "optimizer": {"rows": ADAMW}},
        {"model": {"name": "autoint"}, "train": {"exchange": "gather"}},
        {"model": {"name": "fm"}, "train": {"max_grad_norm": 1e-3, "warmup_steps": 2}},
    ],
    ids=str,
)
def test_the_same_model_and_the_same_rows(
    group: Callable[[int], Group], on: dict[str, Any], tmp_path: Path, sections: dict[str, Any]
) -> None:
    expected = train(group(1), tmp_path / "cpu", {}, **sections)
    got = train(group(1), tmp_path / "device", on, **sections)
    assert got["table"].keys() == expected["table"].keys() and len(got["table"]) > 20
    for key in ("rows", "candidates", "admitted", "evicted"):
        assert got["statistics"][key] == expected["statistics"][key]
    for key, row in expected["table"].items():
        np.testing.assert_allclose(got["table"][key], row, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(got["logits"], expected["logits"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sections", [{}, {"model": {"name": "fm"}, "train": {"upper": "replicated"}}], ids=str)
def test_two_workers_are_one(
    group: Callable[[int], Group], on: dict[str, Any], tmp_path: Path, sections: dict[str, Any]
) -> None:
    if on["device"] == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sections = {"train": {"max_steps": 2}} | sections
    one, two = (train(group(n), tmp_path / str(n), on, **sections) for n in (1, 2))
    np.testing.assert_allclose(two["logits"], one["logits"], rtol=1e-9, atol=1e-9)


def test_a_run_goes_on_from_the_other_kinds_checkpoint(
    group: Callable[[int], Group], on: dict[str, Any], tmp_path: Path
) -> None:
    sections = {"optimizer": {"rows": ADAMW}, "table": {"admit_count": 2}}
    whole = train(group(1), tmp_path / "whole", {}, train={"max_steps": 4}, **sections)
    for first, second in (({}, on), (on, {})):
        root = tmp_path / str(len(first))
        train(group(1), root, first, train={"max_steps": 2}, **sections)
        got = train(group(1), root, second, resume=True, train={"max_steps": 4}, **sections)
        assert got["step"] == 4
        np.testing.assert_allclose(got["logits"], whole["logits"], rtol=1e-9, atol=1e-9)


def test_what_the_kernels_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from des_core.engine.device import support

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert support.why_not(torch.device("cpu")) == "they need a GPU"
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert support.why_not(torch.device("cpu")) == "Triton is not installed"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_travel_to_homes(group: Callable[[int], Group], on: dict[str, Any], tmp_path: Path, workers: int) -> None:
    """With the exchange of rows any number of workers trains the model that one does on the CPU."""
    if on["device"] == "cuda" and torch.cuda.device_count() < workers:
        pytest.skip("needs more GPUs")
    settings = {"exchange": "rows", "max_steps": 2}
    sections = {"optimizer": {"rows": ADAMW}, "table": {"admit_count": 2}}
    expected = train(group(1), tmp_path / "cpu", {}, train={"max_steps": 2}, **sections)
    got = train(group(workers), tmp_path / "device", on, train=settings, **sections)
    for key, row in got["table"].items():
        np.testing.assert_allclose(expected["table"][key], row, rtol=1e-9, atol=1e-11)
    assert len(got["table"]) > 5
    np.testing.assert_allclose(got["logits"], expected["logits"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 4])
def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(
    group: Callable[[int], Group], on: dict[str, Any], tmp_path: Path, steps: int
) -> None:
    """Found a step later on the device, it is the same line, whether it comes in the middle or at the end."""
    rows = {"name": "sgd", "learning_rate": 1e200}
    lines = []
    for kernels in ({}, on):
        with pytest.raises(AssertionError) as caught:
            train(group(1), tmp_path / str(len(lines)), kernels, train={"max_steps": steps}, optimizer={"rows": rows})
        lines.append(str(caught.value).strip().splitlines()[-1])
    assert lines[0] == lines[1] and "loss is nan at step" in lines[0] and "sample " in lines[0]


def test_rows_of_sixteen_bits_train_nearly_the_same_model(
    group: Callable[[int], Group], on: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"precision": "fp32"}
    whole, half = (
        train(group(1), tmp_path / rows, on, train=settings, table={"rows": rows}, optimizer={"rows": ADAMW})
        for rows in ("fp32", "bf16")
    )
    a, b = np.array(half["logits"]), np.array(whole["logits"])
    assert 0 < np.abs(a - b).max() < 0.05 * (1 + np.abs(b).max())
    again = train(
        group(1), tmp_path / "bf16", on, resume=True, train=settings | {"max_steps": 4}, table={"rows": "bf16"},
        optimizer={"rows": ADAMW},
    )  # fmt: skip
    assert again["step"] == 4


def test_rows_of_sixteen_bits_need_the_kernels(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"table.rows = 'bf16' needs train.kernels = 'triton'"):
        tiny.config(tmp_path, table={"rows": "bf16"})
