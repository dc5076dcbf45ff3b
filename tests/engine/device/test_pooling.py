"""Pooling, gradients and updates on a device are those of plain torch, with heavy rows and odd batches."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from des_core.config import OptimizerConfig
from des_core.engine.weights.optimizer import state_width, update_rows
from des_core.engine.weights.pooling import reference

RULES = get_args(OptimizerConfig.model_fields["name"].annotation)
EXTRAS = {"adamw": {"weight_decay": 0.01}, "ftrl": {"l1": 0.1}, "group_ftrl": {"l1": 0.1, "group_l1": 0.01}}
SAMPLES, FIELDS, SLOTS = 21, 3, 40


def control_of(device: torch.device, config: OptimizerConfig, step: int, rate: float, width: int = 5) -> Tensor:
    """What kernels are told of a step."""
    from des_core.engine.device.batch import control_of

    return control_of(0, step, config, width, rate).to(device)


class Batch:
    """A batch with one field of lists, one of single values and one that is often empty; some ids have no row."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0, heavy: int = 0, width: int = 5) -> None:
        rng = np.random.default_rng(seed)
        counts = np.stack([rng.integers(0, 4, SAMPLES), np.ones(SAMPLES, int), rng.integers(0, 2, SAMPLES)])
        if heavy:
            counts[0, 3] = heavy
        self.offsets = torch.from_numpy(np.concatenate([[0], counts.ravel().cumsum()])).to(device)
        lookups = int(counts.sum())
        self.sample = torch.from_numpy(np.tile(np.arange(SAMPLES), FIELDS).repeat(counts.ravel())).to(device)
        self.piece = torch.from_numpy(np.arange(FIELDS).repeat(SAMPLES).repeat(counts.ravel())).to(device)
        slots = rng.zipf(1.3, lookups) % SLOTS - 1
        if heavy:
            slots[int(self.offsets[3]) : int(self.offsets[3]) + heavy] = 7
        self.slots = torch.from_numpy(slots.astype(np.int32)).to(device)
        self.x = torch.from_numpy(np.round(rng.uniform(0.5, 2, lookups), 1)).to(device, dtype)
        self.rows = torch.from_numpy(rng.normal(size=(SLOTS, width))).to(device, dtype)

    def pooled(self, state: int = 0, **wanted: bool) -> Any:
        from des_core.engine.device.batch import Places
        from des_core.engine.device.pooling import Pooled
        from des_core.engine.device.rows import DeviceRows

        store = DeviceRows(self.rows.shape[1], state, self.rows.device, self.rows.dtype, chunk_bits=4)
        store.grow(SLOTS)
        store.write(0, self.rows, self.rows.new_zeros(SLOTS, state))
        ids = torch.arange(SLOTS, device=self.rows.device)
        places = Places(SAMPLES, FIELDS, self.sample, self.piece, self.x, self.offsets)
        return Pooled(store, ids, self.slots, places, **wanted)

    def expected(self, rows: Tensor, by_field: bool, squares: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The sums by plain torch, of rows [S, K] that ask for gradients."""
        x = torch.where(self.slots < 0, torch.zeros_like(self.x), self.x)
        places = (self.slots.clamp(min=0).long(), self.sample, self.piece, x)
        return reference(rows, *places, SAMPLES, FIELDS if by_field else 0, squares)


@pytest.mark.parametrize("by_field", [False, True])
@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("width", [1, 5])
def test_forward_is_plain_torchs(device: torch.device, by_field: bool, squares: bool, width: int) -> None:
    batch = Batch(device, torch.float64, width=width)
    found = joined(batch.pooled(by_field=by_field, squares=squares).forward())
    for ours, theirs in zip(found, batch.expected(batch.rows, by_field, squares), strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-13, atol=1e-13)


def joined(sums: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' sums as the CPU has them: [w | v] in one."""
    linear, factors, vectors, squares = sums
    return torch.cat([linear[:, None], factors], 1), vectors, squares


def loss_of(sums: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    summed, vectors, squares = sums
    return summed.sin().sum() + (vectors * vectors.detach().cos()).sum() + (squares * 0.3).sum()


def test_plain_lookups_are_those_whose_places_are_told(device: torch.device) -> None:
    """One lookup for each field and sample, with and without x = 1: bit by bit the same sums and the same update."""
    from des_core.engine.device.batch import Places, segments_of
    from des_core.engine.device.pooling import Pooled
    from des_core.engine.device.rows import DeviceRows

    rng = np.random.default_rng(3)
    lookups = SAMPLES * FIELDS
    slots = torch.from_numpy(rng.integers(-1, 9, lookups).astype(np.int32)).to(device)
    at = torch.arange(lookups, device=device)
    ones = torch.ones(lookups, device=device)
    told = Places(SAMPLES, FIELDS, at % SAMPLES, at // SAMPLES, ones, torch.arange(lookups + 1, device=device))
    config = OptimizerConfig(name="adagrad", learning_rate=0.1)
    results = []
    for places in (told, Places(SAMPLES, FIELDS, x_L=ones), Places(SAMPLES, FIELDS)):
        store = DeviceRows(5, 5, device, torch.float32, chunk_bits=4)
        store.grow(9)
        store.write(0, torch.arange(45, device=device).view(9, 5) / 7, torch.zeros(9, 5, device=device))
        pooled = Pooled(store, torch.arange(16, device=device), slots, places, True, True)
        sums = joined(pooled.with_gradients())
        loss_of(sums).backward()
        finite = torch.ones(1, dtype=torch.int32, device=device)
        pooled.update(segments_of(slots), "adagrad", control_of(device, config, 1, 0.1), finite)
        results.append([*(part.detach() for part in sums), *store.read(0, 9)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_are_plain_torchs(device: torch.device, rule: str, dtype: torch.dtype) -> None:
    from des_core.engine.device.batch import segments_of

    # A longer step of plain SGD on this loss would multiply rounding errors.
    rate = 1e-4 if rule == "sgd" else 0.05
    config = OptimizerConfig(name=rule, learning_rate=rate, l2=0.01, **EXTRAS.get(rule, {}))  # type: ignore[arg-type]
    zeros = state_width(rule, 5)
    batch = Batch(device, dtype, heavy=70)
    rows, state = batch.rows.clone(), batch.rows.new_zeros(SLOTS, zeros)
    pooled = batch.pooled(zeros, by_field=True, squares=True)
    finite = torch.ones(1, dtype=torch.int32, device=device)
    read = batch.slots[batch.slots >= 0].unique().long()
    for step in (1, 2):
        loss_of(joined(pooled.with_gradients())).backward()
        segments = segments_of(batch.slots)
        pooled.update(segments, rule, control_of(device, config, step, rate), finite)
        leaf = rows.clone().requires_grad_()
        loss_of(batch.expected(leaf, True, True)).backward()
        assert leaf.grad is not None
        rows[read], state[read] = update_rows(config, rows[read], leaf.grad[read], state[read], step, rate)
        ours, our_state = pooled.rows.read(0, SLOTS)
        # Adam's first steps are signs: of a gradient near zero rounding decides.
        loose = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
        assert torch.allclose(ours, rows, **loose)
        assert torch.allclose(our_state, state, **loose)
    assert read.numel() > 10 and int((batch.slots == 7).sum()) > 64, "a row's lookups lie in three tiles"


def test_a_loss_that_is_not_finite_changes_nothing(device: torch.device) -> None:
    from des_core.engine.device.batch import segments_of

    batch = Batch(device, torch.float32)
    pooled = batch.pooled(5, by_field=True, squares=False)
    summed, vectors, _ = joined(pooled.with_gradients())
    (summed.sum() * float("nan") + vectors.sum()).backward()
    config = OptimizerConfig(name="adagrad", learning_rate=0.1)
    pooled.update(
        segments_of(batch.slots), config.name, control_of(device, config, 1, 0.1),
        torch.zeros(1, dtype=torch.int32, device=device),
    )  # fmt: skip
    rows, state = pooled.rows.read(0, SLOTS)
    assert torch.equal(rows, batch.rows) and not state.any()


def test_a_row_with_many_lookups_is_the_sum_of_its_pieces(device: torch.device) -> None:
    """In whole numbers every order has the same sum: cut into pieces, nothing is lost or counted twice."""
    from des_core.engine.device.batch import segments_of

    batch = Batch(device, torch.float32, heavy=300)
    batch.x = batch.x.round()
    pooled = batch.pooled(0, by_field=False, squares=False)
    summed, _, _ = joined(pooled.with_gradients())
    weights = torch.arange(SAMPLES, device=device, dtype=torch.float32)[:, None]
    (summed * weights).sum().backward()
    config = OptimizerConfig(name="sgd", learning_rate=1.0)
    pooled.update(
        segments_of(batch.slots), config.name, control_of(device, config, 1, 1.0),
        torch.ones(1, dtype=torch.int32, device=device),
    )  # fmt: skip
    gradient = batch.rows.new_zeros(SLOTS)
    known = batch.slots >= 0
    gradient.index_add_(0, batch.slots[known].long(), (batch.x * weights[batch.sample, 0])[known])
    rows, _ = pooled.rows.read(0, SLOTS)
    assert torch.equal(rows, batch.rows - gradient[:, None])


def test_two_runs_have_the_same_bits(device: torch.device) -> None:
    from des_core.engine.device.batch import segments_of

    results = []
    for _ in range(2):
        batch = Batch(device, torch.float32, heavy=100)
        pooled = batch.pooled(5, by_field=True, squares=True)
        loss_of(joined(pooled.with_gradients())).backward()
        config = OptimizerConfig(name="adagrad", learning_rate=0.1)
        pooled.update(
        segments_of(batch.slots), config.name, control_of(device, config, 1, 0.1),
        torch.ones(1, dtype=torch.int32, device=device),
    )  # fmt: skip
        results.append(pooled.rows.read(0, SLOTS)[0].clone())
    assert torch.equal(*results)


def test_a_batch_without_a_known_value(device: torch.device) -> None:
    from des_core.engine.device.batch import segments_of

    batch = Batch(device, torch.float32)
    batch.slots.fill_(-1)
    pooled = batch.pooled(5, by_field=True, squares=True)
    sums = joined(pooled.with_gradients())
    assert not any(part.any() for part in sums)
    loss_of(sums).backward()
    config = OptimizerConfig(name="adagrad", learning_rate=0.1)
    finite = torch.ones(1, dtype=torch.int32, device=device)
    pooled.update(segments_of(batch.slots), "adagrad", control_of(device, config, 1, 0.1), finite)
    assert torch.equal(pooled.rows.read(0, SLOTS)[0], batch.rows)


def test_a_list_of_thousands_of_values(device: torch.device) -> None:
    batch = Batch(device, torch.float64, heavy=400 if device.type == "cpu" else 10_000)
    summed, _, _ = joined(batch.pooled(by_field=False, squares=False).forward())
    assert torch.allclose(summed, batch.expected(batch.rows, False, False)[0])


def halved(device: torch.device, step: int, rows: int = 512) -> tuple[Tensor, Tensor]:
    """Rows of 16 bits after a step of plain SGD, and what they would be in 32."""
    from des_core.engine.device.batch import Places, segments_of
    from des_core.engine.device.pooling import Pooled
    from des_core.engine.device.rows import DeviceRows

    store = DeviceRows(3, 0, device, torch.float32, chunk_bits=6, half=True)
    store.grow(rows)
    before = torch.ones(rows, 3, device=device)
    store.write(0, before, before[:, :0])
    slots = torch.arange(rows, device=device, dtype=torch.int32)
    pooled = Pooled(store, slots.long() * 7919, slots, Places(rows, 1), False, False)
    summed, _, _ = joined(pooled.with_gradients())
    summed.sum().backward()
    config = OptimizerConfig(name="sgd", learning_rate=1e-3)
    finite = torch.ones(1, dtype=torch.int32, device=device)
    pooled.update(segments_of(slots), "sgd", control_of(device, config, step, 1e-3, 3), finite)
    return store.read(0, rows)[0], before - 1e-3


def test_rows_of_sixteen_bits_are_rounded_right_in_the_mean(device: torch.device) -> None:
    found, exact = halved(device, 1)
    assert torch.equal(found, found.bfloat16().float()), "each is a number of 16 bits"
    # 0.999 lies between 0.99609375 and 1: to the nearest, no step would ever move it.
    assert set(found.unique().tolist()) == {0.99609375, 1.0}
    assert abs(float((found - exact).mean())) < 2e-4
    assert torch.equal(found, halved(device, 1)[0]) and not torch.equal(found, halved(device, 2)[0])


def test_rows_of_sixteen_bits_take_half_the_memory() -> None:
    from des_core.engine.device.rows import DeviceRows

    whole, half = (DeviceRows(33, 2, torch.device("cpu"), torch.float32, half=half) for half in (False, True))
    assert half.slot_bytes <= 0.7 * whole.slot_bytes
