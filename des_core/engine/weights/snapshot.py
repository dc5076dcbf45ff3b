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
from numba import njit

from des_core.checkpoint.blocks import block_bytes
from des_core.checkpoint.ordering import by_cell, cut, grouped, table_at
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
            self._order, starts = by_cell(ids, tables, last, np.uint32(since), int(tables.max(initial=0)) + 1)
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
            for first, stop in grouped(self._starts, most):
                with self._source.lock:
                    ids = self._source.views()[0][self._order[first:stop]]
                turn = np.argsort(ids.view(np.uint64))
                for piece in cut(ids[turn], most):
                    yield self._take(first, turn[piece], ids[turn[piece]])
        finally:
            self.done.set()
            # The table keeps the snapshot until the next one.
            self._copies = Memory(self._dtype)
            self._order = self._counts = self._last = np.empty(0, np.uint32)
            self._place = np.empty(0, np.int32)

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
            table_at(self._starts, first), ids, self._last[places], rows_nK, self._counts[places], state_nZ
        )

    def _waiting(self, slots: Array) -> Array:
        """Those of slots that are still to be written and not copied."""
        return slots[_is_waiting(self._place, slots)]


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
