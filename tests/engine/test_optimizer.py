"""Row rules are torch's own, or their papers', on the rows touched; rows not touched keep value and state."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from des_core.config import OptimizerConfig
from des_core.engine.optimizer import Decay, apply, dense_optimizer, state_width, update_rows

ROWS, WIDTH, STEPS = 40, 5, 15
RULES = get_args(OptimizerConfig.model_fields["name"].annotation)
EXTRAS: dict[str, dict[str, float]] = {
    "adamw": {"weight_decay": 0.2},
    "ftrl": {"l1": 0.3},
    "group_ftrl": {"l1": 0.3, "group_l1": 0.2},
}


def start(rows: int = ROWS) -> Tensor:
    """The rows' first values: a linear weight of zero beside random factors, as they are born."""
    values = 0.1 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    values[::2, 0] = 0
    return values


def batches(touched: int, steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    """Slots and gradients of each step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        slots = torch.randperm(ROWS, generator=generator)[:touched]
        yield slots, torch.randn(touched, WIDTH, generator=generator, dtype=torch.float64)


def ours(config: OptimizerConfig, touched: int) -> Tensor:
    """Rows after all batches."""
    rows, state = start(), torch.zeros(ROWS, state_width(config.name, WIDTH), dtype=torch.float64)
    for step, (slots, gradient) in enumerate(batches(touched), 1):
        apply(config, rows, state, slots, gradient, step, config.learning_rate)
    return rows


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_in_place_is_the_readable_form(name: str, dtype: torch.dtype) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1, l2=0.05, **EXTRAS.get(name, {}))
    for width in (1, 2, WIDTH):
        rows = start()[:, :width].to(dtype, copy=True).contiguous()
        state = torch.zeros(ROWS, state_width(name, width), dtype=dtype)
        for step, (slots, gradient) in enumerate(batches(30), 1):
            gradient = gradient[:, :width].to(dtype)
            rows_expected, state_expected = rows.clone(), state.clone()
            rows_expected[slots], state_expected[slots] = update_rows(
                config, rows[slots], gradient, state[slots], step, 0.1
            )
            apply(config, rows, state, slots, gradient, step, 0.1)
            assert_same(rows, rows_expected, 1e-12 if dtype == torch.float64 else 1e-6)
            assert_same(state, state_expected, 1e-12 if dtype == torch.float64 else 1e-6)
        assert not torch.equal(rows, start()[:, :width].to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_on_a_gpu_is_on_a_cpu(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1, l2=0.05, **EXTRAS.get(name, {}))
    rows, state = start().cuda(), torch.zeros(ROWS, state_width(name, WIDTH), dtype=torch.float64).cuda()
    for step, (slots, gradient) in enumerate(batches(30), 1):
        apply(config, rows, state, slots.cuda(), gradient.cuda(), step, config.learning_rate)
    assert_same(rows.cpu(), ours(config, 30))


@pytest.mark.parametrize("name", RULES)
def test_no_row_touched_changes_nothing(name: str) -> None:
    config = OptimizerConfig(name=name, **EXTRAS.get(name, {}))
    assert torch.equal(ours(config, touched=0), start())


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "adamw"])
@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_all_rows_touched_is_torchs_dense_rule(name: str, l2: float) -> None:
    # torch's AdamW has no coupled l2. Its dense Adam scales eps by the bias correction, SparseAdam and ours
    # do not: eps is negligible here.
    l2 = 0.0 if name == "adamw" else l2
    config = OptimizerConfig(name=name, learning_rate=0.05, l2=l2, eps=1e-15, **EXTRAS.get(name, {}))
    expected = torch.nn.Parameter(start())
    rule = dense_optimizer(config, [expected])
    for slots, gradient in batches(ROWS):
        expected.grad = torch.zeros_like(expected).index_copy(0, slots, gradient)
        rule.step()
    assert_same(ours(config, ROWS), expected.detach(), 1e-9)


@pytest.mark.parametrize(
    ("name", "sparse_rule"),
    [
        ("sgd", lambda weights: torch.optim.SGD(weights, lr=0.05)),
        ("adagrad", lambda weights: torch.optim.Adagrad(weights, lr=0.05, eps=1e-8)),
        ("adam", lambda weights: torch.optim.SparseAdam(weights, lr=0.05)),
    ],
)
def test_some_rows_touched_is_torchs_sparse_rule(name: str, sparse_rule: Any) -> None:
    expected = torch.nn.Parameter(start())
    rule = sparse_rule([expected])
    for slots, gradient in batches(4):
        with torch.sparse.check_sparse_tensor_invariants():
            expected.grad = torch.sparse_coo_tensor(slots[None], gradient, (ROWS, WIDTH)).coalesce()
        rule.step()
    assert_same(ours(OptimizerConfig(name=name, learning_rate=0.05), 4), expected.detach())


def test_rowwise_adagrad_scales_weight_and_factors_by_their_own_mean_square() -> None:
    expected, sums = start(), torch.zeros(ROWS, 2, dtype=torch.float64)
    for slots, gradient in batches(4):
        for row, g in zip(slots.tolist(), gradient, strict=True):
            sums[row] += torch.stack([g[0] ** 2, (g[1:] ** 2).mean()])
            expected[row, 0] -= 0.1 * g[0] / (sums[row, 0].sqrt() + 1e-8)
            expected[row, 1:] -= 0.1 * g[1:] / (sums[row, 1].sqrt() + 1e-8)
    assert_same(ours(OptimizerConfig(name="rowwise_adagrad", learning_rate=0.1), 4), expected)


@pytest.mark.parametrize(("l1", "l2", "group_l1"), [(0.0, 0.0, 0.0), (0.4, 0.2, 0.0), (0.2, 0.1, 2.0)])
def test_ftrl_is_its_papers_loop_over_rows(l1: float, l2: float, group_l1: float) -> None:
    alpha, beta, group = 0.3, 1.0, group_l1 * math.sqrt(WIDTH)
    weights = start().tolist()
    # A row is born with the z that would be it without l1 and group_l1.
    linear = [[-w * (beta / alpha + l2) for w in row] for row in weights]
    squares = [[0.0] * WIDTH for _ in weights]
    for slots, gradient in batches(25):
        for row, gradients in zip(slots.tolist(), gradient.tolist(), strict=True):
            shrunk = []
            for k, g in enumerate(gradients):
                sigma = (math.sqrt(squares[row][k] + g * g) - math.sqrt(squares[row][k])) / alpha
                linear[row][k] += g - sigma * weights[row][k]
                squares[row][k] += g * g
                z = linear[row][k]
                shrunk.append(0.0 if abs(z) <= l1 else -(z - math.copysign(l1, z)))
            length = math.hypot(*shrunk)
            factor = 0.0 if length <= group else 1 - group / length
            for k, s in enumerate(shrunk):
                weights[row][k] = factor * s / ((beta + math.sqrt(squares[row][k])) / alpha + l2)
    name = "group_ftrl" if group_l1 else "ftrl"
    extras = {"group_l1": group_l1} if group_l1 else {}
    rows = ours(OptimizerConfig(name=name, learning_rate=alpha, l1=l1, l2=l2, **extras), 25)
    assert_same(rows, torch.tensor(weights, dtype=torch.float64), 1e-10)
    zero = rows == 0
    assert zero.any() == bool(l1) and zero.all(1).any() == bool(group_l1)


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("name", ["ftrl", "group_ftrl"])
def test_ftrl_without_gradient_leaves_a_value_whatever_the_rate(name: str, beta: float) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.1, ftrl_beta=beta, l2=0.1 * beta, **EXTRAS[name])
    rows, state = start(), torch.zeros(ROWS, 2 * WIDTH, dtype=torch.float64)
    everything, nothing = torch.arange(ROWS), torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    apply(config, rows, state, everything, nothing, 1, 0.1)
    assert (rows.abs() <= start().abs()).all()
    for step, (slots, gradient) in enumerate(batches(30), 2):
        apply(config, rows, state, slots, gradient, step, 0.1)
    trained = rows.clone()
    for rate in (0.1, 0.01, 1.0):
        apply(config, rows, state, everything, nothing, STEPS + 2, rate)
        assert_same(rows, trained)


def test_group_ftrl_zeroes_rows_as_a_whole_and_they_may_return() -> None:
    config = OptimizerConfig(name="group_ftrl", learning_rate=0.1, group_l1=1.0)
    rows, state = 0.1 * start(4), torch.zeros(4, 2 * WIDTH, dtype=torch.float64)
    first = torch.tensor([0])
    apply(config, rows, state, first, 2 * start(4)[:1], 1, 0.1)
    assert (rows[0] == 0).all() and (rows[1:, 1:] != 0).all()
    for step in range(2, 30):
        apply(config, rows, state, first, torch.ones(1, WIDTH, dtype=torch.float64), step, 0.1)
    assert (rows[0] < 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_caught_up_adamw_decays_every_row_at_every_step(dtype: torch.dtype, tolerance: float) -> None:
    config = OptimizerConfig(name="adamw", learning_rate=0.05, weight_decay=0.3)
    rows, state = start().to(dtype), torch.zeros(ROWS, 2 * WIDTH, dtype=dtype)
    expected, first, second = start().to(dtype), torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)
    first, second = first.to(dtype), second.to(dtype)
    last, decay = np.zeros(ROWS, np.uint32), Decay()

    def caught_up(slots: Tensor, step: int) -> Tensor:
        return rows[slots] * torch.from_numpy(decay.missed(last[slots], step)).to(dtype)[:, None]

    for step, (slots, gradient) in enumerate(batches(3, steps=60), 1):
        rate = 0.05 if step <= 20 else 0.02 if step <= 45 else 0.01
        g = gradient.to(dtype)
        rows[slots] = caught_up(slots, step)
        decay.record(step, rate * config.weight_decay)
        apply(config, rows, state, slots, g, step, rate)
        last[slots] = step
        # torch's AdamW, but that moments and the Adam step are those of the rows touched.
        expected *= 1 - rate * config.weight_decay
        first[slots] = 0.9 * first[slots] + 0.1 * g
        second[slots] = 0.999 * second[slots] + 0.001 * g * g
        size = rate * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        expected[slots] -= size * first[slots] / (second[slots].sqrt() + 1e-8)
        decay = Decay(json.loads(json.dumps(decay.pieces)))
    assert len(decay.pieces) == 3
    assert_same(caught_up(torch.arange(ROWS), 61), expected, tolerance)


def test_decay_begins_with_its_first_step_and_of_none_nothing_is_missed() -> None:
    decay, previous = Decay(), np.array([0, 4, 9], np.uint32)
    assert decay.missed(previous, 10).tolist() == [1.0, 1.0, 1.0]
    decay.record(8, 0.5)
    decay.record(9, 0.5)
    decay.record(12, 0.0)
    assert decay.missed(previous, 10) == pytest.approx([0.25, 0.25, 1.0], rel=1e-15)
    assert decay.missed(previous, 20) == pytest.approx([1 / 16, 1 / 16, 0.25], rel=1e-15)


def test_state_holds_what_the_rule_remembers() -> None:
    widths = {"sgd": 0, "adagrad": 5, "rowwise_adagrad": 2}
    assert {name: state_width(name, 5) for name in RULES} == {name: widths.get(name, 10) for name in RULES}
    assert state_width("rowwise_adagrad", 1) == 1
