"""Tables in any number -> one stream in the order of a key, in bounded memory.

Rows wait in memory; those of RUN_BYTES are sorted into a file of a scratch folder, and the files are merged as
they are read back, at most FAN_IN at once. What fits into memory is never written. Equal keys keep the order in
which they came.

Dims: R rows of a table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from des_core.data.hashing import Array

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
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._files: list[str] = []
        self._written = 0

    def add(self, table: pa.Table, key_R: U64) -> None:
        """Take in a table."""
        if not table.num_rows:
            return
        self._tables.append(table.append_column(KEY, pa.array(key_R)))
        self._bytes += self._tables[-1].nbytes
        if self._bytes >= RUN_BYTES:
            self._files.append(self._to_file(self._run()))

    def sorted(self) -> Iterator[pa.Table]:
        """Every row added, in order, without the key."""
        if not self._files:
            yield from (table.drop_columns(KEY) for table in self._run())
            return
        if self._tables:
            self._files.append(self._to_file(self._run()))
        while len(self._files) > FAN_IN:
            groups = [self._files[at : at + FAN_IN] for at in range(0, len(self._files), FAN_IN)]
            self._files = [self._merge_files(group) for group in groups]
        for table in _merge([_from_file(path) for path in self._files]):
            yield table.drop_columns(KEY)

    def _run(self) -> Iterator[pa.Table]:
        """The waiting rows, sorted, a slice at a time."""
        tables, self._tables, self._bytes = self._tables, [], 0
        if not tables:
            return
        waiting = pa.concat_tables(tables)
        for place, name in enumerate(waiting.column_names):
            # Arrow would join a list column's chunks again for every slice.
            if pa.types.is_nested(waiting.schema.types[place]):
                waiting = waiting.set_column(place, name, waiting.column(name).combine_chunks())
        order_R = _order(waiting.column(KEY).to_numpy())
        for at in range(0, len(order_R), SLICE_ROWS):
            yield waiting.take(pa.array(order_R[at : at + SLICE_ROWS]))

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
    """One run being read: the rows at hand, and the batches still to come."""

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
