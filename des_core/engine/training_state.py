"""The state of the training loop, as a checkpoint keeps it, and the search for the checkpoint to resume from."""

from __future__ import annotations

import os
from typing import Any

from des_core import log, storage
from des_core.checkpoint import manifest as manifests
from des_core.contracts import Record, Reference
from des_core.engine.worker import Worker
from des_core.errors import CheckpointError, DesError
from des_core.run import Run

MEASURED = {"timed_samples", "seconds", "exchange_s", "table"}
"""Of ``TrainingState``, what a clock decides, or a thread's pace: the tables' curve may know the next batch already."""


class TrainingState(Record):
    """The whole state of the training loop."""

    step: int = 0
    first_step: int = 0
    """Steps that the champion had made which this run goes on from."""
    fresh: list[str] = []
    """What starts fresh where all else comes from the champion."""
    epoch: int = 0
    cursor: int = 0
    """Samples of the present epoch already trained."""
    rate_scale: float = 1.0
    best: float | None = None
    """Best valid metric of an epoch's end, larger is better."""
    best_step: int | None = None
    """Step of the checkpoint at that epoch's end."""
    worse_epochs: int = 0
    done: bool = False
    samples: int = 0
    timed_samples: int = 0
    seconds: float = 0.0
    window: list[float] = []
    """Losses since the last point of the curve, as a checkpoint keeps them."""
    history: list[dict[str, float]] = []
    valid: list[dict[str, Any]] = []
    table: list[dict[str, float]] = []
    days: list[tuple[int, int]] = []
    """Days begun, since 1970, and their first steps."""
    decays: list[tuple[int, float]] = []
    """Decoupled decay of rows, and the steps from which it holds."""
    plan: dict[str, Any] = {}
    """Number of workers, and what they chose."""
    evicted: int = 0
    admitted: int = 0
    predicted: dict[str, float] = {}
    """Bytes per worker since the first step, by ledger line and direction; likewise below."""
    counted: dict[str, float] = {}
    exchange_s: dict[str, float] = {}


def find_checkpoint(run: Run, worker: Worker) -> Reference:
    """The newest checkpoint of this run, else the one furthest on its way.

    Raises:
        CheckpointError: none; where only others are there, how the newest of them differs.
    """
    own = manifests.last(run.checkpoints)
    if own is not None:
        return own
    root = storage.join(run.config.storage.root, "checkpoints")
    found: list[tuple[int, Reference]] = []
    other: Reference | None = None
    for name in storage.list_folder(root):
        try:
            reference = manifests.last(storage.join(root, name))
            if reference is None:
                continue
            manifest = manifests.read(reference)
        except DesError as error:
            # A neighbour's: this run does without it.
            if int(os.environ.get("RANK", "0")) == 0:
                log.emit("skipped", checkpoint=storage.join(root, name), why=" ".join(str(error).split())[:200])
            continue
        step, limit = manifest.trainer["step"], run.config.train.max_steps
        if manifest.trajectory == run.trajectory and (not limit or step <= limit) and not manifest.trainer["done"]:
            found.append((step, reference))
        other = reference
    if found:
        return max(found, key=lambda pair: pair[0])[1]
    if other is not None:
        manifests.read(other, worker.shape)
    raise CheckpointError(f"no checkpoint of this config and data under {root}; train without --resume")
