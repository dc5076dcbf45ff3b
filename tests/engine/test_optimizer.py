"""Row rules are torch's own, or their papers', on the rows touched; rows not touched keep value and state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from des_core.config import OptimizerConfig
from des_core.engine.weights import saving
from des_core.engine.weights.optimizer import Decay, DenseRule, apply, state_width, update_rows
from tests.engine import tiny
from tests.engine.group import Group

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
    rule = DenseRule(config, [expected])
    for slots, gradient in batches(ROWS):
        expected.grad = torch.zeros_like(expected).index_copy(0, slots, gradient)
        rule.step(config.learning_rate)
    assert_same(ours(config, ROWS), expected.detach(), 1e-9)


TORCHS: dict[str, Any] = {
    "sgd": lambda weights: torch.optim.SGD(weights, weight_decay=0.1),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, weight_decay=0.1, eps=1e-8),
    "adam": lambda weights: torch.optim.Adam(weights, weight_decay=0.1, betas=(0.8, 0.99), eps=1e-8),
    "adamw": lambda weights: torch.optim.AdamW(weights, weight_decay=0.2, betas=(0.8, 0.99), eps=1e-8),
}


def twins(name: str, dtype: torch.dtype, device: str) -> tuple[DenseRule, nn.Module, torch.optim.Optimizer, nn.Module]:
    """Ours and torch's rule, each over its copy of the same net."""
    config = OptimizerConfig(name=name, l2=0.1, beta1=0.8, beta2=0.99, **EXTRAS.get(name, {}))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 1)).to(device, dtype)
    copy = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(3, 1)).to(device, dtype)
    copy.load_state_dict(net.state_dict())
    return DenseRule(config, net.parameters()), net, TORCHS[name](copy.parameters()), copy


def move_both(ours: DenseRule, net: nn.Module, torchs: torch.optim.Optimizer, copy: nn.Module, step: int) -> None:
    """One step of each at the step's own rate; the second layer first moves at step 3, and not at every fifth."""
    random = torch.Generator().manual_seed(step)
    rate = 0.1 / (1 + step // 7)
    ours.zero_gradients()
    torchs.zero_grad(set_to_none=False)
    for number, (weight, its) in enumerate(zip(net.parameters(), copy.parameters(), strict=True)):
        gradient = torch.randn(weight.shape, generator=random, dtype=torch.float64).to(weight)
        still = number in (2, 3) and (step < 3 or step % 5 == 0)
        for parameter in (weight, its):
            parameter.grad = None if still else gradient + (0 if parameter.grad is None else parameter.grad)
    for group in torchs.param_groups:
        group["lr"] = rate
    torchs.step()
    ours.step(rate)


def assert_bits(net: nn.Module, copy: nn.Module) -> None:
    assert all(torch.equal(weight, its) for weight, its in zip(net.parameters(), copy.parameters(), strict=True))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TORCHS)
def test_the_dense_rule_is_torchs_bit_for_bit(name: str, dtype: torch.dtype, device: str) -> None:
    """At changing rates, with weights that have no gradient yet, and saved and loaded on the way."""
    ours, net, torchs, copy = twins(name, dtype, device)
    for step in range(1, 51):
        move_both(ours, net, torchs, copy, step)
        assert_bits(net, copy)
        if step in (2, 23):
            saved = saving.dense_state_bytes(ours), saving.dense_bytes(net)
            ours, net, _, _ = twins(name, dtype, device)
            saving.load_dense_state_bytes(saved[0], ours)
            saving.load_dense_bytes(saved[1], net)
    assert (list(net.parameters())[2] != list(twins(name, dtype, device)[1].parameters())[2]).all()


@pytest.mark.parametrize("name", TORCHS)
def test_a_checkpoint_of_torchs_optimizer_goes_on(name: str) -> None:
    """State has torch's own names and forms: older checkpoints hold what ``torch.optim`` kept."""
    ours, net, torchs, copy = twins(name, torch.float32, "cpu")
    for step in range(1, 31):
        move_both(ours, net, torchs, copy, step)
    kept = torchs.state_dict()["state"]
    assert {n: sorted(slots) for n, slots in kept.items()} == {n: sorted(slots) for n, slots in ours.state.items()}
    ours.restore({number: {name: slot.clone() for name, slot in slots.items()} for number, slots in kept.items()})
    for step in range(31, 41):
        move_both(ours, net, torchs, copy, step)
    assert_bits(net, copy)


def test_a_worker_never_imports_torchs_compiler(group: Callable[[int], Group], tmp_path: Path) -> None:
    """It would cost every process of every run more than a second."""
    config = tiny.config(tmp_path, train={"max_steps": 2})
    dataset = tiny.store(config)
    group(1).do("train", config=config.model_dump_json(), dataset=str(dataset))
    (imported,) = group(1).do("imported")
    assert "des_core.engine.worker" in imported and "torch._dynamo" not in imported


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
        # Constant, then falling with every step.
        rate = 0.05 if step <= 20 else 0.02 if step <= 30 else 0.02 * (61 - step) / 30
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
    assert len(decay.pieces) == 2 + 29
    on_device = decay.missed_on(torch.from_numpy(last.astype(np.int64)), 61)
    np.testing.assert_allclose(on_device.numpy(), decay.missed(last, 61), rtol=1e-13)
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
