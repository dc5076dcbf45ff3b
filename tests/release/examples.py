"""A day's run with everything that its page can show, written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from des_core import storage
from des_core.run import Day, Run
from tests import columns
from tests.finished import finished_run, predictions_of, write_champion

HOSTILE = "<script>document.title='taken'</script>"
"""A field's name, and a value, that wants to be an element."""

CUT = 1_769_896_800_123_456
"""2026-01-31 22:00:00 UTC and a bit."""


def days_run(folder: Path, outcome: str = "accept", at_fault: bool = False) -> Run:
    """The run of 2026-01-31: judged as said, beside champion 12 and reference 7, new rows scored, registered as 13."""
    run = finished_run(folder, samples=6_000, skill=1.35, seed=1)
    run = replace(
        run,
        day=Day(
            as_of="2026-01-31",
            days={"2026-01-28": "a" * 64, "2026-01-30": "b" * 64, "2026-01-31": "c" * 64},
            left_out=("2026-01-29",),
            cut=CUT,
            champion="12",
            trained_through=CUT - 4 * 86_400_000_000,
        ),
    )
    ours = _report(run)
    _champion(run)
    storage.write_json(run.path("gate.json"), verdict(ours, outcome, at_fault))
    storage.write_json(run.path("new_rows.json"), new_rows())
    storage.write_json(run.path("version.json"), {"version": "13", "aliases": ["champion"] * (outcome == "accept")})
    return run


def _report(run: Run) -> dict[str, Any]:
    report: dict[str, Any] = storage.read_json(run.path("report.json"))
    report["valid"], report["epochs"] = {"samples": 0}, []
    names = ("read", "decode", "index", "stall", "gather", "partial", "exchange", "head", "backward", "update")
    report["profile"] = dict(zip(names, (0.41, 1.32, 0.87, 0.05, 0.61, 0.94, 2.13, 0.77, 1.48, 0.69), strict=True))
    report["fresh"] = [f"{HOSTILE}: its hashing changed, every row starts fresh", "price: new field"]
    report["plan"]["placement"][0]["fields"] = ["user", HOSTILE]
    storage.write_json(run.path("report.json"), report)
    return report


def _champion(run: Run) -> None:
    """A little worse than the candidate."""
    labels, scores = predictions_of(6_000, 1.35, 1)
    logits = np.log(scores / (1 - scores)) + np.random.default_rng(5).normal(0, 0.33, len(scores)) + 0.12
    compared = columns.comparison("click", labels, scores, 1 / (1 + np.exp(-logits)))
    write_champion(run, status="scored", version="12", comparison=compared)


def verdict(ours: dict[str, Any], outcome: str = "accept", at_fault: bool = False) -> dict[str, Any]:
    """``gate.json`` with every list filled."""
    auc, accepted = ours["auc"], outcome == "accept"
    apart = 0.0031 if accepted else -0.0112
    values = {
        "samples": 6_000.0,
        "compared_samples": 6_000.0,
        "auc": auc,
        "champion_auc": auc - apart,
        "auc_difference": apart,
        "reference_auc": auc - apart - 0.0042,
        "reference_auc_difference": apart + 0.0042,
        "champion_logloss": ours["logloss"] + 0.0041,
        "champion_ne": ours["ne"] + 0.0065,
        "champion_calibration": 1.083,
        "reference_logloss": ours["logloss"] + 0.0092,
        "reference_compared_samples": 5_400.0,
    }
    intervals = {
        "auc": [auc - 0.0102, auc + 0.0101],
        "auc_difference": [apart - 0.0036, apart + 0.0036],
        "reference_auc_difference": [apart + 0.0004, apart + 0.0081],
        "champion_auc": [auc - apart - 0.0104, auc - apart + 0.0103],
    }
    checks = [
        ("min_auc", auc, 0.7, True, f"AUC {auc:.4f} is at least gate.min_auc = 0.7"),
        ("max_auc_drop", apart - 0.0036, -0.005, accepted, f"AUC differs by {apart:+.4f} from version 12's"),
        ("max_logloss", ours["logloss"], 0.6, True, "log loss is at most gate.max_logloss = 0.6"),
        ("max_calibration", ours["calibration"], 1.2, True, "calibration is at most gate.max_calibration = 1.2"),
        ("max_psi tags", 0.031, 0.25, True, "field tags: population stability index 0.031 is at most gate.max_psi"),
        ("max_load", 0.4, 0.9, True, "load 0.40 of the index is at most gate.max_load = 0.9"),
        ("max_rows", 38_190.0, 1_000_000, True, "38,190 rows is at most gate.max_rows = 1000000"),
    ]
    slices = [
        ("device", "phone", 3_204, 0.7431, 0.7399, 0.0032, -0.0021, True),
        ("device", "desktop", 2_101, 0.7522, 0.7532, -0.0010, -0.0080, True),
        ("country", HOSTILE, 640, 0.7110, 0.7302, -0.0192, -0.0310, accepted),
        ("user", "new", 512, 0.6934, 0.6870, 0.0064, -0.0111, True),
    ]
    drifts = [
        ("tags", 0.031, 0.012, 0.081, 0.079, True),
        ("user", 0.004, 0.213, 0.0, 0.0, True),
        (HOSTILE, 0.412 if at_fault else 0.011, 0.0004, 0.31, 0.302, not at_fault),
        ("price", None, None, 0.305, 0.31, True),
    ]
    reasons = {
        "accept": ["AUC differs by +0.0031 from version 12's on the same 6,000 rows, at least -0.0005: within 0.005"],
        "reject": ["AUC differs by -0.0112 from version 12's on the same 6,000 rows, at least -0.0148: beyond 0.005"],
        "inconclusive": ["812 test samples are fewer than gate.min_samples = 1,000"],
        "not_comparable": ["version 12 cannot be compared: its field brand is not in these logs"],
    }[outcome]
    keys = {
        "checks": ("name", "value", "bound", "kept", "about"),
        "slices": ("field", "value", "samples", "auc", "champion_auc", "difference", "low", "kept"),
        "drift": ("field", "psi", "new_share", "missing_share", "missing_before", "kept"),
    }
    lines = {"checks": checks, "slices": slices, "drift": drifts}
    return {
        "accepted": accepted,
        "verdict": outcome,
        "reasons": [*reasons, f"every slice of device, country and {HOSTILE} keeps its bound"],
        "metrics": values,
        "champion": "12",
        "reference": "7",
        "inputs": "",
        "data_at_fault": at_fault,
        "intervals": intervals,
        **{name: [dict(zip(keys[name], line, strict=True)) for line in lines[name]] for name in keys},
    }


def new_rows() -> dict[str, Any]:
    """``new_rows.json`` of three days."""

    def scores(samples: int, auc: float) -> dict[str, float]:
        return {"samples": samples, "auc": auc, "logloss": 1.21 - auc, "ne": 1.6 - auc, "calibration": 1.02}

    days = {"2026-01-28": (20_114, 0.7402), "2026-01-30": (19_873, 0.7371), "2026-01-31": (20_405, 0.7355)}
    whole = scores(60_392, 0.7376)
    return {
        "version": "12",
        "samples": whole.pop("samples"),
        "metrics": whole,
        "days": {day: scores(*line) for day, line in days.items()},
        "drift": {HOSTILE: {"psi": 0.011, "new_share": 0.0004, "missing_share": 0.31, "missing_before": 0.302}},
    }
