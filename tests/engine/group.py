"""Worker processes that live for a test session: one group per N, cases are sent to it.

As a program it is one worker: it reads a case as a JSON line, does it, and answers with a JSON line.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LIMIT_S = 120
ALIKE_S = 2
"""Time for the others to fail as the first one did."""


class Group:
    """N worker processes under one rendezvous."""

    def __init__(self, workers: int) -> None:
        self.broken = False
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = os.environ | {
            "WORLD_SIZE": str(workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # Only cases that ask for the Triton kernels import Triton.
            "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1",
        }
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.engine.group"],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(workers)
        ]

    def do(self, case: str, **arguments: Any) -> list[Any]:
        """Run a case on all workers; their answers by rank."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"case": case, **arguments}) + "\n")
            process.stdin.flush()
        waiting = {process.stdout.fileno(): rank for rank, process in enumerate(self._processes) if process.stdout}
        answers: dict[int, Any] = {}
        faults: list[str] = []
        died = False
        while waiting:
            # A worker that fails alone leaves its peers in a collective: its fault is the answer of all.
            ready, _, _ = select.select(list(waiting), [], [], ALIKE_S if faults else LIMIT_S)
            if not ready:
                break
            for handle in ready:
                rank = waiting.pop(handle)
                line = self._processes[rank].stdout.readline()  # type: ignore[union-attr]
                died |= not line
                answers[rank] = json.loads(line) if line else {"fault": f"test worker {rank} died"}
                faults += [answers[rank]["fault"]] if "fault" in answers[rank] else []
        # Workers that all stopped for the same reason stopped at the same point, and can go on.
        alike = len({fault.strip().splitlines()[-1] for fault in faults}) <= 1 and len(faults) in (0, len(answers))
        self.broken = bool(waiting) or died or not alike
        if faults or waiting:
            raise AssertionError(faults[0] if faults else f"workers {sorted(waiting.values())} are stuck")
        return [answers[rank]["result"] for rank in sorted(answers)]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def _serve() -> None:
    import torch

    from des_core.engine.exchange.collectives import Collectives
    from tests.engine.cases import CASES

    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    peers = Collectives(torch.device("cpu"))
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            with open(os.devnull, "w") as quiet:
                sys.stdout = quiet
                answer = {"result": CASES[arguments.pop("case")](peers, **arguments)}
        except Exception:
            answer = {"fault": traceback.format_exc()}
        peers.ledger.clear()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
