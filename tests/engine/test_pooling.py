"""Pooling is the sum of each sample's and each field's rows, and its gradient that of the sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from des_core.engine.weights.pooling import pool, reference

SAMPLES, OWNED, UNIQUE = 5, 3, 7


def lookups(count: int, width: int, index: torch.dtype = torch.int64) -> tuple[Tensor, ...]:
    """Rows, inverse, samples, fields and x: in any order, several lookups in one field, the last sample empty."""
    draw = torch.Generator().manual_seed(count + width)
    rows_UK = torch.randn(UNIQUE if count else 0, width, generator=draw, dtype=torch.float64).requires_grad_()
    places = [torch.randint(0, most, (count,), generator=draw, dtype=index) for most in (UNIQUE, SAMPLES - 1, OWNED)]
    return rows_UK, *places, torch.randn(count, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("wanted", [(0, False), (0, True), (OWNED, False), (OWNED, True)])
@pytest.mark.parametrize("width", [1, 4, 17])
@pytest.mark.parametrize("count", [0, 1, 60])
def test_value_and_gradient_are_torchs(count: int, width: int, wanted: tuple[int, bool], index: torch.dtype) -> None:
    rows_UK, *where = lookups(count, width, index)
    answers: list[Any] = []
    for compute in (pool, reference):
        outputs = compute(rows_UK, *where, SAMPLES, *wanted)
        rows_UK.grad = None
        # Different for each number, and the same for both.
        sum((output.flatten() @ torch.arange(output.numel()).double().cos()) for output in outputs).backward()
        answers.append((*outputs, rows_UK.grad))
    for actual, expected in zip(*answers, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    summed_BK, vectors_BOk, squares_B = answers[0][:3]
    assert summed_BK.shape == (SAMPLES, width) and vectors_BOk.shape == (SAMPLES, wanted[0], width - 1)
    assert len(squares_B) == (SAMPLES if wanted[1] else 0)


def test_each_sample_and_field_is_its_own_sum() -> None:
    rows_UK, inverse_L, sample_L, piece_L, x_L = lookups(60, 4)
    summed_BK, vectors_BOk, squares_B = pool(rows_UK, inverse_L, sample_L, piece_L, x_L, SAMPLES, OWNED, True)
    for b in range(SAMPLES):
        mine = [i for i in range(60) if sample_L[i] == b]
        scaled = torch.stack([x_L[i] * rows_UK[inverse_L[i]] for i in mine] or [torch.zeros(4, dtype=torch.float64)])
        torch.testing.assert_close(summed_BK[b], scaled.sum(0))
        torch.testing.assert_close(squares_B[b], scaled[:, 1:].square().sum())
        for o in range(OWNED):
            expected = sum(x_L[i] * rows_UK[inverse_L[i], 1:] for i in mine if piece_L[i] == o)
            torch.testing.assert_close(vectors_BOk[b, o], expected + torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("wanted", [(0, True), (OWNED, False), (OWNED, True)])
def test_gradient_is_the_finite_difference(wanted: tuple[int, bool]) -> None:
    rows_UK, *where = lookups(25, 4)
    assert torch.autograd.gradcheck(
        lambda rows: tuple(out for out in pool(rows, *where, SAMPLES, *wanted) if out.numel()), rows_UK
    )


def test_only_one_output_may_be_read() -> None:
    rows_UK, *where = lookups(25, 4)
    for read in range(3):
        (expected,) = torch.autograd.grad(reference(rows_UK, *where, SAMPLES, OWNED, True)[read].sum(), rows_UK)
        # The gradient of sum() is one number seen everywhere: not contiguous.
        (actual,) = torch.autograd.grad(pool(rows_UK, *where, SAMPLES, OWNED, True)[read].sum(), rows_UK)
        torch.testing.assert_close(actual, expected)


def test_gradients_are_added_in_the_order_of_the_lookups() -> None:
    """One is lost beside a number large enough, and is not if it comes after what cancels it."""
    rows_UK, none = torch.zeros(1, 1, requires_grad=True), torch.zeros(3, dtype=torch.int64)
    summed_BK, _, _ = pool(rows_UK, none, torch.arange(3), none, torch.tensor([1.0, 1e8, -1e8]), 3)
    summed_BK.sum().backward()
    assert rows_UK.grad is not None and rows_UK.grad.item() == 0.0


def test_there_is_no_second_derivative() -> None:
    rows_UK, *where = lookups(25, 4)
    summed_BK, _, _ = pool(rows_UK, *where, SAMPLES)
    (gradient_UK,) = torch.autograd.grad(summed_BK.square().sum(), rows_UK, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient_UK.sum().backward()


@pytest.mark.gpu
def test_on_a_gpu_is_on_a_cpu() -> None:
    arguments = lookups(60, 4)
    expected = pool(*arguments, SAMPLES, OWNED, True)
    actual = pool(*(tensor.detach().cuda() for tensor in arguments), SAMPLES, OWNED, True)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu(), e.detach())
