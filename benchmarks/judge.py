"""How many scores does a worker judge in a second, and in how much memory?

    python benchmarks/judge.py --rows 20000000 --workers 2

Each worker draws its share of two models' scores, with as many ties as float32 has, labels, and groups of 20 rows, and
judges them as an evaluation does: AUC, log loss, normalised entropy and calibration with their intervals by groups,
GAUC, the ROC curve, calibration bins, the score histogram, and the paired difference of both models. Prints key=value
for each part and in all: seconds, rows per second and worker, rows per second of its CPU time, and how much the
worker's memory grew beyond its columns.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging.clusters import group_ids
from des_core.engine.judging.measure import Judge, Rows
from des_core.engine.judging.quantiles import histogram
from des_core.log import format_event

GROUP_ROWS = 20


def main() -> None:
    """Start the workers, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000, help="over all workers (default 20,000,000)")
    parser.add_argument("--workers", type=int, default=2)
    wanted = parser.parse_args()
    if "RANK" in os.environ:
        _judge(wanted.rows)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(wanted.workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, *sys.argv]
    workers = [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in range(wanted.workers)
    ]
    sys.exit(max(worker.wait() for worker in workers))


def _judge(rows: int) -> None:
    """One worker."""
    torch.set_num_threads(1)
    peers = Collectives(torch.device("cpu"))
    random = np.random.default_rng(peers.rank)
    start, stop = (rank * rows // peers.workers for rank in (peers.rank, peers.rank + 1))
    many = stop - start
    logits = random.normal(-2, 1, many).astype(np.float32)
    labels = (random.random(many, np.float32) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    ours, theirs = (_scores(random, logits, noise) for noise in (0.5, 0.6))
    here = Rows(labels, np.arange(start, stop), group_ids(random.integers(0, rows // GROUP_ROWS, many)))
    del logits
    peers.barrier()
    before, cpu = _peak_mb(), time.process_time()
    seconds: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        peers.barrier()
        seconds[name] = time.perf_counter() - began

    judge = Judge(peers, "click")
    with part("ranks"):
        model = judge.model(here, ours, points=200)
    assert model.wins is not None
    with part("metrics"):
        metrics = judge.metrics(here, model, grouped=True)
    with part("intervals"):
        judge.intervals(here, model)
    with part("bins"):
        judge.calibration_bins(here, model)
        histogram(peers, ours, model.wins.order_B, labels > 0.5)
    del model
    with part("compared"):
        judge.compared(here, ours, theirs, points=200)
    whole, cpu = sum(seconds.values()), time.process_time() - cpu
    columns_mb = sum(each.nbytes for each in (labels, ours, theirs, here.positions, here.groups)) / 1e6
    numbers = {f"{name}_s": round(each, 2) for name, each in seconds.items()}
    print(
        format_event(
            "judge",
            worker=peers.rank,
            workers=peers.workers,
            rows=rows,
            auc=metrics["auc"],
            **numbers,
            seconds=round(whole, 2),
            rows_per_s_and_worker=round(many / whole),
            rows_per_cpu_s=round(many / cpu),
            columns_mb=round(columns_mb),
            grown_mb=_peak_mb() - before,
            peak_rss_mb=_peak_mb(),
        ),
        flush=True,
    )
    peers.close()


def _scores(random: np.random.Generator, logits: np.ndarray, noise: float) -> np.ndarray:
    """Probabilities as a float32 model gives them."""
    noisy = logits + random.normal(0, noise, len(logits)).astype(np.float32)
    return (1 / (1 + np.exp(-noisy))).astype(np.float64)


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
