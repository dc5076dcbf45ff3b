"""What leads from a model version back to all that made it: tags, the commit of our own code, its environment.

config, git commit, image, data manifests, parent, seed, verdict     tags of the version (here)
environment.txt, config.json, inputs.json                            artifacts, their digests in tags
report.json (plan, ledger, table), gate.json (bounds, intervals)     artifacts, their numbers also as metrics
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import des_core
from des_core import storage
from des_core.contracts import Record
from des_core.run import Run
from des_core.verdict import Verdict

LONGEST_TAG = 5_000
"""Characters that every MLflow server takes in a tag; a longer config is an artifact only."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def tags(run: Run, verdict: Verdict, report: dict[str, Any]) -> dict[str, str]:
    """What leads from a version back to all that made it."""
    config = run.config.recorded.model_dump_json()
    found = {
        "des.run_key": run.key,
        "des.config_digest": run.config.digest,
        "des.config": config if len(config) <= LONGEST_TAG else "see the artifact config.json",
        "des.dataset": str(run.dataset),
        "des.git_commit": code_version(),
        "des.code_version": des_core.__version__,
        "des.code_digest": code_digest(),
        "des.image": os.environ.get("DES_IMAGE", ""),
        "des.environment": hashlib.sha256(environment().encode()).hexdigest(),
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
            "des.days": _listed(f"{day}={sha256}" for day, sha256 in sorted(run.day.days.items())),
            "des.left_out": ",".join(run.day.left_out),
            "des.parent_version": run.day.champion,
        }
    return {key: value for key, value in found.items() if value} | {
        f"des.{name}": f"{value:.6g}" for name, value in numbers(report, "test").items()
    }


class Link(Record):
    """One version of a chain, read from its tags; empty where they are missing."""

    version: str
    aliases: tuple[str, ...]
    as_of: str
    trained_through: str
    parent_version: str
    verdict: str
    test_auc: float | None
    test_rmse: float | None
    dataset: str
    """Reference of the data manifest."""
    days: dict[str, str]
    """Days of the window, each with the sha256 of its part's manifest."""
    left_out: str
    run_key: str
    config_digest: str
    seed: str
    git_commit: str
    image: str
    environment: str
    checkpoint: str
    mlflow_run: str
    """Whose artifacts hold the config, the report, the gate's bounds and environment.txt."""


def link(version: str, aliases: tuple[str, ...], mlflow_run: str, tags: Mapping[str, str]) -> Link:
    """A version's place in the chain, from its tags."""
    known: dict[str, Any] = {name: tags.get(f"des.{name}", "") for name in Link.model_fields}
    for name in ("test_auc", "test_rmse"):
        known[name] = float(known[name]) if known[name] else None
    known["days"] = dict(day.split("=", 1) for day in known["days"].split(",") if "=" in day)
    return Link(**known | {"version": version, "aliases": aliases, "mlflow_run": mlflow_run})


def _listed(entries: Iterable[str]) -> str:
    text = ",".join(entries)
    return text if len(text) <= LONGEST_TAG else "see the artifact inputs.json"


@cache
def environment() -> str:
    """``name==version`` of every installed package, one a line."""
    found = {f"{package.name}=={package.version}" for package in metadata.distributions()}
    return "\n".join(sorted(found, key=str.lower)) + "\n"


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
    """The git commit of our own checkout, ``+changes`` where it has some; elsewhere DES_REVISION or the version."""
    if os.environ.get("DES_REVISION"):
        return os.environ["DES_REVISION"]
    home = Path(des_core.__file__).resolve().parent.parent
    if (home / ".git").exists():
        try:
            commit = _git(home, "rev-parse", "HEAD")
            return commit + ("+changes" if _git(home, "status", "--porcelain", "--untracked-files=no") else "")
        except (OSError, subprocess.SubprocessError):
            # No git program, or a checkout without a commit: the version says what there is to say.
            return des_core.__version__
    return des_core.__version__


@cache
def code_digest() -> str:
    """sha256 over the names and digests of this package's source files: which code a model needs to be served by."""
    home = Path(des_core.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(home.rglob("*.py")):
        digest.update(f"{path.relative_to(home)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _git(home: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(home), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
