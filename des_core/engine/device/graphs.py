"""A piece of work on the device, captured once for each shape of its inputs and replayed from then on.

A CUDA graph starts all kernels of a step at the cost of one launch. It holds addresses, not tensors: inputs are copied
into tensors of its own, and where anything else that it reads has moved, a table that grew, it is thrown away. The
work runs plainly a few times first, for kernels are compiled and libraries make room then. While it is captured, no
kernel runs; nothing that the host does in it is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

WARM = 3
"""Plain runs of a shape, with everything in its place, before it is captured."""
MOST = 8
"""Shapes that are captured; more run plainly."""

Inputs = tuple[Tensor | None, ...]
Work = Callable[[Inputs], tuple[Tensor, ...]]


class Recorder(Protocol):
    """Records work on a device."""

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """A call that does the work, on the same tensors each time; nothing is done now."""


class CudaRecorder:
    """Records CUDA graphs, whose memory is one pool: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        """A call that replays the work."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on: they copy the next batches to the device.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay


@dataclass
class _Shape:
    addresses: Hashable
    seen: int = 0
    inputs: Inputs = ()
    replay: Callable[[], tuple[Tensor, ...]] | None = None


@dataclass
class Replays:
    """Runs work plainly or by a replay; without a recorder always plainly."""

    recorder: Recorder | None
    replayed: int = 0
    """Runs by a replay so far."""
    _shapes: dict[Hashable, _Shape] = field(default_factory=dict)

    def run(self, shape: Hashable, addresses: Hashable, inputs: Inputs, work: Work) -> tuple[Tensor, ...]:
        """What the work returns; the next run of the shape writes over it.

        Args:
            shape: all that the work depends on beside the numbers in tensors.
            addresses: of what it reads and writes beside its inputs.
        """
        if self.recorder is None:
            return work(inputs)
        held = self._shapes.get(shape)
        if held is None or held.addresses != addresses:
            if held is None and len(self._shapes) == MOST:
                return work(inputs)
            # The old graph's memory is free before a new one is made.
            held = self._shapes[shape] = _Shape(addresses)
        held.seen += 1
        if held.seen <= WARM:
            return work(inputs)
        if held.replay is None:
            held.inputs = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
            own = held.inputs
            held.replay = self.recorder.capture(lambda: work(own))
        else:
            for mine, tensor in zip(held.inputs, inputs, strict=True):
                if mine is not None and tensor is not None:
                    mine.copy_(tensor, non_blocking=True)
        self.replayed += 1
        return held.replay()

    def forget(self) -> None:
        """Throw all captured work away, as after weights were loaded."""
        self._shapes.clear()
