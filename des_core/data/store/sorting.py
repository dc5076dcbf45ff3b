"""Rows in memory, by a key: tables in any number -> tables in the key's order.

Equal keys keep the order in which they came.

Dims: R rows of a table.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit

from des_core.data.read.hashing import Array
from des_core.data.read.parsing import one_chunk

U64 = np.ndarray[Any, np.dtype[np.uint64]]

SLICE_ROWS = 65_536
"""Rows handed on at once."""

KEY = "_order"
"""Column of the sort key."""


class Sorter:
    """Sorts tables of one schema by a uint64 key per row.

    Args:
        most: bytes of rows that fit; more of a single table do, too.
        rows: make room for that many, whatever their size.
    """

    def __init__(self, most: int, rows: int = 0) -> None:
        self._most, self._least = most, rows
        self._columns: dict[str, _Numbers | _Lists] = {}
        self.rows = self._room = self._bytes = 0
        """Rows that are waiting."""

    def fits(self, table: pa.Table) -> bool:
        """Whether there is room for a table."""
        return not self.rows or (self.rows + table.num_rows <= self._room and self._bytes < self._most)

    def add(self, table: pa.Table, key_R: U64) -> None:
        """Take in a table that fits."""
        if not table.num_rows:
            return
        table = table.append_column(KEY, pa.array(key_R))
        if self.rows + table.num_rows > self._room:
            self._make_room(table)
        # Rows that end up together lie together in every sorted table: what is picked later is near in memory.
        order_R = _order(key_R)
        for name, column in self._columns.items():
            column.put(self.rows, one_chunk(table.column(name)), order_R)
        self.rows += table.num_rows
        self._bytes += table.nbytes

    def _make_room(self, table: pa.Table) -> None:
        """Room for rows like those of ``table``, and for that table in any case."""
        self._room = self._least or max(self._most // fixed_width(table.schema), table.num_rows)
        self._columns = {
            field.name: _Lists() if pa.types.is_nested(field.type) else _Numbers(field.type, self._room)
            for field in table.schema
        }

    def sorted(self) -> Iterator[pa.Table]:
        """Every row added, in order, with the key; nothing is left."""
        if not self.rows:
            return
        keys = self._columns[KEY]
        assert isinstance(keys, _Numbers)
        order_R = _order(keys.values_R[: self.rows])
        for at in range(0, len(order_R), SLICE_ROWS):
            slice_R = order_R[at : at + SLICE_ROWS]
            yield pa.table({name: column.take(slice_R) for name, column in self._columns.items()})
        self.rows = self._bytes = 0


def fixed_width(schema: pa.Schema) -> int:
    """Bytes of a row without its lists' values."""
    return sum(kind.bit_width // 8 for kind in schema.types if not pa.types.is_nested(kind))


class _Numbers:
    """A column of numbers as one array, for fast access to single rows."""

    def __init__(self, kind: pa.DataType, room: int) -> None:
        # Pages come as rows do. Those of numpy's own large arrays are huge: cleared out of cache, and never quite full.
        memory = mmap.mmap(-1, room * kind.bit_width // 8, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.values_R = np.frombuffer(memory, kind.to_pandas_dtype())
        self._kind = kind
        self._valid_R: Array | None = None

    def put(self, at: int, column: pa.Array, order_R: Array) -> None:
        """Lay rows of a table's column at row ``at``, in the order given."""
        stop = at + len(order_R)
        values = np.frombuffer(column.buffers()[1], self.values_R.dtype)[column.offset :]
        _take(values, order_R, self.values_R[at:stop])
        if self._valid_R is None and column.null_count:
            self._valid_R = np.ones(len(self.values_R), np.bool_)
        if self._valid_R is not None:
            _take(np.asarray(column.is_valid()), order_R, self._valid_R[at:stop])

    def take(self, order_R: Array) -> pa.Array:
        """The rows named, in that order."""
        valid = None
        if self._valid_R is not None:
            valid = pa.py_buffer(np.packbits(self._taken(self._valid_R, order_R), bitorder="little"))
        values = pa.py_buffer(self._taken(self.values_R, order_R))
        return pa.Array.from_buffers(self._kind, len(order_R), [valid, values])

    def _taken(self, values_R: Array, order_R: Array) -> Array:
        out_R = np.empty(len(order_R), values_R.dtype)
        _take(values_R, order_R, out_R)
        return out_R


class _Lists:
    """A column of lists, as the chunks that were added."""

    def __init__(self) -> None:
        self._chunks: list[pa.Array] = []

    def put(self, at: int, column: pa.Array, order_R: Array) -> None:
        """Store rows of a table's column in the given order; ``at`` = 0 discards the earlier ones."""
        self._chunks = [*(self._chunks if at else []), column.take(pa.array(order_R))]

    def take(self, order_R: Array) -> pa.Array:
        """The rows named, in that order."""
        # Arrow would join the chunks again for every slice.
        if len(self._chunks) > 1:
            self._chunks = [pa.concat_arrays(self._chunks)]
        return self._chunks[0].take(pa.array(order_R))


@njit(nogil=True, cache=True)
def _take(values_R: Array, order_R: Array, out_R: Array) -> None:
    for i in range(len(order_R)):
        out_R[i] = values_R[order_R[i]]


def _order(key_R: Array) -> Array:
    """The permutation that sorts keys, equal ones in their order."""
    order_R = np.argsort(key_R)
    sorted_R = key_R[order_R]
    if (sorted_R[1:] == sorted_R[:-1]).any():
        # The quick sort, three times as fast, may swap equal keys.
        order_R = np.argsort(key_R, kind="stable")
    return order_R
