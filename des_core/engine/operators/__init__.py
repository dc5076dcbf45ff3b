"""An operator is a weights-rich layer, cut so that only sums cross the network.

It is a few methods and none knows that workers exist. ``partial`` adds up what is owned here, and the sum
of all partials through ``finish`` is exactly the layer. Where the pooled field vectors of a sample are
brought home instead (exchanges ``gather`` and ``rows``), ``collect`` computes the same total from them;
layers that are no sum over features, such as attention, know only that way.

Dense inputs, numbers without rows, are owned by the home of their sample: elsewhere they are zero, so
they are one more thing that ``partial`` adds up, and nothing of them travels but their share of the sum.

Dims: B samples of the global batch (of the home slice after the exchange), L lookups, U unique rows,
F fields of the model, O fields owned here, M dense inputs, D = F k + M, k factors, K = 1 + k numbers per row,
P numbers of a total.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from des_core.engine.weights.pooling import pool


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
    """Numbers of the fields owned here whose vectors are read."""
    inputs_BM: Tensor
    """Dense inputs of the samples whose home is here, zero elsewhere."""
    total: Callable[[str, Tensor], Tensor] = lambda line, part: part
    """Sum over workers of something all of them need inside a partial, booked under ``line``; its gradient too."""
    by_field: bool = True
    """Whether ``vectors_BOk`` are read."""
    squares: bool = True
    """Whether ``squares_B`` is read."""
    wide: int = 0
    """Fields owned here, after those of ``fields_O``, of which only the linear weight is read: their factors are 0."""

    @cached_property
    def _pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        places = (self.inverse_L, self.sample_L, self.piece_L, self.x_L)
        pieces = len(self.fields_O) + self.wide
        return pool(self.rows_UK, *places, self.samples, pieces if self.by_field else 0, self.squares)

    @property
    def linear_B(self) -> Tensor:
        """x times the linear weight, over all lookups of a sample."""
        return self._pooled[0][:, 0]

    @property
    def sums_Bk(self) -> Tensor:
        """x times the factors, over all lookups of a sample."""
        return self._pooled[0][:, 1:]

    @property
    def vectors_BOk(self) -> Tensor:
        """x times the factors, added up per sample and owned field; a field's absent values add nothing."""
        return self._pooled[1][:, : len(self.fields_O)] if self.wide else self._pooled[1]

    @property
    def squares_B(self) -> Tensor:
        """|x v|^2, over all lookups of a sample."""
        return self._pooled[2]


class Operator(nn.Module):
    """A weights-rich layer."""

    kinds: tuple[str, ...] = ("sum", "gather")
    """How its total can form: partials that add up, or from all pooled field vectors; the first is the default."""
    width: int
    """Numbers per sample of a total, P."""
    rest: int = 0
    """Numbers per sample that still travel as a sum with ``gather``."""
    inner: tuple[int, ...] = ()
    """Numbers per sample of each sum over all workers inside ``partial``."""
    linear: bool = False
    """Whether it reads the rows' linear weight."""
    by_field: bool = True
    """Whether its partial reads field vectors."""
    squares: bool = False
    """Whether it reads the squares of lookups."""

    def partial(self, shard: Shard) -> Tensor:
        """Sum over the lookups owned here: ``[B, P]``."""
        raise NotImplementedError

    def partial_rest(self, shard: Shard) -> Tensor:
        """The part of the total that pooled field vectors lack, over the lookups owned here: ``[B, rest]``."""
        return torch.zeros(shard.samples, 0, device=shard.x_L.device, dtype=shard.rows_UK.dtype)

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        """The total of home samples from all their field vectors and dense inputs: ``[B, P]``."""
        raise NotImplementedError

    def finish(self, total_BP: Tensor) -> Tensor:
        """The layer's output from the sum of all partials."""
        return total_BP


def totals_alone(operators: Mapping[str, Operator], shard: Shard) -> dict[str, Tensor]:
    """Every operator's total [B, P] where one worker owns all lookups, or has been brought them."""
    return {
        name: op.partial(shard)
        if "sum" in op.kinds
        else op.collect(shard.vectors_BOk, shard.inputs_BM, op.partial_rest(shard))
        for name, op in operators.items()
    }


class Projection(nn.Module):
    """x_0 W for x_0 = [field vectors | dense inputs], of which a worker owns some.

    The weights are dense and replicated; a worker's gradient covers what it owns, and the dense sum over
    workers completes it.
    """

    def __init__(self, fields: int, factors: int, inputs: int, outputs: int) -> None:
        super().__init__()
        weight_DP = nn.Linear(fields * factors + inputs, outputs, bias=False).weight.detach().T
        self.weight_FkP = nn.Parameter(
            weight_DP[: fields * factors].clone(memory_format=torch.contiguous_format).view(fields, factors, outputs)
        )
        self.weight_MP = nn.Parameter(weight_DP[fields * factors :].contiguous()) if inputs else None

    @property
    def weight_DP(self) -> Tensor:
        """All weights in the order of x_0."""
        flat = self.weight_FkP.flatten(0, 1)
        return flat if self.weight_MP is None else torch.cat([flat, self.weight_MP])

    def owned(self, fields_O: Tensor) -> Tensor:
        """The weights of owned fields and of dense inputs: ``[O k + M, P]``."""
        # Owning all of them needs no copy.
        weight = self.weight_FkP
        owned = weight if len(fields_O) == len(weight) else weight.index_select(0, fields_O)
        flat = owned.flatten(0, 1)
        return flat if self.weight_MP is None else torch.cat([flat, self.weight_MP])


def x0_of(vectors_BOk: Tensor, inputs_BM: Tensor) -> Tensor:
    """[field vectors | dense inputs] of each sample: ``[B, O k + M]``."""
    return torch.cat([vectors_BOk.flatten(1), inputs_BM], 1) if inputs_BM.shape[1] else vectors_BOk.flatten(1)
