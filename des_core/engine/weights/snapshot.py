"""A table's rows as they were at a step, read by another thread while training goes on.

At a pause only counters are copied: which slots are wanted, their lookups, their last steps. A row is copied when a
step is about to change it and it has not been written yet; the thread takes such a row from the copies and all others
from the table. Copies take at most an eighth of the table: a step that would need more waits for the thread. One
lock guards what may move: rows that grow, and ids.

Dims: S slots, M slots that are wanted, n of them in a block, T tables, H buckets, K numbers per row, Z of state.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import njit, uint64

from des_core.checkpoint.blocks import block_bytes, prefixes
from des_core.data.feed.batches import BUCKET_BITS, BUCKETS
from des_core.engine.weights.memory import Memory

Array = np.ndarray[Any, np.dtype[Any]]

WAITS, WRITTEN = -1, -2
"""Of a slot: it is not written yet and unchanged; it is written, or not wanted. Else its place among the copies."""
COUNTERS_BYTES = 16
"""Of a row, beside its numbers: id, count, last step."""


class BlockRows(NamedTuple):
    """Rows of one block: their table's number, and what ``BlockWriter.add_rows`` takes."""

    table: int
    ids: Array
    last: Array
    rows_nK: Array
    counts: Array
    state_nZ: Array


class Source(Protocol):
    """Where a snapshot's rows lie; the views are taken anew under the lock."""

    lock: threading.Lock

    def views(self) -> tuple[Array, Array, Array]:
        """Ids [S], rows [S, K] and state [S, Z]."""


class HostRows:
    """Ids [S], rows [S, K] and state [S, Z] that nobody changes, as a source."""

    def __init__(self, ids: Array, rows_SK: Array, state_SZ: Array) -> None:
        self.lock = threading.Lock()
        self._views = (ids, rows_SK, state_SZ)

    def views(self) -> tuple[Array, Array, Array]:
        """The arrays."""
        return self._views


class Snapshot:
    """The rows that were looked up after step ``since``.

    Args:
        source: of ids, rows and state.
        tables, counts, last: of the slots, as they are now.
        since: 0 for all rows.
    """

    def __init__(self, source: Source, tables: Array, counts: Array, last: Array, since: int) -> None:
        self._source = source
        with source.lock:
            ids, rows_SK, state_SZ = source.views()
            self._order, starts = _by_cell(ids, tables, last, np.uint32(since), int(tables.max(initial=0)) + 1)
            self._dtype, self._width, self._zeros = rows_SK.dtype, rows_SK.shape[1], state_SZ.shape[1]
            del ids, rows_SK, state_SZ
        self._starts = starts
        self._counts, self._last = counts[self._order], last[self._order]
        self._place = np.full(len(tables), WRITTEN, np.int32)
        self._place[self._order] = WAITS
        self._copies, self._copied = Memory(self._dtype), 0
        self._most = max(len(tables) // 8, 1 << 12)
        self.done = threading.Event()
        """Nothing is read from the table any more."""

    @property
    def rows(self) -> int:
        """Rows wanted, M."""
        return len(self._order)

    @property
    def row_bytes(self) -> int:
        """Of a row, its state and its counters."""
        return int((self._width + self._zeros) * self._dtype.itemsize) + COUNTERS_BYTES

    @property
    def form(self) -> tuple[int, int, str]:
        """Numbers per row, numbers of state, and their type."""
        return self._width, self._zeros, str(self._dtype)

    def keep(self, slots: Array) -> None:
        """Copy the rows of slots, which are about to change, as far as they are still to be written."""
        if self.done.is_set():
            return
        wanted = self._waiting(slots)
        if not len(wanted):
            return
        if self._copied + len(wanted) > self._most:
            self.done.wait()
            return
        with self._source.lock:
            wanted = self._waiting(wanted)
            _, rows_SK, state_SZ = self._source.views()
            wide = self._width + self._zeros
            self._copies.grow((self._copied + len(wanted)) * wide)
            copies = self._copies.array[: len(self._copies.array) // wide * wide].reshape(-1, wide)
            _copy(rows_SK, state_SZ, wanted, copies, self._copied, self._place)
            self._copied += len(wanted)

    def blocks(self) -> Iterator[BlockRows]:
        """All rows, block by block, ids ascending within a table; ``done`` is set when they are taken, or left."""
        most = max(block_bytes(self.rows * self.row_bytes) // self.row_bytes, 1)
        try:
            for first, stop in _grouped(self._starts, most):
                with self._source.lock:
                    ids = self._source.views()[0][self._order[first:stop]]
                turn = np.argsort(ids.view(np.uint64))
                for piece in _cut(ids[turn], most):
                    yield self._take(first, turn[piece], ids[turn[piece]])
        finally:
            self.done.set()
            self._copies = Memory(self._dtype)

    def _take(self, first: int, turn: Array, ids: Array) -> BlockRows:
        places = first + turn
        slots = self._order[places]
        rows_nK = np.empty((len(slots), self._width), self._dtype)
        state_nZ = np.empty((len(slots), self._zeros), self._dtype)
        with self._source.lock:
            _, rows_SK, state_SZ = self._source.views()
            wide = self._width + self._zeros
            copies = self._copies.array[: len(self._copies.array) // wide * wide].reshape(-1, wide)
            _take(rows_SK, state_SZ, copies, slots, self._place, rows_nK, state_nZ)
        return BlockRows(
            _table_at(self._starts, first), ids, self._last[places], rows_nK, self._counts[places], state_nZ
        )

    def _waiting(self, slots: Array) -> Array:
        """Those of slots that are still to be written and not copied."""
        return slots[_is_waiting(self._place, slots)]


def sorted_blocks(ids: Array, tables: Array, most: int) -> Iterator[tuple[int, Array]]:
    """Blocks of ids that are all in memory: a table's number, and the places of at most about ``most`` ids."""
    order, starts = _by_cell(ids, tables, np.ones(len(ids), np.uint32), np.uint32(0), int(tables.max(initial=0)) + 1)
    for first, stop in _grouped(starts, most):
        places = order[first:stop][np.argsort(ids[order[first:stop]].view(np.uint64))]
        table = _table_at(starts, first)
        for piece in _cut(ids[places], most):
            yield table, places[piece]


def _table_at(starts: Array, place: int) -> int:
    """The table whose cells hold a place in their order."""
    return int(np.searchsorted(starts, place, side="right") - 1) // BUCKETS


def _grouped(starts: Array, most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring cells of one table together, as long as they hold at most ``most``; a larger one alone."""
    edges = starts.tolist()
    for table in range(0, len(edges) - 1, BUCKETS):
        begin = edges[table]
        for cell in range(table, min(table + BUCKETS, len(edges) - 1)):
            if edges[cell + 1] - begin > most and edges[cell] > begin:
                yield begin, edges[cell]
                begin = edges[cell]
        stop = edges[min(table + BUCKETS, len(edges) - 1)]
        if stop > begin:
            yield begin, stop


def _cut(ids: Array, most: int) -> Iterator[slice]:
    """Ascending ids in pieces of about ``most``, no prefix in two of them."""
    start = 0
    while start < len(ids):
        stop = min(start + most, len(ids))
        if stop < len(ids):
            prefix = prefixes(ids)
            # To the end of the prefix that the piece would cut.
            stop = int(np.searchsorted(prefix, prefix[stop - 1], side="right"))
        yield slice(start, stop)
        start = stop


@njit(nogil=True, cache=True)
def _by_cell(ids: Array, tables: Array, last: Array, since: Any, many: int) -> Any:
    """Slots whose last step is after ``since``, by table and bucket, uint32 [M]; where each cell begins [T H + 1]."""
    shift = uint64(64 - BUCKET_BITS)
    starts = np.zeros(many * BUCKETS + 1, np.int64)
    for slot in range(len(tables)):
        if last[slot] > since or since == 0:
            starts[np.int64(tables[slot]) * BUCKETS + np.int64(uint64(ids[slot]) >> shift) + 1] += 1
    starts = np.cumsum(starts)
    order = np.empty(starts[-1], np.uint32)
    at = starts[:-1].copy()
    for slot in range(len(tables)):
        if last[slot] > since or since == 0:
            cell = np.int64(tables[slot]) * BUCKETS + np.int64(uint64(ids[slot]) >> shift)
            order[at[cell]] = slot
            at[cell] += 1
    return order, starts


@njit(nogil=True, cache=True)
def _is_waiting(place: Array, slots: Array) -> Array:
    waits = np.empty(len(slots), np.bool_)
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        waits[i] = slot >= 0 and slot < len(place) and place[slot] == WAITS
    return waits


@njit(nogil=True, cache=True)
def _copy(rows_SK: Array, state_SZ: Array, slots: Array, copies: Array, start: int, place: Array) -> None:
    width = rows_SK.shape[1]
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        copies[start + i, :width] = rows_SK[slot]
        copies[start + i, width:] = state_SZ[slot]
        place[slot] = start + i


@njit(nogil=True, cache=True)
def _take(
    rows_SK: Array, state_SZ: Array, copies: Array, slots: Array, place: Array, rows_nK: Array, state_nZ: Array
) -> None:
    width = rows_SK.shape[1]
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        at = place[slot]
        if at >= 0:
            rows_nK[i] = copies[at, :width]
            state_nZ[i] = copies[at, width:]
        else:
            rows_nK[i] = rows_SK[slot]
            state_nZ[i] = state_SZ[slot]
        place[slot] = WRITTEN
