"""The first layers of two deep parts over the same inputs, each with a gate on every input, split by field.

    A_s = (x_0 * g_s) W_s,      g_s = 2 sigmoid(U_s relu(z_s) + d_s),      z_s = context_s V_s + c_s    s = 1, 2

The context is the vectors of some fields, as the user's for the first stream and the item's for the second. z_s is a
sum over the context's fields, q numbers that all workers need (an all-reduce each way); then each worker has the gates
of its own columns of x_0, and its part of A_s is linear in its share of x_0, so a field cut in two is no special case.
Without context U_s and z_s are left out: the gate is d_s, learned, and the same for all samples. h_1 + h_2 numbers
travel home.

Source: Mao et al., "FinalMLP: An Enhanced Two-Stream MLP Model for CTR Prediction", AAAI 2023.
Dims: B samples, F fields, O owned here, M dense inputs, k factors, D = F k + M, C columns of x_0, q units of a gate,
h units of a first layer, P = h_1 + h_2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from des_core.engine.operators import Operator, Projection, Shard, x0_of


class Context(nn.Module):
    """The gate's weights that a context of some fields needs."""

    place_Q: Tensor

    def __init__(self, fields: int, factors: int, inputs: int, context: Sequence[int], units: int) -> None:
        super().__init__()
        self.register_buffer("place_Q", torch.tensor(context), persistent=False)
        self.down = Projection(len(context), factors, 0, units)
        self.bias_q = nn.Parameter(torch.zeros(units))
        self.up = Projection(fields, factors, inputs, units)

    def down_of(self, fields_O: Tensor, fields: int) -> Tensor:
        """The weights under owned fields ``[O k, q]``, zero where a field is not of the context."""
        weight_Qkq = self.down.weight_FkP
        whole_Fkq = weight_Qkq.new_zeros(fields, *weight_Qkq.shape[1:]).index_copy(0, self.place_Q, weight_Qkq)
        return whole_Fkq.index_select(0, fields_O).flatten(0, 1)


class GatedStreams(Operator):
    """Both first layers.

    Args:
        fields, factors, inputs: F, k and M.
        units: widths of the two layers, h_1 and h_2.
        contexts: per stream the numbers of the fields that its gate reads.
        gate_units: width of a gate's hidden layer, q.
        bias: false under batch norm, where a bias has no gradient but rounding noise.
        line: name in the ledger of what is summed inside.
    """

    def __init__(
        self,
        fields: int,
        factors: int,
        inputs: int,
        units: tuple[int, int],
        contexts: Sequence[Sequence[int]],
        gate_units: int,
        bias: bool,
        line: str,
    ) -> None:
        super().__init__()
        self.width, self._fields, self._line = sum(units), fields, line
        self.first = nn.ModuleList(Projection(fields, factors, inputs, width) for width in units)
        self.bias_P = nn.Parameter(torch.zeros(self.width)) if bias else None
        self.shift = nn.ModuleList(Projection(fields, factors, inputs, 1) for _ in units)
        for shift in self.shift.parameters():
            nn.init.zeros_(shift)
        self.context = nn.ModuleList(
            Context(fields, factors, inputs, context, gate_units) if context else nn.Identity() for context in contexts
        )
        with_context = sum(bool(context) for context in contexts)
        self.inner = (with_context * gate_units,) if with_context else ()

    def partial(self, shard: Shard) -> Tensor:
        x0 = x0_of(shard.vectors_BOk, shard.inputs_BM)
        return self._gated(
            shard.vectors_BOk, x0, shard.fields_O, lambda weight: weight.owned(shard.fields_O), shard.total
        )

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        everything = torch.arange(self._fields, device=vectors_BFk.device)
        x0 = x0_of(vectors_BFk, inputs_BM)
        return self._gated(vectors_BFk, x0, everything, lambda weight: weight.weight_DP, lambda line, part: part)

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, P] -> [B, P]``, the first stream's columns, then the second's."""
        return total_BP if self.bias_P is None else total_BP + self.bias_P

    def _gated(
        self,
        vectors_BOk: Tensor,
        x0_BC: Tensor,
        fields_O: Tensor,
        slice_of: Callable[[Any], Tensor],
        total: Callable[[str, Tensor], Tensor],
    ) -> Tensor:
        """Both layers' sums [B, P] over the C columns of x_0 that ``slice_of`` takes of a weight's D."""
        contexts = [context for context in self.context if isinstance(context, Context)]
        sums: list[Tensor] = []
        if contexts:
            flat = vectors_BOk.flatten(1)
            parts = [flat @ context.down_of(fields_O, self._fields) for context in contexts]
            sums = list(total(self._line, torch.cat(parts, 1)).chunk(len(parts), 1))
        outputs = []
        for first, shift, context in zip(self.first, self.shift, self.context, strict=True):
            gate = slice_of(shift)[:, 0]
            if isinstance(context, Context):
                gate = gate + torch.relu(sums.pop(0) + context.bias_q) @ slice_of(context.up).T
            outputs.append((x0_BC * (2 * torch.sigmoid(gate))) @ slice_of(first))
        return torch.cat(outputs, 1)


def reference(x0_BD: Tensor, gates: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Both layers ``[B, P]``, from gates before their sigmoid and weights [D, h]."""
    return torch.cat([(x0_BD * 2 / (1 + torch.exp(-g))) @ w for g, w in zip(gates, weights, strict=True)], 1)
