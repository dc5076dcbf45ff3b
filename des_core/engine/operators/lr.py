"""Logistic regression's linear term, split by feature.

    y_b = sum_j w_j x_bj        (the model adds the bias once, after the sum)

One number per sample travels. Gradient of owned rows, local: dw_j = sum_b g_b x_bj.
Dims: B samples, L lookups, F fields, K numbers per row of which column 0 is w.
"""

from __future__ import annotations

from torch import Tensor

from des_core.engine.operators import Shard, no_rest


class Linear:
    """Sum of the looked-up weights."""

    width = 1
    reads = slice(0, 1)
    rest = 0

    def partial(self, shard: Shard) -> Tensor:
        return shard.per_sample(shard.scaled_LK[:, 0])[:, None]

    def partial_rest(self, shard: Shard) -> Tensor:
        return no_rest(shard)

    def collect(self, pooled_BFk: Tensor, rest_BR: Tensor) -> Tensor:
        return pooled_BFk.sum(1)

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, 1] -> [B]``"""
        return total_BP[:, 0]


def reference(x_BN: Tensor, w_N: Tensor) -> Tensor:
    """The dense layer ``[B]`` over all N features."""
    return x_BN @ w_N
