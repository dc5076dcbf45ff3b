"""training.json: what was trained, how fast, what travelled, and which weights to evaluate.

Worker 0 writes it last; ledger sums are per worker, means over workers.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from des_core.contracts import Reference
from des_core.engine.exchange.collectives import WAYS, entry
from des_core.engine.exchange.plan import balances
from des_core.engine.training_state import TrainingState
from des_core.engine.worker import Worker


def added(sums: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Two ledgers as one."""
    return {line: sums.get(line, 0.0) + more.get(line, 0.0) for line in sums | more}


def memory_beside(worker: Worker, predicted_N: np.ndarray[Any, Any]) -> dict[str, list[float]]:
    """Memory that was predicted for each worker beside the most that it has held so far; all workers call it."""
    peers = worker.peers
    peak = torch.zeros(peers.workers, dtype=torch.float64, device=peers.device)
    peak[peers.rank] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with peers.uncounted():
        peak = peers.all_reduce({"peak": peak})["peak"]
    return {"predicted_mb": (predicted_N / 2**20).round(1).tolist(), "measured_mb": peak.tolist()}


def training_report(
    worker: Worker, at: TrainingState, best: Reference, spent: dict[str, float]
) -> dict[str, Any] | None:
    """The content of training.json on worker 0, None elsewhere; all workers call it.

    Args:
        at: where training ended.
        best: the checkpoint with the weights to evaluate.
        spent: on this worker's checkpoints (``Saver.spent``).
    """
    peers = worker.peers
    memory = memory_beside(worker, worker.need().train)
    sums = torch.tensor([*spent.values(), float(worker.read_bytes)], dtype=torch.float64, device=peers.device)
    with peers.uncounted():
        *totals, read_bytes = peers.all_reduce({"checkpoints": sums})["checkpoints"].tolist()
    checkpoints = dict(zip(spent, totals, strict=True)) | {"read_bytes": read_bytes}
    for name in ("saves", "pause_s", "write_s"):
        checkpoints[name] /= peers.workers
    if peers.rank:
        return None
    exchange = {
        line: {"kind": kind, **_per_step(at, line, WAYS), **{way: _per_step(at, line, (way,)) for way in WAYS}}
        for line, kind in worker.plan.kinds().items()
    }
    return {
        "workers": peers.workers,
        "steps": at.step - at.first_step,
        "first_step": at.first_step,
        "fresh": at.fresh,
        "samples": at.samples,
        "seconds": at.seconds,
        "samples_per_s": at.timed_samples / at.seconds if at.seconds else 0.0,
        "peak_rss_mb": max(memory["measured_mb"]),
        "memory": memory,
        "device": str(peers.device),
        "history": at.history,
        "valid": at.valid,
        "table": at.table,
        "exchange": exchange,
        "profile": worker.profile.ms_per_step(),
        "device_profile": worker.profile.on_device(),
        "plan": worker.plan.chosen | {"placement": balances(worker.dataset, worker.placement, worker.plan)},
        "checkpoint": str(best),
        "checkpoints": checkpoints,
    }


def _per_step(at: TrainingState, line: str, ways: Sequence[str]) -> dict[str, float]:
    """A line of the ledger per step, over some directions."""
    sums = {
        "predicted_bytes_per_step": at.predicted,
        "counted_bytes_per_step": at.counted,
        "ms_per_step": {key: 1000 * seconds for key, seconds in at.exchange_s.items()},
    }
    steps = max(at.step - at.first_step, 1)
    return {name: sum(of.get(entry(line, way), 0.0) for way in ways) / steps for name, of in sums.items()}
