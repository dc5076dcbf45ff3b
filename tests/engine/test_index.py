"""Keys are a dict in slot order, whatever is inserted and removed; memory grows in place or by copying."""

from __future__ import annotations

import numpy as np
import pytest

from des_core.engine.weights import index
from des_core.engine.weights.index import Array, Keys
from des_core.engine.weights.memory import HUGE_PAGE, Memory
from des_core.errors import UserError

EDGES = np.array([0, -1, 1, 1 << 32, -(1 << 32), -(1 << 63), (1 << 63) - 1], np.int64)


def drawn(rng: np.random.Generator, kind: str, size: int) -> Array:
    """Distinct ids: spread evenly, on few homes, with few tags, or at the end of any capacity."""
    wide = rng.integers(-(1 << 63), (1 << 63) - 1, size)
    ids = {
        "even": wide,
        "one home": wide & ~np.int64(0xFFFF) | rng.integers(5, 8, size),
        "one tag": wide << 32 | 7,
        "end": wide | 0xFFFF,
    }[kind]
    return rng.permutation(np.unique(np.concatenate([ids, EDGES])))


class Oracle:
    """A dict from id to what is known of it."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, int, int]] = {}

    def agrees(self, keys: Keys, others: Array) -> None:
        ids = keys.ids.tolist()
        facts = zip(keys.tables.tolist(), keys.counts.tolist(), keys.last.tolist(), strict=True)
        assert dict(zip(ids, facts, strict=True)) == self.known
        assert len(ids) == keys.used == len(self.known)
        assert np.array_equal(keys.find(keys.ids.copy()), np.arange(keys.used))
        assert [slot < 0 for slot in keys.find(others).tolist()] == [i not in self.known for i in others.tolist()]
        assert 0 < keys.load <= index.MAX_LOAD


@pytest.mark.parametrize("kind", ["even", "one home", "one tag", "end"])
@pytest.mark.parametrize("seed", range(3))
def test_keys_are_a_dict_through_growth_and_removal(kind: str, seed: int) -> None:
    rng, keys, oracle = np.random.default_rng(seed), Keys(), Oracle()
    for step in range(1, 25):
        ids = drawn(rng, kind, int(rng.integers(1, 300 if kind != "even" else 6000)))
        slots = keys.find(ids)
        new = ids[slots < 0]
        slots[slots < 0] = keys.insert(new, (new & 0xFF).astype(np.uint16))
        assert np.array_equal(keys.ids[slots], ids)
        counts = rng.integers(1, 9, len(ids)).astype(np.uint32)
        before = keys.record_lookups(slots, counts, step)
        for i, count, last in zip(ids.tolist(), counts.tolist(), before.tolist(), strict=True):
            _, lookups, met = oracle.known.get(i, (0, 0, 0))
            assert met == last
            oracle.known[i] = (i & 0xFF, lookups + count, step)
        gone = rng.permutation(keys.used)[: int(keys.used * rng.random() * (0.9 if step % 6 == 0 else 0.2))]
        old_ids = keys.ids.copy()
        source, target = keys.remove(gone)
        for i in old_ids[gone].tolist():
            del oracle.known[i]
        assert np.array_equal(keys.ids[target], old_ids[source])
        stayed = np.setdiff1d(np.arange(keys.used), target)
        assert np.array_equal(keys.ids[stayed], old_ids[stayed])
        oracle.agrees(keys, np.concatenate([old_ids[gone], ids, drawn(rng, kind, 50)]))


def test_doubling_keeps_every_entry_reachable() -> None:
    """Also those of a run that begins at the end and goes on at the front."""
    for ids in (np.arange(-300, 300), np.repeat(np.arange(20), 30) - 10 + (np.arange(600) << 16), np.arange(614)):
        entries = np.zeros(8192, np.uint64)
        index.place(entries[:1024], ids, 0, len(ids))
        for capacity in (2048, 4096, 8192):
            index.double(entries[:capacity])
            assert np.array_equal(index.find(entries[:capacity], ids, ids), np.arange(len(ids)))
            assert np.count_nonzero(entries) == len(ids)
            assert (index.find(entries[:capacity], ids, ids + (1 << 40)) == -1).all()


def test_counts_stay_at_their_maximum() -> None:
    keys = Keys()
    slots = keys.insert(EDGES, np.zeros(len(EDGES), np.uint16))
    most = np.full(len(EDGES), (1 << 32) - 2, np.uint32)
    for _ in range(2):
        keys.record_lookups(slots, most, 1)
    assert (keys.counts == (1 << 32) - 1).all()


def test_slot_minus_one_meets_no_one() -> None:
    keys = Keys()
    keys.insert(EDGES, np.zeros(len(EDGES), np.uint16))
    assert keys.record_lookups(np.array([-1, 2, -1]), np.full(3, 5, np.uint32), 9).tolist() == [9, 0, 9]
    assert keys.counts.tolist() == [0, 0, 5, 0, 0, 0, 0] and keys.last.tolist() == [0, 0, 9, 0, 0, 0, 0]


@pytest.mark.parametrize("ids", [np.zeros(0, np.int64), EDGES.repeat(3), np.random.default_rng(3).zipf(1.3, 10_000)])
def test_dedupe_is_unique_with_inverse_and_counts(ids: Array) -> None:
    unique, inverse, first, counts = index.dedupe(ids)
    assert np.array_equal(unique[inverse], ids)
    assert np.array_equal(ids[first], unique)
    assert np.array_equal(np.sort(unique), np.unique(ids))
    assert (np.diff(first) > 0).all()
    assert np.array_equal(counts, np.bincount(inverse, minlength=len(unique))) and counts.dtype == np.uint32


@pytest.mark.parametrize("held", [False, True])
def test_memory_grows_with_zeros_and_lets_views_live(held: bool) -> None:
    memory = Memory(np.int64)
    memory.array[:] = np.arange(len(memory.array))
    old = len(memory.array)
    view = memory.array[:] if held else np.zeros(0)
    for length in (old + 1, 9 * old):
        memory.grow(length)
        assert len(memory.array) >= length
        assert np.array_equal(memory.array[:old], np.arange(old)) and not memory.array[old:].any()
    memory.array[0] = -5
    assert np.array_equal(view, np.arange(old) if held else [])


def test_released_memory_reads_as_zero() -> None:
    memory = Memory(np.uint16)
    memory.grow(4 * HUGE_PAGE)
    memory.array[:] = 3
    memory.release(HUGE_PAGE // 2 + 1)
    assert (memory.array[:HUGE_PAGE] == 3).all() and not memory.array[HUGE_PAGE:].any()


def test_more_rows_than_an_index_takes_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 0.6 * 2^32 rows an entry's bits would not do, in silence."""
    assert index.capacity_for(index.MOST_SLOTS) == 1 << 32
    with pytest.raises(
        UserError, match=r"a worker would hold 2,576,980,378 rows, and its index takes 2,576,980,377; use"
    ):
        index.capacity_for(index.MOST_SLOTS + 1)
    keys = index.Keys()
    monkeypatch.setattr(index, "MOST_SLOTS", 10)
    keys.insert(np.arange(1, 11), np.zeros(10, np.uint16))
    with pytest.raises(UserError, match="a worker would hold 11 rows"):
        keys.insert(np.array([99]), np.zeros(1, np.uint16))
    assert keys.used == 10 and keys.find(np.array([99])).tolist() == [-1]
