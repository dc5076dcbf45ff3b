"""Cross network, first version, split by field: one exchange whatever the depth.

    x_{l+1} = x_0 (x_l . w_l) + b_l + x_l

Every layer stays on a line: x_l = a_l x_0 + B_l with B_l = b_0 + .. + b_{l-1}. So only the scalars x_0 . w_l
are global; they are sums over fields, and one exchange carries them all:

    x_l . w_l = a_l (x_0 . w_l) + B_l . w_l,      a_{l+1} = a_l + x_l . w_l,      a_0 = 1

What follows is linear in x_L, a weight w_out (parallel, 1 number) or a fully connected layer W_out
(stacked, h numbers): x_L W_out = a_L (x_0 W_out) + B_L W_out. L + 1 or L + h numbers per sample travel.

Source: Wang et al., "Deep & Cross Network for Ad Click Predictions", ADKDD 2017.
Dims: B samples, F fields, k factors, M dense inputs, D = F k + M, L layers, h outputs, P = L + h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from des_core.engine.operators import Operator, Projection, Shard, x0_of


class CrossNetwork(Operator):
    """Crosses of bounded degree, and the linear layer on top of them.

    Args:
        fields, factors, inputs: F, k and M.
        layers: cross layers, L.
        outputs: width of the linear layer on top, h; no bias.
        offset: whether B_L W_out is added; false under batch norm, where a constant has no gradient but
            rounding noise.
    """

    def __init__(self, fields: int, factors: int, inputs: int, layers: int, outputs: int, offset: bool = True) -> None:
        super().__init__()
        self._layers, self._offset = layers, offset
        self.width = layers + outputs
        self.first = Projection(fields, factors, inputs, self.width)
        self.bias_LD = nn.Parameter(torch.zeros(layers, fields * factors + inputs))

    def partial(self, shard: Shard) -> Tensor:
        return x0_of(shard.vectors_BOk, shard.inputs_BM) @ self.first.owned(shard.fields_O)

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        return x0_of(vectors_BFk, inputs_BM) @ self.first.weight_DP

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, L + h] -> [B, h]``"""
        offsets_LD = self.bias_LD.cumsum(0)
        shift_LP = offsets_LD @ self.first.weight_DP
        a_B = torch.ones_like(total_BP[:, 0])
        for layer in range(self._layers):
            x_w_B = a_B * total_BP[:, layer]
            a_B = a_B + (x_w_B + shift_LP[layer - 1, layer] if layer else x_w_B)
        scaled_Bh = a_B[:, None] * total_BP[:, self._layers :]
        return scaled_Bh + shift_LP[-1, self._layers :] if self._offset else scaled_Bh


def reference(x0_BD: Tensor, weight_LD: Tensor, bias_LD: Tensor, out_Dh: Tensor) -> Tensor:
    """The network ``[B, h]`` as published, layer by layer."""
    x_BD = x0_BD
    for w_D, b_D in zip(weight_LD, bias_LD, strict=True):
        x_BD = x0_BD * (x_BD @ w_D)[:, None] + b_D + x_BD
    return x_BD @ out_Dh
