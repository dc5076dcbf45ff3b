"""One process of one system: told on stdin what to do, one line of JSON each, it answers on stdout.

    python -m benchmarks.peers.worker NAME FOLDER CASE

The clock is the machine's, so that a block's time is from the first worker's start to the last one's end. CPU time is
the process's own, all threads. Bytes are those that its network interface sent. Peak memory counts from when the data
and the empty system are in memory.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.peers.case import Case
from benchmarks.peers.systems import System, build


def train(system: System, first: int, count: int) -> dict[str, float]:
    """When ``count`` steps began and ended, and the CPU seconds that this process spent."""
    cpu, start = time.process_time(), time.perf_counter()
    system.train(first, count)
    stop = time.perf_counter()
    return {"start": start, "stop": stop, "cpu_s": time.process_time() - cpu}


def score(system: System) -> list[float]:
    """Logits of batch 0's home slice."""
    logits: list[float] = system.score().tolist()
    return logits


def facts(system: System) -> dict[str, Any]:
    """What the system tells of itself, and peak memory in bytes where the kernel tells it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [1024 * float(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    return system.facts() | {"peak_bytes": peaks[0] if peaks else math.nan}


def sent(system: System) -> float:
    """Bytes sent so far through DES_PEERS_INTERFACE, by anyone in this process's network namespace; nan: unknown."""
    name = os.environ["DES_PEERS_INTERFACE"]
    table = Path("/proc/self/net/dev")
    lines = table.read_text().splitlines() if name and table.exists() else []
    for line in lines:
        interface, _, counts = line.partition(":")
        if interface.strip() == name:
            return float(counts.split()[8])
    return math.nan


def _forget_peak() -> None:
    """Give back what building left, and let the kernel's peak begin here."""
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def fill(system: Any) -> None:
    """Make all rows of DES live."""
    system.fill()


DO = {"fill": fill, "train": train, "score": score, "facts": facts, "sent": sent}


def serve(name: str, folder: Path, case: Case, answers: Any) -> None:
    """Build the system, then do as told until stdin ends."""
    torch.set_num_threads(1)
    try:
        system = build(name, case, folder, int(os.environ["RANK"]))
        _forget_peak()
        print(json.dumps({"result": None}), file=answers, flush=True)
        for line in sys.stdin:
            arguments = json.loads(line)
            what = arguments.pop("do")
            if what == "close":
                system.close()
                print(json.dumps({"result": None}), file=answers, flush=True)
                return
            print(json.dumps({"result": DO[what](system, **arguments)}), file=answers, flush=True)
    except Exception:
        print(json.dumps({"fault": traceback.format_exc()}), file=answers, flush=True)


if __name__ == "__main__":
    # Libraries print; answers keep the real stdout to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.argv[1], Path(sys.argv[2]), Case.parse(sys.argv[3]), answers)
