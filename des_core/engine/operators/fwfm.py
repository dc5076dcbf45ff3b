"""Field-weighted factorization machine: every pair of fields has a strength of its own.

    y_b = sum_n w_n x_bn + sum_{f<g} r_fg <E_bf, E_bg>        E_bf the pooled vector of field f

The linear term is a sum over features and travels as one number. The pairs are no sum over fields: all
field vectors of a sample must be in one place. Values of one field do not interact with each other.

Source: Pan et al., "Field-weighted Factorization Machines for Click-Through Rate Prediction", WWW 2018.
Dims: B samples, N features, F fields, k factors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from des_core.engine.operators import Operator, Shard


class FieldWeightedMachine(Operator):
    """Pairwise interactions of fields, weighted by pair, and the linear term.

    Args:
        fields: fields of the model, F.
    """

    kinds = ("gather",)
    width = 2
    rest = 1
    linear = True

    def __init__(self, fields: int) -> None:
        super().__init__()
        self.strength_FF = nn.Parameter(torch.ones(fields, fields).triu(1))

    def partial_rest(self, shard: Shard) -> Tensor:
        return shard.linear_B[:, None]

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        others_BFk = self.strength_FF.triu(1) @ vectors_BFk
        return torch.cat([rest_BR, (others_BFk * vectors_BFk).sum((1, 2))[:, None]], 1)

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, 2] -> [B]``"""
        return total_BP.sum(1)


def reference(x_BN: Tensor, w_N: Tensor, v_Nk: Tensor, strength_NN: Tensor) -> Tensor:
    """The sum ``[B]`` term by term, one feature per field."""
    y_B = x_BN @ w_N
    for n in range(x_BN.shape[1]):
        for m in range(n + 1, x_BN.shape[1]):
            y_B = y_B + strength_NN[n, m] * x_BN[:, n] * x_BN[:, m] * (v_Nk[n] @ v_Nk[m])
    return y_B
