"""The table on a device holds the same rows as the CPU's after every batch: ids by slot, counts, steps, values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from des_core.config import TableConfig
from des_core.data.read.hashing import splitmix64
from des_core.engine.weights import index
from des_core.engine.weights.table import Table

Array = np.ndarray[Any, np.dtype[Any]]
WIDTH, STATE = 5, 2
TABLES = 3


def both(device: torch.device, **settings: Any) -> tuple[Table, Any]:
    """The CPU's table and the device's, of the same settings."""
    from des_core.engine.device.table import DeviceTable

    words = (WIDTH, STATE, 7, 0.1, TableConfig(**settings))
    cpu = Table(*words, torch.device("cpu"), torch.float32)
    return cpu, DeviceTable(*words, device, torch.float32, chunk_bits=5)


def step(cpu: Table, device: Any, ids_L: Array, number: int, mine_L: Array | None = None) -> None:
    """Look a batch up in both; they must agree on every lookup."""
    mine_L = np.ones(len(ids_L), np.int8) if mine_L is None else mine_L
    piece_L = (ids_L.view(np.uint64) % TABLES).astype(np.int64)
    own = mine_L != 0
    ids_U, inverse, first_U, counts_U = index.dedupe(ids_L[own])
    staged = cpu.stage(ids_U, piece_L[own][first_U].astype(np.uint16), counts_U, number)
    cpu.commit(staged)
    to = [torch.from_numpy(a).to(device.rows.device) for a in (ids_L, mine_L, piece_L)]
    slots_L = look_up(device, *to, number)
    expected = np.full(len(ids_L), -1)
    expected[own] = staged.slots_U[inverse]
    assert slots_L.tolist() == expected.tolist()


def look_up(device: Any, ids_L: torch.Tensor, mine_L: torch.Tensor, piece_L: torch.Tensor, number: int) -> Any:
    """Slots of a step's lookups, which are counted."""
    from des_core.engine.device.batch import Places, control_of, segments_of
    from des_core.engine.device.pooling import Pooled

    control = control_of(7, number).to(ids_L.device)
    device.make_room(len(ids_L))
    slots_L = device.look_up(ids_L, mine_L, piece_L, torch.arange(TABLES, device=ids_L.device), control)
    device.ask_used()
    pooled = Pooled(device.rows, device.keys.ids, slots_L, Places(len(ids_L), 1), False, False)
    pooled.meet(segments_of(slots_L), device.keys.counts, device.keys.last, control, None)
    return slots_L


def assert_equal(cpu: Table, device: Any) -> None:
    """Every entry of both tables is the same."""
    used = cpu.used
    assert device.used == used
    ids, tables, counts, last = device.keys.arrays()
    assert ids.tolist() == cpu.ids.tolist()
    assert tables.tolist() == cpu.tables.tolist()
    assert counts.tolist() == cpu.counts.tolist()
    assert last.tolist() == cpu.last.tolist()
    rows, state = device.rows.read(0, used)
    assert torch.equal(rows.cpu(), cpu.rows_SK) and torch.equal(state.cpu(), cpu.state_SZ)
    waiting = cpu.candidates
    theirs = {i: (t, c, n) for i, t, c, n in zip(*(a.tolist() for a in device.candidates), strict=True)}
    columns = (waiting.ids, waiting.tables, waiting.counts, waiting.last)
    ours = {i: (t, c, n) for i, t, c, n in zip(*(a.tolist() for a in columns), strict=True)}
    assert theirs == ours
    assert device.candidates.used == waiting.used and device.admitted == cpu.admitted


def alone(counts: Array) -> Array:
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"admit_count": 3},
        {"admit_probability": 0.4},
        {"idle_steps": 4},
        {"max_rows": 60},
        {"max_rows": 60, "budget_keeps": "recent"},
        {"admit_count": 2, "idle_steps": 5, "max_rows": 80},
        {"evict_zero": True},
    ],
    ids=str,
)
def test_the_same_rows_after_every_batch(device: torch.device, settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    cpu, other = both(device, **settings)
    for number in range(1, 13):
        # New values come, old ones vanish; some ids are looked up often.
        ids = rng.integers(0, 2**62, 400)[rng.integers(20 * number, 20 * number + 60, 150) % 400]
        ids[:20] = np.arange(20) // 4
        step(cpu, other, ids, number)
        assert_equal(cpu, other)
        if number % 4 == 0:
            if settings.get("evict_zero"):
                gone = [2, 5, cpu.used - 1]
                cpu.rows_SK[gone] = 0
                rows, state = other.rows.read(0, other.used)
                rows = rows.clone()
                rows[gone] = 0
                other.rows.write(0, rows, state.clone())
            assert other.evict(number, alone) == cpu.evict(number, alone)
            assert_equal(cpu, other)
    assert cpu.used > 40


def test_days_that_are_over_go(device: torch.device) -> None:
    cpu, other = both(device)
    for number in range(1, 7):
        step(cpu, other, np.arange(10 * number, 10 * number + 15), number)
    assert cpu.evict(6, alone, idle_before=4) == other.evict(6, alone, idle_before=4) > 0
    assert_equal(cpu, other)


def test_ids_that_collide_and_odd_ids(device: torch.device) -> None:
    cpu, other = both(device)
    ids = np.concatenate([np.arange(40, dtype=np.int64) << 40, np.array([0, -1, 2**63 - 1, -(2**63)], np.int64)])
    for number in (1, 2):
        step(cpu, other, np.concatenate([ids, ids[::-1]]), number)
    assert_equal(cpu, other)


def test_growth_moves_no_slot(device: torch.device) -> None:
    cpu, other = both(device)
    for number in range(1, 4):
        step(cpu, other, np.arange(1 << 10) * 7919 + (number << 20), number)
    assert other.keys.capacity > 1024
    assert_equal(cpu, other)


def test_a_worker_that_owns_nothing_of_a_batch_makes_no_row(device: torch.device) -> None:
    cpu, other = both(device)
    step(cpu, other, np.arange(30), 1, np.zeros(30, np.int8))
    assert other.used == cpu.used == 0
    step(cpu, other, np.arange(30), 2, (np.arange(30) % 2).astype(np.int8))
    assert_equal(cpu, other)


def test_a_checkpoint_goes_from_one_to_the_other_and_back(device: torch.device) -> None:
    cpu, other = both(device, admit_count=2)
    rng = np.random.default_rng(2)
    for number in range(1, 5):
        step(cpu, other, rng.integers(0, 90, 80), number)
    cpu_again, other_again = both(device, admit_count=2)
    rows, state = (tensor.cpu().numpy() for tensor in other.rows.read(0, other.used))
    cpu_again.restore(*other.keys.arrays(), rows, state)
    cpu_again.restore_candidates(*other.candidates)
    other_again.restore(cpu.ids, cpu.tables, cpu.counts, cpu.last, cpu.rows_SK.numpy(), cpu.state_SZ.numpy())
    waiting = cpu.candidates
    other_again.restore_candidates(waiting.ids, waiting.tables, waiting.counts, waiting.last)
    for number in range(5, 8):
        step(cpu_again, other_again, rng.integers(0, 120, 80), number)
        assert_equal(cpu_again, other_again)


@pytest.mark.parametrize("admit_count", [1, 2])
def test_a_batch_without_a_lookup_changes_nothing(device: torch.device, admit_count: int) -> None:
    """As where all lists of a batch are empty."""
    _, other = both(device, admit_count=admit_count)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    for number, ids in enumerate((none, torch.arange(9, device=device), none), 1):
        mine = torch.ones(len(ids), dtype=torch.int8, device=device)
        slots_L = look_up(other, ids, mine, ids % TABLES, number)
        assert len(slots_L) == len(ids) and (slots_L >= 0).all() == (admit_count == 1 or not len(ids))
    assert other.used == (9 if admit_count == 1 else 0)


class Late:
    """An event of a copy that is there at every second question."""

    asked = 0

    def record(self) -> None: ...

    def query(self) -> bool:
        self.asked += 1
        return self.asked % 2 == 0


@pytest.mark.parametrize("room", [0, 2771, 2800, 3000])
def test_a_table_that_grows_no_more_waits_for_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """However little room is left, it is asked once how many rows there are, and rows that never come take none."""
    from des_core.engine.device.table import DeviceKeys

    waits = []
    used = DeviceKeys.used.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(DeviceKeys, "used", property(lambda keys: waits.append(1) or used(keys)))
    keys = DeviceKeys(device)
    keys._copied = Late()  # type: ignore[assignment]
    keys.make_room(2600)
    keys.used_1.fill_(2600)
    keys.bound, keys.room = 2600, room or keys.room
    keys.columns = [column[: keys.room] for column in keys.columns]
    waits.clear()
    bounds = []
    for _ in range(60):
        keys.make_room(170)
        bounds.append(keys.bound)
        keys.ask_used()
    assert len(waits) <= 2
    assert max(bounds) <= 2600 + 4 * 170


def test_new_rows_always_have_room(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the host does not know yet how many came in the last batches."""
    from des_core.engine.device.table import MAX_LOAD, DeviceKeys

    # No id is written here, and ids that are all the same take long to enter.
    monkeypatch.setattr(DeviceKeys, "rebuild", lambda keys: None)
    keys = DeviceKeys(device)
    keys._copied = Late()  # type: ignore[assignment]
    for number in range(1, 41):
        keys.make_room(170)
        keys.used_1 += 170
        assert 170 * number <= keys.bound <= len(keys.ids)
        assert keys.bound <= MAX_LOAD * keys.capacity
        keys.ask_used()


def test_a_device_without_room_says_what_would_fit() -> None:
    from des_core.engine.device.rows import DeviceRows
    from des_core.errors import UserError

    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    rows = DeviceRows(17, 2, torch.device("cpu"), torch.float32, allocate=full)
    with pytest.raises(
        UserError, match=r"1,000,000 rows of 17 numbers need 80 MB on cpu, .*table.max_rows .*more GPUs"
    ):
        rows.grow(1_000_000)


def test_more_rows_than_an_index_takes_are_refused(device: torch.device) -> None:
    from des_core.engine.device.table import DeviceKeys
    from des_core.errors import UserError

    keys = DeviceKeys(device)
    # A slot beyond would be a negative number where lookups are sorted.
    keys.used_1.fill_(2**31 - 6)
    with pytest.raises(UserError, match="its index takes 2,147,483,647"):
        keys.make_room(10)


def test_hundred_million_rows_take_no_more_than_twelve_gigabytes() -> None:
    """Also while the columns or the index grow, and with the room that growth leaves."""
    from des_core.engine.device.rows import DeviceRows
    from des_core.engine.device.table import DeviceKeys, capacity_for

    rows, most = DeviceRows(17, 2, torch.device("cpu"), torch.float32), 100_000_000
    each = [column.element_size() for column in DeviceKeys(torch.device("cpu")).columns]
    chunks = -(-most // (1 << rows.shift)) * (rows.slot_bytes << rows.shift)
    # A batch of 65,536 samples of 26 fields has room ahead of it.
    index = 8 * capacity_for(most + 4 * 26 * 65_536)
    room = most * 9 / 8
    assert chunks + index + room * sum(each) <= 11.2e9
    # Columns grow one by one: the ids, the widest and first, are held twice for a moment.
    assert chunks + index + room * each[0] + most * sum(each) <= 11.9e9


def test_ids_with_equal_low_halves_do_not_meet(device: torch.device) -> None:
    """Nor do ids in steps of any power of two: searches stay as short as for ids drawn at random."""
    from des_core.engine.device.table import DeviceKeys

    many = 1000
    numbers = np.arange(many, dtype=np.int64)
    for ids in (numbers << 32, numbers << 40, numbers * 64, -numbers):
        keys = DeviceKeys(device)
        keys.append(ids, np.zeros(many, np.uint16), np.zeros(many, np.uint32), np.zeros(many, np.uint32))
        entries = keys.entries[: keys.capacity].cpu().numpy()
        slots = torch.arange(many, device=device)
        homes = np.array([int(splitmix64(np.uint64(word))) % keys.capacity for word in ids.view(np.uint64)])
        place = np.empty(many, np.int64)
        taken = np.flatnonzero(entries)
        place[(entries[taken] & 0xFFFFFFFF) - 1] = taken
        walked = (place - homes) % keys.capacity
        assert walked.max() < 100 and walked.mean() < 4
        found = keys.find(keys.ids[:many], torch.ones(many, dtype=torch.int8, device=device))
        assert torch.equal(found.long(), slots)


def test_an_index_that_finds_no_memory_says_what_would_fit(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from des_core.engine.device import table
    from des_core.errors import UserError

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    for what in ("_longer", "_new_entries"):
        keys = table.DeviceKeys(device)
        target = table if what == "_longer" else table.DeviceKeys
        with monkeypatch.context() as patch:
            patch.setattr(target, what, full)
            with pytest.raises(UserError, match=r"index and the counters of 40,000 rows need .*table.max_rows .*GPUs"):
                keys.make_room(10_000)
