"""Where a step's time goes: seconds by phase, on this worker.

``read``, ``decode`` and ``index`` are the next batches' and run in threads beside the step, under the others; ``stall``
is what training waited for them. ``exchange`` is all time inside collectives, so partial and backward are without it.

On a device the host only starts the work. Where a profile is asked for, events are recorded there at the ends of each
phase and read when they have passed, some steps later, so that nothing waits for them; the launches and
synchronisations of a few steps are counted by torch's profiler.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from des_core.contracts import PHASES, PREFETCH
from des_core.run import PROFILE

WATCHED = range(5, 9)
"""Steps whose launches are counted."""
COPIED = 1 << 28
"""Bytes of the copy that measures the device's bandwidth."""


class Mark(Protocol):
    """A point in the work of a device."""

    def passed(self) -> bool:
        """Whether the device is beyond it, without a wait."""

    def since(self, before: Mark) -> float:
        """Seconds from an earlier one to it; waits until it has passed."""


class Clock(Protocol):
    """What a device tells of its work."""

    def mark(self) -> Mark:
        """A point after all that was started."""

    def watch(self) -> Callable[[], tuple[int, int]]:
        """Begins to count; the call ends it: kernel launches and synchronisations in between."""

    def copy_bytes_per_s(self) -> float:
        """Bytes per second that a copy reads and writes."""


class CudaMark:
    """An event on the present stream."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def passed(self) -> bool:
        """Whether the device is beyond it."""
        return bool(self._event.query())

    def since(self, before: Mark) -> float:
        """Seconds from an earlier one."""
        assert isinstance(before, CudaMark)
        self._event.synchronize()
        return float(before._event.elapsed_time(self._event)) / 1000


class CudaClock:
    """A GPU."""

    mark = CudaMark

    def watch(self) -> Callable[[], tuple[int, int]]:
        """Counts by torch's profiler."""
        from torch.profiler import ProfilerActivity, profile

        trace = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        trace.start()

        def end() -> tuple[int, int]:
            trace.stop()
            counts = {event.key: event.count for event in trace.key_averages()}
            launches = sum(n for key, n in counts.items() if "LaunchKernel" in key or "GraphLaunch" in key)
            return launches, sum(n for key, n in counts.items() if "Synchronize" in key)

        return end

    def copy_bytes_per_s(self) -> float:
        """Bytes per second that a copy reads and writes."""
        one = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
        other, took = torch.empty_like(one), []
        for _ in range(5):
            start = CudaMark()
            other.copy_(one)
            took.append(CudaMark().since(start))
        return 2 * COPIED / statistics.median(took)


@dataclass(frozen=True)
class Marked:
    """A phase on the device, within another or not."""

    name: str
    within: str | None
    start: Mark
    stop: Mark


class Profile:
    """Seconds by phase since the first step that counts.

    Args:
        device: where phases run.
        exchanged: seconds spent inside collectives so far, on the host.
        clock: of the device; None: a GPU's where a profile is asked for, else none.
    """

    def __init__(self, device: torch.device, exchanged: Callable[[], float], clock: Clock | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._exchanged = exchanged
        if clock is None and os.environ.get(PROFILE) and device.type == "cuda":
            clock = CudaClock()
        self._clock, self._marked, self._open = clock, list[Marked](), list[str]()
        self._watch: Callable[[], tuple[int, int]] | None = None
        self._launches: tuple[float, float] | None = None
        self._bytes: Tensor | None = None

    @property
    def detailed(self) -> bool:
        """Whether the device is asked where its time goes."""
        return self._clock is not None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time; that of a phase within another is not the other's."""
        if self._clock is None or name in PREFETCH:
            start, before = time.perf_counter(), self._exchanged()
            yield
            within = 0.0 if name in PREFETCH else self._exchanged() - before
            self.seconds[name] += time.perf_counter() - start - within
            self.seconds["exchange"] += within
            return
        mark, outer = self._clock.mark(), self._open[-1] if self._open else None
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()
        self._marked.append(Marked(name, outer, mark, self._clock.mark()))

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Count a collective on the device; on the host its time is known without."""
        if self._clock is None or not self._open:
            yield
            return
        with self.phase("exchange"):
            yield

    def add(self, name: str, seconds: float) -> None:
        """Count time measured elsewhere."""
        self.seconds[name] += seconds

    def count(self, least_bytes: Callable[[], Tensor]) -> None:
        """Add to the bytes that steps must move, a number on the device, where a profile is asked for."""
        if self._clock is not None:
            self._bytes = least_bytes() if self._bytes is None else self._bytes + least_bytes()

    def end_step(self) -> None:
        """Count a step, and read what has passed by now."""
        self.steps += 1
        while self._marked and self._marked[0].stop.passed():
            self._read(self._marked.pop(0))
        if self._clock is not None and self.steps == WATCHED.start:
            self._watch = self._clock.watch()
        elif self._watch is not None and self.steps == WATCHED.stop:
            self._launches = tuple(n / len(WATCHED) for n in self._watch())  # type: ignore[assignment]
            self._watch = None

    def restart(self) -> None:
        """Forget what was counted, a process's first step, which compiles."""
        self._settle()
        self.seconds.clear()
        self.steps, self._bytes = 0, None

    def ms_per_step(self) -> dict[str, float]:
        """Milliseconds of a step by phase."""
        self._settle()
        return {name: 1000 * self.seconds[name] / max(self.steps, 1) for name in PHASES}

    def on_device(self) -> dict[str, Any] | None:
        """Launches and synchronisations of a step, the bytes of rows and sums that it must move, and a copy's speed;
        None without a profile of a device."""
        if self._clock is None:
            return None
        launches, synchronisations = self._launches or (None, None)
        moved = None if self._bytes is None else float(self._bytes) / max(self.steps, 1)
        return {
            "launches": launches,
            "synchronisations": synchronisations,
            "least_bytes": moved,
            "copy_bytes_per_s": self._clock.copy_bytes_per_s(),
        }

    def _settle(self) -> None:
        for marked in self._marked:
            self._read(marked)
        self._marked.clear()

    def _read(self, marked: Marked) -> None:
        seconds = marked.stop.since(marked.start)
        self.seconds[marked.name] += seconds
        if marked.within is not None:
            self.seconds[marked.within] -= seconds
