"""What a job on a cluster is to leave behind, and its log as this step shows and keeps it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from components.launch.progress import Progress
from components.launch.roles import LEAVING
from des_core import log, storage


@dataclass(frozen=True)
class Outcome:
    """What a job is to leave behind."""

    finished: Callable[[], bool]
    """Whether it is all there."""
    result: str
    """Address of the file that is written last."""
    log: str
    """Address of the log that this step keeps."""
    pointer: str = ""
    """Address of the record of the newest checkpoint, from which another attempt goes on; empty: it begins anew."""
    memory_from: str = "cluster.memory"
    """Which key sets the memory of its pods."""


class JobLog:
    """The log lines of the pod that reports progress: shown as they arrive, and kept beside the results."""

    def __init__(self, outcome: Outcome, progress: Progress) -> None:
        self.outcome, self._progress = outcome, progress
        self.path = outcome.log
        self.step = 0
        self.left_at = 0.0
        """When worker 0 said that all is done, by the monotonic clock; 0: it has not said so."""
        self.lines: list[str] = []

    def add_line(self, line: str) -> None:
        """Take one line."""
        self.lines.append(line)
        event = log.parse_event(line.strip())
        if event.get("event") == LEAVING:
            self.left_at = self.left_at or time.monotonic()
        elif event:
            self.step = int(event["step"]) if event["event"] in ("step", "resume") else self.step
            self._progress.show(event)
        elif not sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)

    def keep(self) -> None:
        """Write the log, whole."""
        if self.lines:
            storage.write_bytes(self.path, ("\n".join(self.lines) + "\n").encode())

    @property
    def where(self) -> str:
        """Where the failure happened and what to do next, for the end of an error message."""
        resumable = bool(self.outcome.pointer) and storage.exists(self.outcome.pointer)
        hint = "the next attempt goes on from the last checkpoint" if resumable else "start it again"
        return f"{f'at step {self.step}; ' if self.step or self.outcome.pointer else ''}see {self.path}; {hint}"
