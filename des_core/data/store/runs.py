"""Sorted runs on shared storage: Arrow IPC files of RUN_ROWS rows a batch, ascending by key, uncompressed.

A run's index is the key of each batch's first row. With the indices of all runs at hand, the place of any rank of their
common order is found exactly by reading a few batches of each run.

Dims: N runs, R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa

from des_core import storage
from des_core.contracts import Record
from des_core.data.read.hashing import I64, Array
from des_core.data.store.sorting import KEY
from des_core.errors import StorageError

RUN_ROWS = 2048


class Run(Record):
    """One run: ``rows`` rows in ascending order of their keys, equal ones in the order of the logs."""

    uri: str
    rows: int
    index: tuple[int, ...]
    """Keys of each batch's first row."""


def write_run(uri: str, tables: Iterable[pa.Table]) -> Run:
    """A run of tables that are in order."""
    rows, writer = 0, None
    firsts: list[int] = []
    with storage.writer(uri) as file:
        # Columns come in small pieces.
        buffered = pa.BufferedOutputStream(pa.PythonFile(file, mode="w"), 1 << 20)
        for batch in _batches(tables):
            writer = writer or pa.ipc.new_file(buffered, batch.schema)
            writer.write_table(batch, max_chunksize=RUN_ROWS)
            firsts += batch.column(KEY).to_numpy()[::RUN_ROWS].tolist()
            rows += batch.num_rows
        if writer is not None:
            writer.close()
        buffered.flush()
    return Run(uri=uri, rows=rows, index=tuple(firsts))


def _batches(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of whole batches, but for the last one."""
    rest: pa.Table | None = None
    for table in tables:
        table = table if rest is None else pa.concat_tables([rest, table]).combine_chunks()
        whole = table.num_rows - table.num_rows % RUN_ROWS
        if whole:
            yield table.slice(0, whole)
        rest = table.slice(whole) if whole < table.num_rows else None
    if rest is not None:
        yield rest


@contextmanager
def _opened(uri: str, columns: Sequence[int] = ()) -> Iterator[pa.ipc.RecordBatchFileReader]:
    filesystem, path = storage.resolve(uri)
    try:
        with filesystem.open_input_file(path) as file:
            yield pa.ipc.open_file(
                file, options=pa.ipc.IpcReadOptions(included_fields=list(columns), use_threads=False)
            )
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"{uri} is damaged or missing ({error}); start des ingest again") from None


def read_run(run: Run, start: int, stop: int) -> Iterator[pa.Table]:
    """Rows [start, stop) of a run, batch by batch."""
    with _opened(run.uri) as reader:
        for batch in range(start // RUN_ROWS, -(-stop // RUN_ROWS)):
            first = batch * RUN_ROWS
            table = pa.Table.from_batches([reader.get_batch(batch)])
            yield table.slice(max(start - first, 0), min(stop, first + RUN_ROWS) - max(start, first))


class Order:
    """The common order of runs: by key, then by run, then by row."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.rows = sum(run.rows for run in runs)
        self._indices = [np.array(run.index, np.uint64) for run in runs]
        self._keys = lru_cache(maxsize=4 * len(runs) + 4)(self._read_keys)

    def split(self, rank: int) -> I64:
        """How many rows [N] of each run come before the row of that rank."""
        if rank >= self.rows:
            return np.array([run.rows for run in self.runs])
        key = self._key_at(rank)
        before_N = self.below(key)
        wanted, equal_N = rank - int(before_N.sum()), self.below(key, equal=True) - before_N
        earlier_N = np.cumsum(equal_N) - equal_N
        places_N: I64 = before_N + np.clip(wanted - earlier_N, 0, equal_N)
        return places_N

    def below(self, key: int, equal: bool = False) -> I64:
        """How many rows [N] of each run have a smaller key, or an equal one too."""
        return np.array([self._below(number, key, equal) for number in range(len(self.runs))], np.int64)

    def _below(self, number: int, key: int, equal: bool) -> int:
        side: Literal["left", "right"] = "right" if equal else "left"
        batch = int(np.searchsorted(self._indices[number], np.uint64(key), side)) - 1
        if batch < 0:
            return 0
        return batch * RUN_ROWS + int(np.searchsorted(self._keys(number, batch), np.uint64(key), side))

    def _key_at(self, rank: int) -> int:
        """The key of the row of a rank: between two index keys, that many rows of which are read."""
        keys = np.unique(np.concatenate(self._indices))
        counts = [np.searchsorted(index, keys) for index in self._indices]
        most = sum(np.minimum(RUN_ROWS * count, run.rows) for count, run in zip(counts, self.runs, strict=True))
        least = sum(np.where(count > 0, RUN_ROWS * (count - 1) + 1, 0) for count in counts)
        low = int(np.searchsorted(most, rank, side="right")) - 1
        above = int(np.searchsorted(least, rank, side="right"))
        lowest = int(keys[low])
        behind_N = self.below(lowest, equal=True)
        if rank < behind_N.sum():
            return lowest
        between = [
            self._between(number, lowest, int(keys[above]) if above < len(keys) else None)
            for number in range(len(self.runs))
        ]
        return int(np.sort(np.concatenate(between))[rank - int(behind_N.sum())])

    def _between(self, number: int, low: int, high: int | None) -> Array:
        """A run's keys above ``low`` and below ``high``."""
        index = self._indices[number]
        first = max(int(np.searchsorted(index, np.uint64(low), side="right")) - 1, 0)
        stop = len(index) if high is None else int(np.searchsorted(index, np.uint64(high)))
        if first >= stop:
            return np.zeros(0, np.uint64)
        keys = np.concatenate([self._keys(number, batch) for batch in range(first, stop)])
        keys = keys[keys > np.uint64(low)]
        return keys if high is None else keys[keys < np.uint64(high)]

    def _read_keys(self, number: int, batch: int) -> Array:
        with _opened(self.runs[number].uri) as reader:
            place = reader.schema.get_field_index(KEY)
        with _opened(self.runs[number].uri, [place]) as reader:
            # A copy: the batch holds all columns.
            return np.array(reader.get_batch(batch).column(0).to_numpy(), np.uint64)
