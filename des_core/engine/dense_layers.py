"""The upper network's layers, which run at each sample's home.

Batch norm is over the *global* batch: one small sum over workers forward, one backward per layer
(the backward of a sum that every worker's loss reads *is* a sum). The layer under it has no bias.
Dropout draws from a generator per (seed, step, layer, lane); lanes are fixed pieces of the batch,
so the same units drop whatever the number of workers.

Dims: B samples at home, h units, J lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from des_core.data.read.hashing import splitmix64


@dataclass(frozen=True)
class Home:
    """The slice of the global batch whose head runs here."""

    start: int
    stop: int
    samples: int
    """Size of the global batch."""
    step: int = 0
    seed: int = 0
    lanes: int = 1
    training: bool = False
    total: Callable[[Tensor], Tensor] = lambda part: part
    """Sum over workers, with a gradient that is a sum over workers."""
    inputs_BM: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """Dense inputs of the slice."""


def lane_edges(samples: int, lanes: int) -> list[int]:
    """Where lanes begin, and the batch's end."""
    return [lane * samples // lanes for lane in range(lanes + 1)]


def counter_seed(*counters: int) -> int:
    """A generator's seed, 63 bits, mixed from counters."""
    mixed = 0
    for counter in counters:
        mixed = int(splitmix64(np.uint64(mixed ^ counter)))
    return mixed >> 1


class GlobalBatchNorm(nn.Module):
    """Batch norm whose statistics are the global batch's; ``[B, h] -> [B, h]``."""

    mean_h: Tensor
    variance_h: Tensor

    def __init__(self, units: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.gamma_h = nn.Parameter(torch.ones(units))
        self.beta_h = nn.Parameter(torch.zeros(units))
        self.register_buffer("mean_h", torch.zeros(units))
        self.register_buffer("variance_h", torch.ones(units))
        self._momentum, self._eps = momentum, eps

    def forward(self, x_Bh: Tensor, home: Home) -> Tensor:
        mean_h, variance_h = self.mean_h, self.variance_h
        # One sample has no variance: its step uses the running statistics.
        if home.training and home.samples > 1:
            # Sums run on x less the running mean: squares of small numbers lose nothing to cancellation.
            shifted_Bh = x_Bh - self.mean_h
            sums_2h = home.total(torch.cat([shifted_Bh.sum(0), shifted_Bh.square().sum(0)]))
            offset_h, square_h = (sums_2h / home.samples).chunk(2)
            mean_h = self.mean_h + offset_h
            variance_h = (square_h - offset_h.square()).clamp(min=0)
            self._track(mean_h, variance_h * (home.samples / (home.samples - 1)))
        return (x_Bh - mean_h) / torch.sqrt(variance_h + self._eps) * self.gamma_h + self.beta_h

    @torch.no_grad()
    def _track(self, mean_h: Tensor, variance_h: Tensor) -> None:
        # In their place, because a captured step knows them by their addresses.
        self.mean_h.lerp_(mean_h, self._momentum)
        self.variance_h.lerp_(variance_h, self._momentum)


class LaneDropout(nn.Module):
    """Dropout that does not depend on the number of workers; ``[B, h] -> [B, h]``."""

    def __init__(self, layer: int, share: float) -> None:
        super().__init__()
        self._layer, self.share = layer, share

    def forward(self, x_Bh: Tensor, home: Home) -> Tensor:
        if not home.training or not self.share:
            return x_Bh
        edges = lane_edges(home.samples, home.lanes)
        keep = [
            self._draw(home, lane, edges[lane + 1] - edges[lane], x_Bh.shape[1])[
                max(home.start - edges[lane], 0) : home.stop - edges[lane]
            ]
            for lane in range(home.lanes)
            if edges[lane] < home.stop and edges[lane + 1] > home.start
        ]
        if not keep:
            return x_Bh
        return x_Bh * torch.cat(keep).to(x_Bh) / (1 - self.share)

    def _draw(self, home: Home, lane: int, samples: int, units: int) -> Tensor:
        generator = torch.Generator()
        generator.manual_seed(counter_seed(home.seed, home.step, self._layer, lane))
        return torch.rand(samples, units, generator=generator) >= self.share


class Tower(nn.Module):
    """The rest of a deep part, after the first layer's sum: ``[B, h_1] -> [B]``.

    Per hidden layer batch norm if asked for, ReLU, dropout; then one output unit without bias, for
    the model adds one bias to the sum of its parts.

    Args:
        inputs: numbers that come in, where the first layer too runs at home; 0: its sum comes in.
        dropouts: layers of other towers of the model whose dropout draws by these numbers already.
    """

    def __init__(
        self, hidden: tuple[int, ...], dropout: float, batch_norm: bool, inputs: int = 0, dropouts: int = 0
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden[0], bias=not batch_norm) if inputs else nn.Identity()
        self.norms = nn.ModuleList(GlobalBatchNorm(units) if batch_norm else nn.Identity() for units in hidden)
        self.dropouts = nn.ModuleList(LaneDropout(dropouts + layer, dropout) for layer in range(len(hidden)))
        self.layers = nn.ModuleList(
            nn.Linear(below, above, bias=not batch_norm) for below, above in zip(hidden, hidden[1:], strict=False)
        )
        self.output = nn.Linear(hidden[-1], 1, bias=False)
        self._batch_norm = batch_norm

    def forward(self, x_Bh: Tensor, home: Home) -> Tensor:
        out_B: Tensor = self.output(self.last_hidden(x_Bh, home)).squeeze(1)
        return out_B

    def last_hidden(self, x_Bh: Tensor, home: Home) -> Tensor:
        """What the output unit reads, ``[B, h]`` of the last layer."""
        x_Bh = self.first(x_Bh)
        for number, dropout in enumerate(self.dropouts):
            if number:
                x_Bh = self.layers[number - 1](x_Bh)
            if self._batch_norm:
                x_Bh = self.norms[number](x_Bh, home)
            x_Bh = dropout(torch.relu(x_Bh), home)
        return x_Bh
