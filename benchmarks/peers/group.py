"""A system's processes as the driver sees them: started once per case, idle unless told to work."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.case import Case
from benchmarks.peers.links import Links
from benchmarks.peers.systems import workers_of

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 1800.0


class GroupError(Exception):
    """A process of a system failed; the message is its traceback."""


class Group:
    """The processes of one system, each on its own link.

    Args:
        name: of the system.
        case, folder: what it trains, and the store of it.
        links: the network of the case.
    """

    def __init__(self, name: str, case: Case, folder: Path, links: Links) -> None:
        self.name, self.workers = name, workers_of(name, case)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), str(ROOT)]))
        common = (
            os.environ
            | threads
            | {
                "PYTHONPATH": path,
                "WORLD_SIZE": str(self.workers),
                "MASTER_ADDR": links.address,
                "MASTER_PORT": str(_free_port()),
                **links.environment,
            }
        )
        self._complaints = [tempfile.TemporaryFile() for _ in range(self.workers)]  # noqa: SIM115
        self._processes = [
            subprocess.Popen(
                [*links.prefix(rank), sys.executable, "-m", "benchmarks.peers.worker", name, str(folder), str(case)],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints[rank],
                text=True,
            )
            for rank in range(self.workers)
        ]

    def ready(self) -> None:
        """Wait until all processes are built."""
        self._answers()

    def do(self, what: str, **arguments: Any) -> list[Any]:
        """All workers do the same; their answers by rank."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            process.stdin.flush()
        return self._answers()

    def close(self) -> None:
        """End all processes, in peace if they let us."""
        if not self._processes:
            return
        try:
            self.do("close")
        except (GroupError, OSError):
            for process in self._processes:
                process.kill()
        for process in self._processes:
            process.communicate()
        for file in self._complaints:
            file.close()
        self._processes = []

    def _answers(self) -> list[Any]:
        """One line of each process, whichever comes first: one that fails leaves the others waiting for it."""
        waiting = {process.stdout.fileno(): rank for rank, process in enumerate(self._processes) if process.stdout}
        answers: dict[int, Any] = {}
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], LIMIT_S)
            if not ready:
                raise GroupError(f"{self.name}: workers {sorted(waiting.values())} have not answered in {LIMIT_S:g} s")
            for handle in ready:
                rank = waiting.pop(handle)
                line = self._processes[rank].stdout.readline()  # type: ignore[union-attr]
                answer = json.loads(line) if line else {"fault": self._last_words(rank)}
                if "fault" in answer:
                    raise GroupError(f"{self.name}, worker {rank}: {answer['fault']}")
                answers[rank] = answer["result"]
        return [answers[rank] for rank in sorted(answers)]

    def _last_words(self, rank: int) -> str:
        complaints = self._complaints[rank]
        complaints.seek(0)
        return complaints.read().decode(errors="replace")[-2000:]


def _free_port() -> int:
    """A port that is free, as is the one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
