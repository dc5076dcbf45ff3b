"""Row rules are torch's own on the rows touched, and rows not touched keep value and state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from des_core.config import OptimizerConfig
from des_core.engine.optimizer import dense_optimizer, state_width, update_rows

ROWS, WIDTH, STEPS = 12, 5, 15


def ours(config: OptimizerConfig, start: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    rows, state = start.clone(), torch.zeros(ROWS, state_width(config.name, WIDTH), dtype=start.dtype)
    for step, (touched, gradient) in enumerate(batches, 1):
        rate = config.learning_rate
        rows[touched], state[touched] = update_rows(config, rows[touched], gradient, state[touched], step, rate)
    return rows


def batches(all_rows: bool) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    chosen = [torch.randperm(ROWS, generator=generator)[: ROWS if all_rows else 4] for _ in range(STEPS)]
    return [(rows, torch.randn(len(rows), WIDTH, generator=generator, dtype=torch.float64)) for rows in chosen]


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_all_rows_touched_is_torchs_dense_rule(name: str, l2: float) -> None:
    decay = 0.2 if name == "adamw" else 0.0
    if name == "adamw" and l2:
        l2 = 0.0
    # torch's dense Adam scales eps by the bias correction, SparseAdam and ours do not: eps is negligible here.
    config = OptimizerConfig(name=name, learning_rate=0.05, l2=l2, weight_decay=decay, eps=1e-15)
    start = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = torch.nn.Parameter(start.clone())
    rule = dense_optimizer(config, [expected])
    for touched, gradient in batches(all_rows=True):
        expected.grad = torch.zeros_like(expected)
        expected.grad[touched] = gradient
        rule.step()
    torch.testing.assert_close(ours(config, start, batches(True)), expected.detach(), rtol=1e-9, atol=1e-9)


def test_adam_on_some_rows_is_sparse_adam() -> None:
    config = OptimizerConfig(name="adam", learning_rate=0.05)
    start = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = torch.nn.Parameter(start.clone())
    rule = torch.optim.SparseAdam([expected], lr=0.05)
    for touched, gradient in batches(all_rows=False):
        with torch.sparse.check_sparse_tensor_invariants():
            expected.grad = torch.sparse_coo_tensor(touched[None], gradient, (ROWS, WIDTH)).coalesce()
        rule.step()
    torch.testing.assert_close(ours(config, start, batches(False)), expected.detach(), rtol=1e-12, atol=1e-12)


def test_rowwise_adagrad_scales_weight_and_factors_by_their_own_mean_square() -> None:
    config = OptimizerConfig(name="rowwise_adagrad", learning_rate=0.1, eps=1e-8)
    start = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected, sums = start.clone(), torch.zeros(ROWS, 2, dtype=torch.float64)
    for touched, gradient in batches(all_rows=False):
        for row, g in zip(touched.tolist(), gradient, strict=True):
            sums[row] += torch.stack([g[0] ** 2, (g[1:] ** 2).mean()])
            expected[row, 0] -= 0.1 * g[0] / (sums[row, 0].sqrt() + 1e-8)
            expected[row, 1:] -= 0.1 * g[1:] / (sums[row, 1].sqrt() + 1e-8)
    torch.testing.assert_close(ours(config, start, batches(False)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rowwise_adagrad", "adam", "adamw"])
def test_a_row_of_one_number_has_a_rule_too(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1)
    rows, state = torch.ones(3, 1), torch.zeros(3, state_width(name, 1))
    moved, _ = update_rows(config, rows, torch.full((3, 1), 2.0), state, 1, 0.1)
    assert (moved < rows).all() and moved.shape == (3, 1)
