"""Tables in any number -> one stream in the order of a key, in bounded memory.

Rows wait in memory; those of RUN_BYTES are sorted into a file of a scratch folder, and the files are merged as
they are read back, at most FAN_IN at once. What fits into memory is never written. Equal keys keep the order in
which they came.

Dims: R rows of a table.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit

from des_core.data.read.hashing import Array
from des_core.data.read.parsing import one_chunk

U64 = np.ndarray[Any, np.dtype[np.uint64]]

RUN_BYTES = 384 << 20
FAN_IN = 32
SLICE_ROWS = 65_536
"""Rows handed on at once from memory."""

MERGE_ROWS = 16_384
"""Rows read at once from each file."""

KEY = "_order"
"""Column of the sort key."""


class Sorter:
    """Sorts tables of one schema by a uint64 key per row.

    Args:
        folder: scratch folder on local disk; the caller makes and removes it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._columns: dict[str, _Numbers | _Lists] = {}
        self._rows = self._room = self._bytes = 0
        self._files: list[str] = []
        self._written = 0

    def add(self, table: pa.Table, key_R: U64) -> None:
        """Take in a table."""
        if not table.num_rows:
            return
        table = table.append_column(KEY, pa.array(key_R))
        if self._rows + table.num_rows > self._room:
            self._spill()
        if table.num_rows > self._room:
            self._make_room(table)
        # Rows that end up together lie together in every sorted table: what is picked later is near in memory.
        order_R = _order(key_R)
        for name, column in self._columns.items():
            column.put(self._rows, one_chunk(table.column(name)), order_R)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._bytes >= RUN_BYTES:
            self._spill()

    def sorted(self) -> Iterator[pa.Table]:
        """Every row added, in order, without the key."""
        if not self._files:
            yield from (table.drop_columns(KEY) for table in self._run())
            return
        self._spill()
        self._columns = {}
        while len(self._files) > FAN_IN:
            groups = [self._files[at : at + FAN_IN] for at in range(0, len(self._files), FAN_IN)]
            self._files = [self._merge_files(group) for group in groups]
        for table in _merge([_from_file(path) for path in self._files]):
            yield table.drop_columns(KEY)

    def _make_room(self, table: pa.Table) -> None:
        """Room for a run of rows like those of ``table``, and for that table in any case."""
        widths = [kind.bit_width // 8 for kind in table.schema.types if not pa.types.is_nested(kind)]
        self._room = max(RUN_BYTES // sum(widths), table.num_rows)
        self._columns = {
            field.name: _Lists() if pa.types.is_nested(field.type) else _Numbers(field.type, self._room)
            for field in table.schema
        }

    def _spill(self) -> None:
        """Put the waiting rows into a file."""
        if self._rows:
            self._files.append(self._to_file(self._run()))
            self._rows = self._bytes = 0

    def _run(self) -> Iterator[pa.Table]:
        """The waiting rows, sorted, a slice at a time."""
        if not self._rows:
            return
        keys = self._columns[KEY]
        assert isinstance(keys, _Numbers)
        order_R = _order(keys.values_R[: self._rows])
        for at in range(0, len(order_R), SLICE_ROWS):
            slice_R = order_R[at : at + SLICE_ROWS]
            yield pa.table({name: column.take(slice_R) for name, column in self._columns.items()})

    def _merge_files(self, paths: Sequence[str]) -> str:
        merged = self._to_file(_merge([_from_file(path) for path in paths]))
        for path in paths:
            os.remove(path)
        return merged

    def _to_file(self, tables: Iterable[pa.Table]) -> str:
        path = os.path.join(self._folder, f"{self._written}.arrow")
        self._written += 1
        writer = None
        with pa.OSFile(path, "wb") as file:
            for table in tables:
                writer = writer or pa.ipc.new_stream(file, table.schema)
                writer.write_table(table, max_chunksize=MERGE_ROWS)
            if writer:
                writer.close()
        return path


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


def _from_file(path: str) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def _order(key_R: Array) -> Array:
    """The permutation that sorts keys, equal ones in their order."""
    order_R = np.argsort(key_R)
    sorted_R = key_R[order_R]
    if (sorted_R[1:] == sorted_R[:-1]).any():
        # The quick sort, three times as fast, may swap equal keys.
        order_R = np.argsort(key_R, kind="stable")
    return order_R


@dataclass
class _Run:
    """One sorted run that is being merged: its present rows, and the batches still to be read."""

    batches: Iterator[pa.RecordBatch]
    rows: pa.Table | None = None
    keys: Array = field(default_factory=lambda: np.zeros(0, np.uint64))

    def refill(self) -> bool:
        """Read the next batch if no row is at hand; false at the end of the run."""
        while not len(self.keys):
            batch = next(self.batches, None)
            if batch is None:
                return False
            self.rows = pa.Table.from_batches([batch])
            self.keys = self.rows.column(KEY).to_numpy()
        return True

    def take(self, count: int) -> pa.Table:
        """The next ``count`` rows at hand."""
        assert self.rows is not None
        taken, self.rows, self.keys = self.rows.slice(0, count), self.rows.slice(count), self.keys[count:]
        return taken


def _merge(batches: Sequence[Iterator[pa.RecordBatch]]) -> Iterator[pa.Table]:
    """Rows of sorted runs in order; of equal keys, those of the earlier run first."""
    runs = [_Run(run) for run in batches]
    while runs := [run for run in runs if run.refill()]:
        lasts = np.array([run.keys[-1] for run in runs])
        owner = int(lasts.argmin())
        # Rows with the bound's key in later runs must wait: the owner's next batch may have more of them.
        pieces = [
            run.take(int(np.searchsorted(run.keys, lasts[owner], side="right" if number <= owner else "left")))
            for number, run in enumerate(runs)
        ]
        merged = pa.concat_tables(pieces).combine_chunks()
        yield merged.take(pa.array(_order(merged.column(KEY).to_numpy())))
