"""Rows added up per sample and per field: all the arithmetic that is done once per lookup.

    summed_b   = sum over the lookups l of sample b of            x_l row_l        row = [w | v_1 .. v_k]
    vectors_bo = sum over the lookups l of its field o of         x_l v_l
    squares_b  = sum over the lookups l of sample b of            x_l^2 |v_l|^2

The summed w is the linear term, the summed v and squares make the pair sum of FM, and vectors are what a layer over
field vectors reads; a field without lookups is zero. Gradients go to the rows only, summed per unique row in
the order of the lookups::

    d row_u = sum over the lookups l of u of  x_l (d summed_b + [0 | d vectors_bo])
    d v_u  += 2 v_u  sum over them of  x_l^2 d squares_b

On a CPU each direction is one pass without a number per lookup in between; |v|^2 is formed once per unique row.
Elsewhere, and as the reference, it is plain torch.

Dims: L lookups, U unique rows, B samples, O fields owned here, K numbers per row, k = K - 1 factors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Array = np.ndarray[Any, np.dtype[Any]]


def pool(
    rows_UK: Tensor,
    inverse_L: Tensor,
    sample_L: Tensor,
    piece_L: Tensor,
    x_L: Tensor,
    samples: int,
    owned: int = 0,
    squares: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums ``[B, K]``, vectors ``[B, O, k]`` and squares ``[B]``, the latter ``[0]`` unless asked for.

    Args:
        rows_UK: the unique rows.
        inverse_L: which of them each lookup reads.
        sample_L: the sample it adds to, in any order.
        piece_L: its field's place among the owned ones.
        x_L: what it is multiplied by.
        samples: B.
        owned: O; 0: form no vectors.
        squares: whether to add up squares too.
    """
    compute = _Pool.apply if rows_UK.device.type == "cpu" else reference
    summed_BK, vectors_BOk, squares_B = compute(rows_UK, inverse_L, sample_L, piece_L, x_L, samples, owned, squares)
    return summed_BK, vectors_BOk, squares_B


def reference(
    rows_UK: Tensor,
    inverse_L: Tensor,
    sample_L: Tensor,
    piece_L: Tensor,
    x_L: Tensor,
    samples: int,
    owned: int,
    squares: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch."""
    scaled_LK = rows_UK.index_select(0, inverse_L) * x_L[:, None]
    v_Lk = scaled_LK[:, 1:]
    summed_BK = scaled_LK.new_zeros(samples, rows_UK.shape[1]).index_add(0, sample_L, scaled_LK)
    cells = scaled_LK.new_zeros(samples * owned, v_Lk.shape[1])
    vectors = cells.index_add(0, sample_L * owned + piece_L, v_Lk) if owned else cells
    squares_B = scaled_LK.new_zeros(samples if squares else 0)
    if squares:
        squares_B = squares_B.index_add(0, sample_L, v_Lk.square().sum(1))
    return summed_BK, vectors.view(samples, owned, v_Lk.shape[1]), squares_B


class _Pool(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_UK: Tensor,
        inverse_L: Tensor,
        sample_L: Tensor,
        piece_L: Tensor,
        x_L: Tensor,
        samples: int,
        owned: int,
        squares: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(rows_UK, inverse_L, sample_L, piece_L, x_L)
        width = rows_UK.shape[1]
        summed_BK, squares_B = rows_UK.new_zeros(samples, width), rows_UK.new_zeros(samples if squares else 0)
        vectors_BOk = rows_UK.new_zeros(samples, owned, width - 1)
        _pool_forward(*_arrays(rows_UK, inverse_L, sample_L, piece_L, x_L, summed_BK, vectors_BOk, squares_B))
        return summed_BK, vectors_BOk, squares_B

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_summed_BK: Tensor, d_vectors_BOk: Tensor, d_squares_B: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows_UK = ctx.saved_tensors[0]
        gradient_UK = rows_UK.new_zeros(rows_UK.shape)
        _pool_backward(*_arrays(*ctx.saved_tensors, d_summed_BK, d_vectors_BOk, d_squares_B, gradient_UK))
        return gradient_UK, None, None, None, None, None, None, None


def _arrays(*tensors: Tensor) -> list[Array]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


@njit(nogil=True, cache=True)
def _pool_forward(
    rows_UK: Array,
    inverse_L: Array,
    sample_L: Array,
    piece_L: Array,
    x_L: Array,
    summed_BK: Array,
    vectors_BOk: Array,
    squares_B: Array,
) -> None:
    width, by_field, squares = rows_UK.shape[1], vectors_BOk.shape[1] > 0, len(squares_B) > 0
    norms_U = np.zeros(len(rows_UK) if squares else 0, rows_UK.dtype)
    for u in range(len(norms_U)):
        for k in range(1, width):
            norms_U[u] += rows_UK[u, k] * rows_UK[u, k]
    for lookup in range(len(inverse_L)):
        u, b, o, x = inverse_L[lookup], sample_L[lookup], piece_L[lookup], x_L[lookup]
        if by_field:
            summed_BK[b, 0] += x * rows_UK[u, 0]
            for k in range(vectors_BOk.shape[2]):
                vectors_BOk[b, o, k] += x * rows_UK[u, k + 1]
        else:
            for k in range(width):
                summed_BK[b, k] += x * rows_UK[u, k]
        if squares:
            squares_B[b] += x * x * norms_U[u]
    for b in range(len(vectors_BOk)):
        for o in range(vectors_BOk.shape[1]):
            for k in range(vectors_BOk.shape[2]):
                summed_BK[b, k + 1] += vectors_BOk[b, o, k]


@njit(nogil=True, cache=True)
def _pool_backward(
    rows_UK: Array,
    inverse_L: Array,
    sample_L: Array,
    piece_L: Array,
    x_L: Array,
    d_summed_BK: Array,
    d_vectors_BOk: Array,
    d_squares_B: Array,
    gradient_UK: Array,
) -> None:
    width, by_field, squares = rows_UK.shape[1], d_vectors_BOk.shape[1] > 0, len(d_squares_B) > 0
    d_norms_U = np.zeros(len(rows_UK) if squares else 0, rows_UK.dtype)
    for lookup in range(len(inverse_L)):
        u, b, x = inverse_L[lookup], sample_L[lookup], x_L[lookup]
        gradient_K, d_summed_K = gradient_UK[u], d_summed_BK[b]
        if by_field:
            d_vector_k = d_vectors_BOk[b, piece_L[lookup]]
            gradient_K[0] += x * d_summed_K[0]
            for k in range(width - 1):
                gradient_K[k + 1] += x * (d_summed_K[k + 1] + d_vector_k[k])
        else:
            for k in range(width):
                gradient_K[k] += x * d_summed_K[k]
        if squares:
            d_norms_U[u] += (x + x) * x * d_squares_B[b]
    for u in range(len(d_norms_U)):
        for k in range(1, width):
            gradient_UK[u, k] += d_norms_U[u] * rows_UK[u, k]
