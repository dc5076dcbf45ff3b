"""Tables that live: the same ids own rows for any number of workers, whatever was admitted and evicted when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from des_core.checkpoint import manifest as manifests
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
    group: Group,
    root: Path,
    rule: str,
    resume: bool = False,
    saving: dict[str, Any] | None = None,
    **train: Any,
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
    dataset = manifests.reference(str(manifest)) if manifest.exists() else tiny.store(config, days=3)
    arguments = {"config": config.model_dump_json(), "dataset": str(dataset), "resume": resume}
    answers = group.do("train", **arguments, dump=True, **(saving or {}))
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
    live(group(2), tmp_path / "through", rule, saving={"unpruned": True}, checkpoint_steps=7, max_steps=14)
    live(group(2), tmp_path / "ended", rule, max_steps=7)
    through, ended = (
        {
            path.name: path.read_bytes()
            for path in (tmp_path / name).glob("checkpoints/*/step-0000000007/*")
            if path.suffix in (".arrow", ".safetensors")
        }
        for name in ("through", "ended")
    )
    assert through == ended and {name.split("-")[0] for name in ended} >= {"weights", "state", "waiting", "dense"}


def layers_of(root: Path) -> list[dict[str, Any]]:
    """The layers of the newest checkpoint."""
    pointers = sorted(root.glob("checkpoints/*/last.json"), key=lambda path: path.stat().st_mtime)
    last = manifests.last(str(pointers[-1].parent))
    assert last is not None
    return [layer.model_dump() for layer in manifests.read(last).layers]


@pytest.mark.parametrize("rule", ["admitted at the third lookup, idle days", "budget of recent rows", "zeroed rows"])
def test_deltas_are_as_good_as_whole_checkpoints(group: Callable[[int], Group], tmp_path: Path, rule: str) -> None:
    """Rows that were looked up since, ids that went and came back, ids that wait: read by other workers than wrote."""
    whole = live(group(1), tmp_path / "1", rule)
    for before, after in ((2, 2), (3, 1), (1, 3)):
        root = tmp_path / f"{before}{after}"
        live(group(before), root, rule, saving={"deltas": True}, max_steps=16, checkpoint_steps=3)
        layers = layers_of(root)
        assert len(layers) == 6 and sum(layer["gone"] for layer in layers[1:]) > 0
        resumed = live(group(after), root, rule, resume=True)
        assert resumed["table"].keys() == whole["table"].keys()
        assert {key: resumed[key] for key in ("candidates", "admitted", "evicted")} == {
            key: whole[key] for key in ("candidates", "admitted", "evicted")
        }
        np.testing.assert_allclose(resumed["logits"], whole["logits"], rtol=1e-9, atol=1e-9)


def test_a_full_disk_costs_one_checkpoint(group: Callable[[int], Group], tmp_path: Path) -> None:
    """Training goes on; the next save holds what the lost one should have held."""
    rule = "budget of recent rows"
    whole = live(group(1), tmp_path / "1", rule)
    saving = {"deltas": True, "full_disk_at": 6}
    live(group(2), tmp_path / "2", rule, saving=saving, max_steps=11, checkpoint_steps=3)
    assert [layer["step"] for layer in layers_of(tmp_path / "2")] == [3, 9, 11]
    resumed = live(group(3), tmp_path / "2", rule, resume=True)
    assert resumed["table"].keys() == whole["table"].keys()
    np.testing.assert_allclose(resumed["logits"], whole["logits"], rtol=1e-9, atol=1e-9)
    with pytest.raises(AssertionError, match="No space left on device"):
        live(group(2), tmp_path / "3", rule, saving={"full_disk_at": 5}, max_steps=5)
