"""What leads from a model version back to all that made it: tags, and the commit of our own code."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import des_core
from des_core import storage
from des_core.release.gate import Verdict
from des_core.run import Run

LONGEST_TAG = 5_000
"""Characters that every MLflow server takes in a tag; a longer config is an artifact only."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def tags(run: Run, verdict: Verdict, report: dict[str, Any]) -> dict[str, str]:
    """What leads from a version back to all that made it."""
    config = run.config.model_dump_json()
    found = {
        "des.run_key": run.key,
        "des.config_digest": run.config.digest,
        "des.config": config if len(config) <= LONGEST_TAG else "see the artifact config.json",
        "des.dataset": str(run.dataset),
        "des.git_commit": code_version(),
        "des.seed": str(run.config.run.seed),
        "des.verdict": verdict.verdict,
        "des.reasons": "; ".join(verdict.reasons)[:LONGEST_TAG],
    }
    if storage.exists(run.path("training.json")):
        checkpoint = storage.read_json(run.path("training.json"))["checkpoint"]
        found["des.checkpoint"] = checkpoint.removeprefix(run.config.storage.root.rstrip("/") + "/")
    if run.day is not None:
        found |= {
            "des.trained_through": iso_time(run.day.cut),
            "des.as_of": run.day.as_of,
            "des.left_out": ",".join(run.day.left_out),
            "des.parent_version": run.day.champion,
        }
    return {key: value for key, value in found.items() if value} | {
        f"des.{name}": f"{value:.6g}" for name, value in numbers(report, "test").items()
    }


def iso_time(micros: int) -> str:
    """Microseconds since 1970 UTC as ISO 8601 in UTC, like 2026-01-31T21:36:00.000000+00:00."""
    return (EPOCH + timedelta(microseconds=micros)).isoformat(timespec="microseconds")


def micros(text: str) -> int:
    """Microseconds since 1970 UTC of a time that ``iso_time`` wrote.

    Raises:
        ValueError: it is none.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} names no zone")
    return (moment - EPOCH) // timedelta(microseconds=1)


def numbers(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """The metrics that there are, by name with a prefix."""
    names = ("samples", "auc", "logloss", "ne", "calibration", "gauc", "rmse", "mae")
    return {f"{prefix}_{name}": float(metrics[name]) for name in names if metrics.get(name) is not None}


def code_version() -> str:
    """The git commit: of the image, of our own checkout (``+changes`` where it has some); or the package's version."""
    if revision := os.environ.get("DES_REVISION"):
        return revision
    home = Path(des_core.__file__).resolve().parent.parent
    if (home / ".git").exists():
        try:
            commit = _git(home, "rev-parse", "HEAD")
            return commit + ("+changes" if _git(home, "status", "--porcelain", "--untracked-files=no") else "")
        except (OSError, subprocess.SubprocessError):
            # No git program, or a checkout without a commit: the version says what there is to say.
            return des_core.__version__
    return des_core.__version__


def _git(home: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
