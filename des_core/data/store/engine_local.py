"""Tasks in processes of this machine, each with one thread: as many as there are CPUs, and memory for.

A single item, or all of them where there is room for one process, is run in the calling one. Processes are spawned when
they are needed, take one item after the other, and end with the one that began them, however that ends.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import pyarrow as pa

from des_core import cpus, processes
from des_core.data.store.tasks import Outcome, Run, attempt

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")

PROCESS_BYTES = 1 << 30
"""Memory of a process: a run or a file is sorted in it, and compiled code and buffers are beside."""


class _Worker:
    """One process, and the item that it is at."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs,), daemon=True)
        before = {name: os.environ.get(name) for name in _THREADS}
        os.environ |= dict.fromkeys(_THREADS, "1")
        try:
            self.process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()

    def end(self) -> str:
        """Kill it; returns how it had ended by itself."""
        self.process.join(0.2)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"


@contextmanager
def tasks() -> Iterator[Run]:
    """The engine."""
    workers: list[_Worker] = []

    def run(call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
        count = min(cpus.cpu_quota(), int(processes.memory_bytes() // PROCESS_BYTES), len(items))
        if count < 2:
            yield from ((place, attempt(call, item)) for place, item in enumerate(items))
            return
        while len(workers) < count:
            workers.append(_Worker())
        yield from _shared_out(workers, call, items)

    try:
        yield run
    finally:
        for worker in workers:
            worker.end()


def _shared_out(
    workers: list[_Worker], call: Callable[[Any], Any], items: Sequence[Any]
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes as they come; a worker that dies loses its item and gets a successor."""
    at: dict[_Worker, int] = {}
    waiting = list(enumerate(items))[::-1]
    try:
        while waiting or at:
            for worker in [worker for worker in workers if worker not in at][: len(waiting)]:
                place, item = waiting.pop()
                at[worker] = place
                try:
                    worker.pipe.send((call, item))
                except OSError:
                    # It died while it had nothing to do: its end of the pipe says so again below.
                    continue
            pipes = {worker.pipe: worker for worker in at}
            for pipe in wait(list(pipes)):
                worker = pipes[pipe]  # type: ignore[index]
                place = at.pop(worker)
                try:
                    yield place, worker.pipe.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    why = worker.end()
                    workers.append(_Worker())
                    yield place, Outcome(lost=why)
    finally:
        # Nobody waits for what is still being done.
        for worker in at:
            workers.remove(worker)
            worker.end()


def _work(pipe: Connection) -> None:
    """What a process does, until its pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pa.set_cpu_count(1)
    pa.set_io_thread_count(2)
    while True:
        try:
            call, item = pipe.recv()
        except EOFError:
            return
        try:
            outcome = attempt(call, item)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            outcome = Outcome(code="failed", message=f"{item}: {type(error).__name__}: {error}")
        pipe.send(outcome)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
