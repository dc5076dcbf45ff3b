"""The first fully connected layer together with the embeddings under it, split by field.

    A_b = sum_f E_bf W_f        E_bf the pooled vector of field f, W_f its k x h slice of the weights

A sum over fields (dense inputs count as one more): each worker multiplies what it owns, h numbers per
sample travel. A field cut in two is no special case, for its pooled vectors add up too.
dE_bf = d_b W_f^T is local. The layer's bias, if any, is added once, after the sum.

``sum`` beats ``gather`` iff h < F k / N.
Dims: B samples, F fields, O owned here, M dense inputs, D = F k + M, k factors, h units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from des_core.engine.operators import Operator, Projection, Shard, x0_of


class FullyConnected(Operator):
    """``activation``-free first layer over the concatenated field vectors and dense inputs.

    Args:
        fields: fields of the model, F.
        factors: numbers per embedding, k.
        inputs: dense inputs, M.
        units: width of the layer, h.
        bias: false under batch norm, where a bias has no gradient but rounding noise.
    """

    def __init__(self, fields: int, factors: int, inputs: int, units: int, bias: bool) -> None:
        super().__init__()
        self.width = units
        self.first = Projection(fields, factors, inputs, units)
        bound = (fields * factors + inputs) ** -0.5
        self.bias_h = nn.Parameter(torch.empty(units).uniform_(-bound, bound)) if bias else None

    def partial(self, shard: Shard) -> Tensor:
        return x0_of(shard.vectors_BOk, shard.inputs_BM) @ self.first.owned(shard.fields_O)

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        return x0_of(vectors_BFk, inputs_BM) @ self.first.weight_DP

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, h] -> [B, h]``"""
        return total_BP if self.bias_h is None else total_BP + self.bias_h


def reference(x0_BD: Tensor, weight_Dh: Tensor) -> Tensor:
    """The dense layer ``[B, h]``, without bias."""
    return x0_BD @ weight_Dh
