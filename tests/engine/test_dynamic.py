"""Tables that live: the same ids own rows for any number of workers, whatever was admitted and evicted when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from des_core.engine.weights import checkpoint
from tests.engine import tiny
from tests.engine.group import Group

RULES: dict[str, dict[str, Any]] = {
    "admitted at the third lookup, idle days": {"admit_count": 3, "idle_days": 1},
    "admitted by coin, idle steps": {"admit_probability": 0.4, "idle_steps": 2, "evict_every": 3},
    "budget of frequent rows": {"max_rows": 90, "evict_every": 3, "admit_count": 2},
    "budget of recent rows": {"max_rows": 90, "evict_every": 2, "budget_keeps": "recent", "idle_days": 2},
    "zeroed rows": {"evict_zero": True, "evict_every": 2},
}


def live(
    group: Group, root: Path, rule: str, resume: bool = False, unpruned: bool = False, **train: Any
) -> dict[str, Any]:
    """Three days of logs through a group, in order; all rows by id, and worker 0's logits."""
    ftrl = {"name": "group_ftrl", "learning_rate": 0.1, "l1": 0.001, "group_l1": 0.5}
    rows = ftrl if "zero" in rule else {"name": "adamw", "learning_rate": 0.02, "weight_decay": 0.1}
    config = tiny.config(
        root,
        source={"time": "time"},
        train={"batch": 50, "epochs": 1, "shuffle": False, "precision": "fp64", **train},
        table=RULES[rule],
        optimizer={"rows": rows},
    )
    manifest = root / "features" / "manifest.json"
    dataset = checkpoint.reference(str(manifest)) if manifest.exists() else tiny.store(config, days=3)
    arguments = {"config": config.model_dump_json(), "dataset": str(dataset), "resume": resume}
    answers = group.do("train", **arguments, dump=True, unpruned=unpruned)
    table = {key: row for answer in answers for key, row in answer["table"].items()}
    assert len(table) == sum(answer["rows"] for answer in answers)
    sums = {
        key: sum(answer["statistics"][key] for answer in answers)
        for key in ("rows", "candidates", "admitted", "evicted")
    }
    return {"table": table, "logits": answers[0]["logits"], **sums}


@pytest.mark.parametrize("rule", RULES)
def test_the_same_ids_live_on_any_number_of_workers(group: Callable[[int], Group], tmp_path: Path, rule: str) -> None:
    """And a run stopped in mid-day, taken up again by as many or by other workers, is the run that never stopped."""
    one = live(group(1), tmp_path / "1", rule)
    assert one["evicted"] > 10 and one["admitted"] == one["rows"] + one["evicted"]
    for workers in (2, 3):
        many = live(group(workers), tmp_path / str(workers), rule)
        assert many["table"].keys() == one["table"].keys()
        assert {key: many[key] for key in ("candidates", "admitted", "evicted")} == {
            key: one[key] for key in ("candidates", "admitted", "evicted")
        }
        for key, row in one["table"].items():
            np.testing.assert_allclose(many["table"][key], row, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(many["logits"], one["logits"], rtol=1e-9, atol=1e-9)
    # Day two is steps 8 to 14 of 18: step 10 is in its middle.
    for before, after in ((2, 2), (3, 1)):
        root = tmp_path / f"{before}{after}"
        live(group(before), root, rule, max_steps=10)
        resumed = live(group(after), root, rule, resume=True)
        assert resumed["table"].keys() == one["table"].keys() and resumed["evicted"] == one["evicted"]
        np.testing.assert_allclose(resumed["logits"], one["logits"], rtol=1e-9, atol=1e-9)


def test_checkpoints_hold_nothing_of_batches_to_come(group: Callable[[int], Group], tmp_path: Path) -> None:
    """A checkpoint in the midst of a run, with the next batch in the making, is that of a run that ended there."""
    rule = "budget of frequent rows"
    live(group(2), tmp_path / "through", rule, unpruned=True, checkpoint_steps=7, max_steps=14)
    live(group(2), tmp_path / "ended", rule, max_steps=7)
    for worker in range(2):
        for array in ("ids", "counts", "last", "rows", "state", "candidate_ids", "candidate_counts"):
            through, ended = (
                np.load(next((tmp_path / name).glob(f"checkpoints/*/step-0000000007/{array}-{worker:05d}.npy")))
                for name in ("through", "ended")
            )
            np.testing.assert_array_equal(through, ended)
            assert len(ended)
