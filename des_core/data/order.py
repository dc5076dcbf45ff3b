"""Tables in any number -> one stream in the order of a key, in bounded memory.

Rows are sorted in runs of RUN_BYTES, and the runs are merged. When those in memory take up MEMORY_BYTES they
are merged into a file of a scratch folder; at most FAN_IN files are merged at once. Equal keys keep the order
in which they came.

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

RUN_BYTES = 64 << 20
MEMORY_BYTES = 384 << 20
FAN_IN = 32
MERGE_ROWS = 16_384
"""Rows taken at once from each run."""

KEY = "_order"
"""Column of the sort key."""


class Sorter:
    """Sorts tables of one schema by a uint64 key per row.

    Args:
        folder: scratch folder on local disk; the caller makes and removes it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._fresh: list[pa.Table] = []
        self._runs: list[pa.Table] = []
        self._files: list[str] = []
        self._written = 0

    def add(self, table: pa.Table, key_R: U64) -> None:
        """Take in a table."""
        self._fresh.append(table.append_column(KEY, pa.array(key_R)))
        if sum(table.nbytes for table in self._fresh) < RUN_BYTES:
            return
        self._sort_fresh()
        if sum(table.nbytes for table in self._runs) >= MEMORY_BYTES:
            self._files.append(self._to_file(_merge(self._in_memory())))

    def sorted(self) -> Iterator[pa.Table]:
        """Every row added, in order, without the key."""
        self._sort_fresh()
        while len(self._files) > FAN_IN:
            groups = [self._files[at : at + FAN_IN] for at in range(0, len(self._files), FAN_IN)]
            self._files = [self._merge_files(group) for group in groups]
        for table in _merge([*map(_from_file, self._files), *self._in_memory()]):
            yield table.drop_columns(KEY)

    def _sort_fresh(self) -> None:
        if self._fresh:
            self._runs.append(_sort(pa.concat_tables(self._fresh)))
            self._fresh = []

    def _in_memory(self) -> list[Iterator[pa.RecordBatch]]:
        """The runs in memory, which are let go of as they are read."""
        runs, self._runs = self._runs, []
        return [iter(run.to_batches(max_chunksize=MERGE_ROWS)) for run in runs]

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


def _sort(table: pa.Table) -> pa.Table:
    table = table.combine_chunks()
    return table.take(pa.array(np.argsort(table.column(KEY).to_numpy(), kind="stable")))


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
        yield _sort(pa.concat_tables(pieces))
