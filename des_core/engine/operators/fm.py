"""Second-order factorization machine with its linear term, split by feature.

    y_b = sum_n w_n x_bn + 1/2 sum_k [ (sum_n x_bn v_nk)^2 - sum_n (x_bn v_nk)^2 ]

All inner sums run over features, so workers add up their own: S = sum_n x_n v_n (k numbers) and
c = sum_n (w_n x_n - 1/2 |v_n|^2 x_n^2). After the sum y = c + 1/2 |S|^2: k + 1 numbers per sample
travel, whatever the table's size. dS = g S is formed at home from the global S, so
dv_n = sum_b g_b x_bn (S_b - x_bn v_n) is local.

Where pooled field vectors are at home anyway, S is their sum and only c travels.

Source: Rendle, "Factorization Machines", ICDM 2010.
Dims: B samples, N features, L lookups, F fields, k factors; a row is [w | v].
"""

from __future__ import annotations

import torch
from torch import Tensor

from des_core.engine.operators import Operator, Shard


class FactorizationMachine(Operator):
    """Pairwise interactions of all looked-up values, and their linear term.

    Args:
        factors: numbers per embedding, k.
    """

    rest = 1
    linear = True
    by_field = False
    squares = True

    def __init__(self, factors: int) -> None:
        super().__init__()
        self.width = factors + 1

    def partial(self, shard: Shard) -> Tensor:
        return torch.cat([self.partial_rest(shard), shard.sums_Bk], 1)

    def partial_rest(self, shard: Shard) -> Tensor:
        return torch.add(shard.linear_B, shard.squares_B, alpha=-0.5)[:, None]

    def collect(self, vectors_BFk: Tensor, inputs_BM: Tensor, rest_BR: Tensor) -> Tensor:
        return torch.cat([rest_BR, vectors_BFk.sum(1)], 1)

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, 1 + k] -> [B]``"""
        rest_B1, sums_Bk = total_BP.split([1, total_BP.shape[1] - 1], 1)
        return torch.add(rest_B1.squeeze(1), sums_Bk.square().sum(1), alpha=0.5)


def reference(x_BN: Tensor, w_N: Tensor, v_Nk: Tensor) -> Tensor:
    """The pairwise sum ``[B]`` term by term: slow, and obviously right."""
    y_B = x_BN @ w_N
    for n in range(x_BN.shape[1]):
        for m in range(n + 1, x_BN.shape[1]):
            y_B = y_B + x_BN[:, n] * x_BN[:, m] * (v_Nk[n] @ v_Nk[m])
    return y_B
