"""The index from id to slot: open addressing in one flat array that doubles in place; ids are stored in slot order.

An entry is 64 bits: the id's low half as a tag, and slot + 1; zero is empty. Probing is linear from the
tag's low bits, so an entry says where it is at home without its id: doubling is one walk through the
entries, and a deletion shifts back those that follow. A tag that matches is confirmed against the full
id, so no id is a reserved marker. Capacity is a power of two, at most 0.6 full. Entries and ids
are fetched ``AHEAD`` keys before their turn, so that their cache misses overlap. All of it runs outside the
interpreter's lock.

Sources: Knuth, TAOCP 3, 6.4, algorithms L and R (linear probing, deletion); Chen et al., "Improving hash
join performance through prefetching", ICDE 2004.
Dims: C entries, S slots in use, Q ids asked for, L lookups, U unique ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, uint32, uint64

from des_core.data.read.hashing import splitmix64
from des_core.engine.weights.memory import Memory, prefetch
from des_core.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

MAX_LOAD = 0.6
MOST_SLOTS = int(MAX_LOAD * 2**32)
"""An entry holds 32 bits of the slot, and of the id as many as say where it is at home."""
AHEAD = 16
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_ONE = np.uint64(1)
_NONE = np.uint64(0)


def capacity_for(slots: int, most: int = MOST_SLOTS) -> int:
    """The least power of two that holds ``slots``, ``most`` at the most, at the maximum load.

    Raises:
        UserError: they are more than one index takes.
    """
    if slots > most:
        raise UserError(
            f"a worker would hold {slots:,} rows, and its index takes {most:,}; use more workers, or bound the "
            "rows by table.max_rows or table.admit_count"
        )
    return max(1024, 1 << int(np.ceil(np.log2(max(slots, 1) / MAX_LOAD))))


class Keys:
    """Ids that hold slots 0 .. used - 1, and what is known of each; growth moves no slot, removal does."""

    def __init__(self) -> None:
        self.used = 0
        self._entries = Memory(np.uint64)
        self._capacity = capacity_for(0)
        self._ids, self._tables = Memory(np.int64), Memory(np.uint16)
        self._counts, self._last = Memory(np.uint32), Memory(np.uint32)
        self._columns = (self._ids, self._tables, self._counts, self._last)

    @property
    def ids(self) -> Array:
        """Ids in slot order, int64 [S]."""
        return self._ids.array[: self.used]

    @property
    def tables(self) -> Array:
        """Numbers of the tables that the ids belong to, uint16 [S]."""
        return self._tables.array[: self.used]

    @property
    def counts(self) -> Array:
        """Lookups of each id so far, uint32 [S]; they stay at 2^32 - 1."""
        return self._counts.array[: self.used]

    @property
    def last(self) -> Array:
        """The last step that looked up each id, uint32 [S]."""
        return self._last.array[: self.used]

    @property
    def load(self) -> float:
        """Share of the index in use."""
        return self.used / self._capacity

    @property
    def memory_bytes(self) -> int:
        """Bytes of the index and of what is known of the ids."""
        return self._entries.held_bytes(self._capacity) + sum(column.held_bytes(self.used) for column in self._columns)

    def find(self, ids_U: Array) -> Array:
        """Slots [U], -1 where unseen."""
        found: Array = find(self._entries.array[: self._capacity], self.ids, ids_U)
        return found

    def insert(self, ids: Array, tables: Array, counts: Array | int = 0, last: Array | int = 0) -> Array:
        """New slots of ids, none of which is here yet."""
        start, stop = self.used, self.used + len(ids)
        capacity_for(stop, MOST_SLOTS)
        for column, values in zip(self._columns, (ids, tables, counts, last), strict=True):
            column.grow(stop)
            column.array[start:stop] = values
        while stop > MAX_LOAD * self._capacity:
            self._capacity *= 2
            self._entries.grow(self._capacity)
            double(self._entries.array[: self._capacity])
        place(self._entries.array[: self._capacity], self._ids.array, start, stop)
        self.used = stop
        return np.arange(start, stop)

    def record_lookups(self, slots_U: Array, counts_U: Array, step: int) -> Array:
        """Count lookups at ``step``; the last step before it that looked up each slot [U], ``step`` for slot -1."""
        before_U: Array = count_lookups(self._counts.array, self._last.array, slots_U, counts_U, np.uint32(step))
        return before_U

    def remove(self, slots: Array) -> tuple[Array, Array]:
        """Free distinct slots; (from, to) of the last ones, which moved into the holes."""
        entries_C, ids = self._entries.array[: self._capacity], self._ids.array
        stay = self.used - len(slots)
        in_tail = slots >= stay
        tail = np.ones(len(slots), np.bool_)
        tail[slots[in_tail] - stay] = False
        source, target = stay + np.flatnonzero(tail), slots[~in_tail]
        erase(entries_C, ids, slots)
        redirect(entries_C, ids, source, target)
        for column in self._columns:
            column.array[target] = column.array[source]
        self.used = stay
        return source, target

    def release(self) -> None:
        """Give back the memory of slots that are free."""
        for column in self._columns:
            column.release(self.used)


@njit(nogil=True, cache=True)
def _probe(entries_C: Array, wanted: Any, at: Any) -> Any:
    """Slot of the first entry from ``at`` on with the tag of ``wanted``, or -1; and where the search ended."""
    mask = uint64(len(entries_C) - 1)
    entry = entries_C[at]
    while entry != 0 and entry >> _HALF != wanted & _LOW:
        at = (at + _ONE) & mask
        entry = entries_C[at]
    return np.int64(entry & _LOW) - 1, at


@njit(nogil=True, cache=True)
def find(entries_C: Array, ids_S: Array, query_Q: Array) -> Array:
    """Slots [Q] of ids, -1 where unseen."""
    mask = uint64(len(entries_C) - 1)
    end = len(query_Q) - 1
    slots_Q = np.empty(len(query_Q), np.int64)
    for i in range(len(query_Q)):
        prefetch(entries_C, uint64(query_Q[min(i + AHEAD, end)]) & mask)
        wanted = uint64(query_Q[i])
        slots_Q[i], _ = _probe(entries_C, wanted, wanted & mask)
    for i in range(len(query_Q)):
        prefetch(ids_S, uint64(max(slots_Q[min(i + AHEAD, end)], 0)))
        if slots_Q[i] >= 0 and ids_S[slots_Q[i]] != query_Q[i]:
            # Another id has this tag: search again, comparing ids.
            wanted = uint64(query_Q[i])
            slot, at = _probe(entries_C, wanted, wanted & mask)
            while slot >= 0 and ids_S[slot] != query_Q[i]:
                slot, at = _probe(entries_C, wanted, (at + _ONE) & mask)
            slots_Q[i] = slot
    return slots_Q


@njit(nogil=True, cache=True)
def _seat(entries_C: Array, entry: Any) -> None:
    """Enter an entry at the first free place from its home on."""
    mask = uint64(len(entries_C) - 1)
    at = (entry >> _HALF) & mask
    while entries_C[at] != 0:
        at = (at + _ONE) & mask
    entries_C[at] = entry


@njit(nogil=True, cache=True)
def place(entries_C: Array, ids_S: Array, first: int, last: int) -> None:
    """Insert slots [first, last), whose ids are in ``ids_S``, into the index."""
    mask = uint64(len(entries_C) - 1)
    for slot in range(first, last):
        prefetch(entries_C, uint64(ids_S[min(slot + AHEAD, last - 1)]) & mask)
        _seat(entries_C, uint64(ids_S[slot]) << _HALF | uint64(slot + 1))


@njit(nogil=True, cache=True)
def double(entries_C: Array) -> None:
    """Spread the entries of the first half over the whole array, whose second half is empty."""
    run = 0
    while entries_C[run] != 0:
        run += 1
    # The run at the front may have begun at the old end; it waits until both ends are done.
    front = entries_C[:run].copy()
    entries_C[:run] = 0
    for at in range(run, len(entries_C) // 2):
        entry = entries_C[at]
        # An entry finds its place where it was, before it, or in the other half: never ahead of this walk.
        entries_C[at] = 0
        if entry != 0:
            _seat(entries_C, entry)
    for entry in front:
        _seat(entries_C, entry)


@njit(nogil=True, cache=True)
def _locate(entries_C: Array, ids_S: Array, slot: int) -> Any:
    """Where a slot is entered."""
    mask = uint64(len(entries_C) - 1)
    at = uint64(ids_S[slot]) & mask
    while entries_C[at] & _LOW != uint64(slot + 1):
        at = (at + _ONE) & mask
    return at


@njit(nogil=True, cache=True)
def erase(entries_C: Array, ids_S: Array, slots: Array) -> None:
    """Remove the entries of slots, whose ids are still in ``ids_S``."""
    mask = uint64(len(entries_C) - 1)
    for i in range(len(slots)):
        prefetch(entries_C, uint64(ids_S[slots[min(i + AHEAD, len(slots) - 1)]]) & mask)
        hole = _locate(entries_C, ids_S, slots[i])
        at = (hole + _ONE) & mask
        while entries_C[at] != 0:
            # An entry whose way from home leads over the hole moves back into it.
            if (at - (entries_C[at] >> _HALF)) & mask >= (at - hole) & mask:
                entries_C[hole] = entries_C[at]
                hole = at
            at = (at + _ONE) & mask
        entries_C[hole] = 0


@njit(nogil=True, cache=True)
def redirect(entries_C: Array, ids_S: Array, source: Array, target: Array) -> None:
    """Change the entries of slots ``source`` to ``target``; ids are not moved yet."""
    mask = uint64(len(entries_C) - 1)
    for i in range(len(source)):
        prefetch(entries_C, uint64(ids_S[source[min(i + AHEAD, len(source) - 1)]]) & mask)
        at = _locate(entries_C, ids_S, source[i])
        entries_C[at] = entries_C[at] & ~_LOW | uint64(target[i] + 1)


@njit(nogil=True, cache=True)
def count_lookups(counts_S: Array, last_S: Array, slots_U: Array, counts_U: Array, step: Any) -> Array:
    """The ``last`` of slots [U] so far, now ``step``, with ``counts_U`` added to their counts; slot -1 is no one."""
    before_U = np.full(len(slots_U), step, np.uint32)
    for i in range(len(slots_U)):
        ahead = uint64(max(slots_U[min(i + AHEAD, len(slots_U) - 1)], 0))
        prefetch(counts_S, ahead)
        prefetch(last_S, ahead)
        slot = slots_U[i]
        if slot >= 0:
            before_U[i] = last_S[slot]
            last_S[slot] = step
            counts_S[slot] = uint32(min(uint64(counts_S[slot]) + uint64(counts_U[i]), _LOW))
    return before_U


@njit(nogil=True, cache=True, inline="always")
def _scattered(id_: Any, secret: Any) -> Any:
    return splitmix64(uint64(id_) ^ secret) if secret else uint64(id_)


@njit(nogil=True, cache=True)
def dedupe(ids_L: Array, secret: Any = _NONE) -> tuple[Array, Array, Array, Array]:
    """Unique ids [U] in order of first appearance, inverse [L], first lookup [U] and count uint32 [U] of each.

    Args:
        secret: scatters ids (uint64), so that nobody can choose ids which all want one seat; 0: they lie by their own
            bits, which are random where they are keys of values that nobody chose.
    """
    size = 1024
    while size < 2 * len(ids_L):
        size *= 2
    mask = uint64(size - 1)
    # Clearing new seats costs less than finding the old ones again.
    seats = np.zeros(size, np.int32)
    unique, first = np.empty(len(ids_L), np.int64), np.empty(len(ids_L), np.int64)
    inverse, counts = np.empty(len(ids_L), np.int64), np.zeros(len(ids_L), np.uint32)
    used = 0
    for i in range(len(ids_L)):
        prefetch(seats, _scattered(ids_L[min(i + AHEAD, len(ids_L) - 1)], secret) & mask)
        at = _scattered(ids_L[i], secret) & mask
        seat = seats[at]
        while seat != 0 and unique[uint64(seat - 1)] != ids_L[i]:
            at = (at + _ONE) & mask
            seat = seats[at]
        if seat == 0:
            unique[used] = ids_L[i]
            first[used] = i
            used += 1
            seat = used
            seats[at] = seat
        inverse[i] = seat - 1
    # Apart, so that a frequent id's count does not wait for itself.
    for i in range(len(ids_L)):
        counts[uint64(inverse[i])] += uint32(1)
    return unique[:used], inverse, first[:used], counts[:used]
