"""The same ids own rows for any number of workers, as a few lines of Python say; rows outlive growth and moves."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from threading import Barrier
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch

from des_core.config import TableConfig
from des_core.engine.weights import index
from des_core.engine.weights.eviction import beyond_budget
from des_core.engine.weights.index import Array, Keys
from des_core.engine.weights.memory import HUGE_PAGE, Memory, Rows
from des_core.engine.weights.table import StagedBatch, Table, first_values
from des_core.engine.worker import day_of

WIDTH = 4


def make(
    width: int = WIDTH, seed: int = 1, device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: object
) -> Table:
    return Table(width, 2, seed, 0.1, TableConfig(**settings), torch.device(device), dtype)


def alone(numbers: Array) -> Array:
    """The sum over one worker."""
    return numbers


def together(workers: int, role: Callable[[int, Callable[[Array], Array]], Any]) -> list[Any]:
    """What ``role(worker, total)`` returns on each of so many workers."""
    barrier, parts = Barrier(workers, timeout=60), [np.zeros(0)] * workers

    def total(worker: int, numbers: Array) -> Array:
        parts[worker] = numbers
        barrier.wait()
        summed = sum(parts[1:], parts[0])
        barrier.wait()
        return summed

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda worker: role(worker, lambda numbers: total(worker, numbers)), range(workers)))


def stage(table: Table, ids_L: Array, step: int) -> StagedBatch:
    """One step's lookups, committed."""
    ids_U, _, _, counts_U = index.dedupe(ids_L)
    staged = table.stage(ids_U, tables_of(ids_U), counts_U, step)
    table.commit(staged)
    return staged


def tables_of(ids: Array) -> Array:
    return (ids.view(np.uint64) >> np.uint64(60)).astype(np.uint16)


def stream(seed: int, steps: int = 40, size: int = 300) -> list[Array]:
    """Batches of ids, some frequent, from a set that drifts; among them 0 and -1."""
    rng = np.random.default_rng(seed)
    known = rng.integers(-(1 << 63), (1 << 63) - 1, 2000)
    known[:2] = 0, -1
    return [known[np.minimum(rng.zipf(1.2, size) - 1 + 20 * step, 1999)] for step in range(steps)]


def facts(tables: list[Table]) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
    """Of all workers' rows and candidates: id -> (table, lookups, last step)."""
    both = []
    for stores in (tables, [table.candidates for table in tables]):
        columns = [(store.ids, store.tables, store.counts, store.last) for store in stores]
        both.append(
            {i: tuple(rest) for four in columns for i, *rest in zip(*map(np.ndarray.tolist, four), strict=True)}
        )
    return both[0], both[1]


def expected(batches: list[Array], settings: TableConfig, recent: dict[int, int]) -> tuple[dict, dict]:
    """The rule in plain Python, on one worker: rows and candidates, as ``facts`` says them."""
    rows: dict[int, tuple[int, int]] = {}
    waiting: dict[int, tuple[int, int]] = {}
    for step, batch in enumerate(batches, 1):
        for i, count in Counter(batch.tolist()).items():
            count += rows.get(i, waiting.pop(i, (0, 0)))[0]
            (rows if i in rows or count >= settings.admit_count else waiting)[i] = (count, step)
        if step % settings.evict_every == 0:
            idle = max(step - settings.idle_steps if settings.idle_steps else 0, recent.get(step, 0))
            rows, waiting = ({i: f for i, f in store.items() if f[1] >= idle} for store in (rows, waiting))
            if settings.max_rows:
                score = 0 if settings.budget_keeps == "frequent" else 1
                order = sorted(rows, key=lambda i: (rows[i][score], i % (1 << 64)), reverse=True)
                rows = {i: rows[i] for i in order[: settings.max_rows]}
    return tuple({i: (i % (1 << 64) >> 60, *f) for i, f in store.items()} for store in (rows, waiting))


def trained(workers: int, batches: list[Array], recent: dict[int, int], **settings: object) -> Callable:
    """One worker's part of a run over batches of which it owns some buckets."""

    def role(worker: int, total: Callable[[Array], Array]) -> Table:
        table = make(**settings)
        for step, batch in enumerate(batches, 1):
            owned = (batch.view(np.uint64) >> np.uint64(56)) % np.uint64(workers) == worker
            stage(table, batch[owned], step)
            if step % TableConfig(**settings).evict_every == 0:
                table.evict(step, total, recent.get(step, 0))
        return table

    return role


RULES = {
    "count": {"admit_count": 3},
    "idle": {"admit_count": 4, "idle_steps": 7, "evict_every": 5},
    "days": {"admit_count": 2, "evict_every": 10},
    "frequent": {"max_rows": 150, "evict_every": 4},
    "recent": {"max_rows": 150, "evict_every": 4, "budget_keeps": "recent"},
    "all": {"admit_count": 2, "max_rows": 100, "idle_steps": 9, "evict_every": 3},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_rows_are_those_of_the_plain_rule(rule: str, workers: int) -> None:
    batches, settings = stream(seed=len(rule)), RULES[rule]
    recent = {20: 11, 40: 33} if rule == "days" else {}
    tables = together(workers, trained(workers, batches, recent, **settings))
    assert facts(tables) == expected(batches, TableConfig(**settings), recent)
    # What was let in and not let go is there.
    assert sum(table.admitted - table.evicted for table in tables) == sum(table.used for table in tables)
    for table in tables:
        assert table.rows_SK.shape == (table.used, WIDTH) and table.state_SZ.shape == (table.used, 2)
        assert np.array_equal(table.rows_SK[:, 1:].numpy(), first_values(table.ids, 3, 1, 0.1).astype(np.float32))


@pytest.mark.parametrize("workers", [2, 3])
def test_coins_fall_alike_for_any_number_of_workers(workers: int) -> None:
    batches = stream(seed=5)
    tables = together(workers, trained(workers, batches, {}, admit_probability=0.1))
    (one,) = together(1, trained(1, batches, {}, admit_probability=0.1))
    assert facts(tables) == facts([one]) and 0 < one.used < len(np.unique(batches))


def test_a_coin_admits_its_share_at_each_step() -> None:
    table, ids = make(admit_probability=0.2), np.arange(100_000)
    shares = []
    for step in range(1, 4):
        before = table.used
        stage(table, ids, step)
        shares.append((table.used - before) / (len(ids) - before))
    assert np.allclose(shares, 0.2, atol=0.01) and table.candidates.used == 0
    other = make(admit_probability=0.2, seed=2)
    stage(other, ids, 1)
    assert 0.1 < np.isin(other.ids, table.ids[: int(0.2 * len(ids))]).mean() < 0.3


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("scores", [1, 3, 1 << 32])
def test_a_budget_keeps_the_largest_over_workers(workers: int, scores: int) -> None:
    rng = np.random.default_rng(scores)
    ids = np.unique(np.concatenate([rng.integers(-(1 << 63), (1 << 63) - 1, 900), np.arange(-50, 50)]))
    score = rng.integers(0, scores, len(ids), dtype=np.uint32)
    staying = rng.random(len(ids)) < 0.8
    owner = rng.integers(0, workers, len(ids))
    order = sorted(np.flatnonzero(staying), key=lambda at: (score[at], int(ids[at]) % (1 << 64)))
    for keep in (1, 2, 333, len(order) - 1, len(order), len(order) + 1):
        gone = np.zeros(len(ids), np.bool_)

        def role(worker: int, total: Callable[[Array], Array], keep: int = keep, gone: Array = gone) -> None:
            mine = owner == worker
            gone[mine] = beyond_budget(score[mine], ids[mine], staying[mine], keep, total)

        together(workers, role)
        assert sorted(np.flatnonzero(gone)) == sorted(order[: max(len(order) - keep, 0)])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_move_with_their_ids(device: str) -> None:
    table, rng = make(device=device, max_rows=40_000), np.random.default_rng(0)
    ids = np.unique(rng.integers(-(1 << 63), (1 << 63) - 1, 60_000))
    stage(table, rng.permutation(ids), 1)
    stage(table, rng.permutation(ids)[:30_000], 2)
    value_S1 = torch.from_numpy(table.ids >> 40).float()[:, None].to(device)
    table.rows_SK[:], table.state_SZ[:] = value_S1, -value_S1
    assert table.evict(2, alone) == table.evicted == len(ids) - 40_000
    value_S1 = torch.from_numpy(table.ids >> 40).float()[:, None].to(device)
    assert torch.equal(table.rows_SK, value_S1.expand(-1, WIDTH))
    assert torch.equal(table.state_SZ, -value_S1.expand(-1, 2))
    assert np.array_equal(table.tables, tables_of(table.ids)) and (table.counts == 2).sum() == 30_000


def test_an_evicted_id_is_born_again() -> None:
    table, ids = make(idle_steps=1, admit_count=2), np.arange(10)
    stage(table, ids.repeat(2), 1)
    first_values = table.rows_SK.clone()
    table.rows_SK[:], table.state_SZ[:] = 8, 9
    assert table.evict(3, alone) == 10 and table.used == 0 and (table.find(ids) == -1).all()
    assert (stage(table, ids, 4).slots_U == -1).all()
    stage(table, ids, 5)
    assert torch.equal(table.rows_SK, first_values) and not table.state_SZ.any()
    assert (table.counts == 2).all() and (table.last == 5).all() and table.admitted == 20


def test_only_rows_of_zeros_are_zero_rows() -> None:
    table = make(evict_zero=True)
    stage(table, np.arange(6), 1)
    table.rows_SK[:] = torch.tensor(
        [[0, 0, 0, 0], [0, 0, 1e-45, 0], [-0.0] * 4, [1, 0, 0, 0], [0, 0, 0, -1], [float("nan")] * 4]
    )
    assert table.evict(1, alone) == 2 and sorted(table.ids) == [1, 3, 4, 5]


def test_an_eviction_wants_all_rows_committed() -> None:
    table = make(max_rows=1)
    table.stage(np.arange(3), np.zeros(3, np.uint16), np.ones(3, np.uint32), 1)
    with pytest.raises(RuntimeError, match="3 rows are not committed"):
        table.evict(1, alone)


def test_a_touch_ahead_changes_no_row() -> None:
    table = make(width=17)
    stage(table, np.arange(10_000), 1)
    rows_SK, state_SZ = table.rows_SK, table.state_SZ
    state_SZ[:] = 3
    kept = rows_SK.clone()
    ahead = [table.stage(np.arange(5000, 90_000 * n), *ones(90_000 * n - 5000), n + 1) for n in (1, 2)]
    assert table.rows_SK.data_ptr() == rows_SK.data_ptr() and torch.equal(table.rows_SK, kept)
    assert (table.state_SZ == 3).all() and len(table.state_SZ) == 10_000 and table.used == 180_000
    assert (ahead[0].previous_U[:5000] == 1).all() and (ahead[0].previous_U[5000:] == 2).all()
    assert (ahead[1].previous_U[: 90_000 - 5000] == 2).all()
    del rows_SK, state_SZ
    for staged in ahead:
        table.commit(staged)
    assert torch.equal(table.rows_SK[:10_000], kept) and (table.state_SZ[:10_000] == 3).all()
    fresh = first_values(np.arange(180_000), 16, 1, 0.1).astype(np.float32)[table.ids]
    assert np.array_equal(table.rows_SK[:, 1:].numpy(), fresh)
    assert not table.rows_SK[:, 0].any() and not table.state_SZ[10_000:].any()


def ones(size: int) -> tuple[Array, Array]:
    """Table numbers and counts."""
    return np.zeros(size, np.uint16), np.ones(size, np.uint32)


def test_finding_inserts_nothing() -> None:
    table = make(admit_count=2)
    assert (table.find(np.array([0, -1, 7])) == -1).all()
    assert table.used == table.candidates.used == table.admitted == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["frequent", "all"])
def test_a_restored_table_goes_on_as_if_never_stopped(rule: str, dtype: torch.dtype) -> None:
    def go_on(table: Table, first: int, last: int) -> Table:
        for step in range(first, last + 1):
            staged = stage(table, batches[step - 1], step)
            slots = torch.from_numpy(staged.slots_U[staged.slots_U >= 0])
            table.rows_SK[slots] += step
            table.state_SZ[slots] += 1
            if step % RULES[rule]["evict_every"] == 0:
                table.evict(step, alone)
        return table

    batches = stream(seed=9)
    one, other = go_on(make(dtype=dtype, **RULES[rule]), 1, 22), make(dtype=dtype, **RULES[rule])
    numbers = (one.rows_SK.numpy().copy(), one.state_SZ.numpy().copy())
    other.restore(one.ids.copy(), one.tables.copy(), one.counts.copy(), one.last.copy(), *numbers)
    waiting = one.candidates
    other.restore_candidates(waiting.ids.copy(), waiting.tables.copy(), waiting.counts.copy(), waiting.last.copy())
    other.admitted, other.evicted = one.admitted, one.evicted
    go_on(one, 23, 40)
    go_on(other, 23, 40)
    assert np.array_equal(one.ids, other.ids) and facts([one]) == facts([other])
    assert torch.equal(one.rows_SK, other.rows_SK) and torch.equal(one.state_SZ, other.state_SZ)
    assert one.statistics() == other.statistics()


def resident_bytes(memories: list[Memory]) -> int:
    """Bytes of memory that the kernel really gave."""
    taken = 0
    for memory in memories:
        pages = (ctypes.c_ubyte * (memory.array.nbytes // 4096))()
        at = ctypes.c_void_p(memory.array.ctypes.data)
        assert ctypes.CDLL(None).mincore(at, ctypes.c_size_t(memory.array.nbytes), pages) == 0
        taken += 4096 * np.count_nonzero(np.frombuffer(pages, np.uint8) & 1)
    return taken


def test_a_row_takes_little_more_memory_than_its_weights() -> None:
    """k = 16 in fp32 with row-wise Adagrad, all counted: at most 1.6 times the weights' 68 bytes."""
    table = make(width=17, idle_steps=5)
    stores = [part for part in vars(table).values() if isinstance(part, Keys | Rows)]
    memories = [part for store in stores for part in vars(store).values() if isinstance(part, Memory)]
    rows = int(index.MAX_LOAD * (1 << 22))
    for step, ids in enumerate(np.array_split(np.arange(rows) * np.int64(0x1E3779B97F4A7C15), 10), 1):
        stage(table, ids, step)
    slack = len(memories) * HUGE_PAGE
    assert table.used == rows and table.load > 0.599
    assert table.bytes_per_row <= 1.6 * 68
    assert abs(resident_bytes(memories) - table.memory_bytes) <= slack
    table.evict(10, alone)
    assert table.used < 0.7 * rows and abs(resident_bytes(memories) - table.memory_bytes) <= slack


def test_first_values_depend_on_seed_and_id_alone() -> None:
    ids = np.random.default_rng(0).integers(-(1 << 62), 1 << 62, 20_000)
    values = first_values(ids, 8, seed=4, init=0.05)
    assert np.array_equal(first_values(ids[::-1].copy(), 8, 4, 0.05), values[::-1])
    assert not np.array_equal(first_values(ids, 8, 5, 0.05), values)
    assert abs(values.std() - 0.05) < 1e-3 and abs(values.mean()) < 1e-3
    assert np.abs(np.corrcoef(values.T) - np.eye(8)).max() < 0.03
    one, other = make(), make()
    stage(one, ids[:100], 1)
    stage(other, ids[99::-1].copy(), 2)
    assert torch.equal(one.rows_SK[one.find(ids[:100])], other.rows_SK[other.find(ids[:100])])
    assert (one.rows_SK[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("moment", "zone", "day"),
    [
        ("2026-01-01T00:00:00+00:00", "UTC", 20_454),
        ("2025-12-31T16:00:00+00:00", "Asia/Shanghai", 20_454),
        ("2025-12-31T15:59:59+00:00", "Asia/Shanghai", 20_453),
        ("2026-01-01T04:59:59+00:00", "America/New_York", 20_453),
        ("2026-01-01T05:00:00+00:00", "America/New_York", 20_454),
    ],
)
def test_a_day_is_one_of_the_logs_own_zone(moment: str, zone: str, day: int) -> None:
    micros = int(datetime.fromisoformat(moment).timestamp() * 1e6)
    assert day_of(micros, ZoneInfo(zone)) == day
