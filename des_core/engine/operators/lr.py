"""Logistic regression's linear term, split by feature.

    y_b = sum_j w_j x_bj        (the model adds the bias once, after the sum)

One number per sample travels; no pooled vector would tell it cheaper. Gradient of owned rows, local:
dw_j = sum_b g_b x_bj. Dims: B samples, j features.
"""

from __future__ import annotations

from torch import Tensor

from des_core.engine.operators import Operator, Shard


class Linear(Operator):
    """Sum of the looked-up weights."""

    kinds = ("sum",)
    width = 1
    linear = True
    by_field = False

    def partial(self, shard: Shard) -> Tensor:
        return shard.linear_B[:, None]

    def finish(self, total_BP: Tensor) -> Tensor:
        """``[B, 1] -> [B]``"""
        return total_BP[:, 0]


def reference(x_BN: Tensor, w_N: Tensor) -> Tensor:
    """The dense layer ``[B]`` over all N features."""
    return x_BN @ w_N
