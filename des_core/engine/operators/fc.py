"""The first fully connected layer together with the embeddings under it, split by field.

    A_b = sum_f E_bf W_f        E_bf the pooled vector of field f, W_f its k x h slice of the weights

A sum over fields: each worker multiplies what it owns, h numbers per sample travel. A field cut in two
is no special case, for its pooled vectors add up too. The weights W are dense and replicated; a
worker's gradient covers the fields it owns, and the dense sum over workers completes it.
dE_bf = d_b W_f^T is local. The layer's bias, if any, is added once, after the sum.

``sum`` beats ``gather`` iff h < F k / N.
Dims: B samples, F fields, O owned here, k factors, h units; a row is [w | v].
"""

from __future__ import annotations

from torch import Tensor, nn

from des_core.engine.operators import Shard, no_rest


class FullyConnected(nn.Module):
    """``activation``-free first layer over the concatenated field vectors.

    Args:
        fields: fields of the model, F.
        factors: numbers per embedding, k.
        units: width of the layer, h.
        bias: false under batch norm, where a bias has no gradient but rounding noise.
    """

    rest = 0

    def __init__(self, fields: int, factors: int, units: int, bias: bool) -> None:
        super().__init__()
        self.width = units
        self.reads = slice(1, factors + 1)
        layer = nn.Linear(fields * factors, units, bias)
        self.weight_Fkh = nn.Parameter(layer.weight.detach().T.contiguous().view(fields, factors, units))
        self.bias_h = nn.Parameter(layer.bias.detach().clone()) if bias else None

    def partial(self, shard: Shard) -> Tensor:
        slices_Okh = self.weight_Fkh.index_select(0, shard.fields_O)
        return shard.pooled_BOK[:, :, 1:].flatten(1) @ slices_Okh.flatten(0, 1)

    def partial_rest(self, shard: Shard) -> Tensor:
        return no_rest(shard)

    def collect(self, pooled_BFk: Tensor, rest_BR: Tensor) -> Tensor:
        return pooled_BFk.flatten(1) @ self.weight_Fkh.flatten(0, 1)

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, h] -> [B, h]``"""
        return total_BP if self.bias_h is None else total_BP + self.bias_h


def reference(pooled_BFk: Tensor, weight_Fkh: Tensor) -> Tensor:
    """The dense layer ``[B, h]``, without bias."""
    return pooled_BFk.flatten(1) @ weight_Fkh.flatten(0, 1)
