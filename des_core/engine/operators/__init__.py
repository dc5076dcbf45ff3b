"""An operator is a weights-rich layer, cut so that only sums cross the network.

It is two methods and neither knows that workers exist: ``partial`` adds up what is owned here, and
the sum of all partials through ``finish`` is exactly the layer. Where the pooled field vectors of a
sample are brought home instead (exchange ``gather``), ``collect`` computes the same total from them.

Dims: B samples of the global batch (of the home slice after the exchange), L lookups, U unique rows,
F fields of the model, O fields owned here, k factors, K = 1 + k numbers per row, P numbers of a partial.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The lookups of one batch that a worker owns, and the rows they read.

    ``rows_UK`` is the leaf whose gradient, summed per unique row over the whole batch, is applied once.
    """

    rows_UK: Tensor
    inverse_L: Tensor
    sample_L: Tensor
    piece_L: Tensor
    x_L: Tensor
    samples: int
    fields_O: Tensor
    """Numbers of the fields owned here."""

    @cached_property
    def scaled_LK(self) -> Tensor:
        """Every lookup's row times its x."""
        return self.rows_UK.index_select(0, self.inverse_L) * self.x_L[:, None]

    @cached_property
    def pooled_BOK(self) -> Tensor:
        """Rows added up per sample and owned field; a field's absent values add nothing."""
        owned = len(self.fields_O)
        cells = self.scaled_LK.new_zeros(self.samples * owned, self.rows_UK.shape[1])
        cells = cells.index_add(0, self.sample_L * owned + self.piece_L, self.scaled_LK)
        return cells.view(self.samples, owned, self.rows_UK.shape[1])

    def per_sample(self, numbers_L: Tensor) -> Tensor:
        """Numbers of lookups added up per sample: ``[L] -> [B]``."""
        return numbers_L.new_zeros(self.samples).index_add(0, self.sample_L, numbers_L)


@runtime_checkable
class Operator(Protocol):
    """A weights-rich layer; a torch module if it has dense weights of its own."""

    width: int
    """Numbers per sample of a partial result, P."""
    reads: slice
    """Columns of a row that ``gather`` brings home, pooled per field."""
    rest: int
    """Numbers per sample that still travel as a sum with ``gather``."""

    def partial(self, shard: Shard) -> Tensor:
        """Sum over the lookups owned here: ``[B, P]``."""

    def partial_rest(self, shard: Shard) -> Tensor:
        """What pooled field vectors cannot tell, summed over the lookups owned here: ``[B, rest]``."""

    def collect(self, pooled_BFk: Tensor, rest_BR: Tensor) -> Tensor:
        """The total, from all pooled field vectors of the home samples: ``[B, P]``."""

    def finish(self, total_BP: Tensor) -> Tensor:
        """The layer's output from the sum of all partials."""


def no_rest(shard: Shard) -> Tensor:
    """An empty remainder ``[B, 0]``."""
    return torch.zeros(shard.samples, 0, device=shard.x_L.device, dtype=shard.x_L.dtype)
