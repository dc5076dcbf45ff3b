"""Where a step's time goes: seconds by phase, on this worker.

``read``, ``decode`` and ``index`` are the next batch's and run in the prefetch thread, under the others; ``stall`` is
what training waited for it. ``exchange`` is all time inside collectives, so partial and backward are without it.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from des_core.contracts import PHASES, PREFETCH
from des_core.run import PROFILE


class Profile:
    """Seconds by phase since the first step that counts.

    Args:
        device: where phases run.
        exchanged: seconds spent inside collectives so far.
    """

    def __init__(self, device: torch.device, exchanged: Callable[[], float]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._exchanged = exchanged
        # Waiting for the device at a phase's end makes its time its own, and the step slower.
        self._wait = bool(os.environ.get(PROFILE)) and device.type == "cuda"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time."""
        start, before = time.perf_counter(), self._exchanged()
        yield
        if self._wait:
            torch.cuda.synchronize()
        within = 0.0 if name in PREFETCH else self._exchanged() - before
        self.seconds[name] += time.perf_counter() - start - within
        self.seconds["exchange"] += within

    def add(self, name: str, seconds: float) -> None:
        """Count time measured elsewhere."""
        self.seconds[name] += seconds

    def restart(self) -> None:
        """Forget what was counted, a process's first step, which compiles."""
        self.seconds.clear()
        self.steps = 0

    def ms_per_step(self) -> dict[str, float]:
        """Milliseconds of a step by phase."""
        return {name: 1000 * self.seconds[name] / max(self.steps, 1) for name in PHASES}
