"""Runs of all pieces -> the Parquet files of a part, each a task: a range of ranks of the runs' common order.

    .scratch-PART/index-DIGEST.arrow    the runs of a job with their indices, for tasks to read
    .scratch-PART/file-DIGEST.json      RowsFile that a task has made

A file holds equally many rows, whole row groups of about FILE_BYTES together, so that a task sorts it in memory. Only
the last one may be shorter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pyarrow as pa

from des_core import storage
from des_core.contracts import ROW_GROUP, FieldSpec, Record, RowsFile
from des_core.data.store.parts import is_whole, write_rows
from des_core.data.store.runs import Order, Run, read_run
from des_core.data.store.sketches import Sketching
from des_core.data.store.sorting import KEY, Sorter
from des_core.errors import DamagedError

FILE_BYTES = 320 << 20
MOST_GROUPS = 64


class Output(Record):
    """A file to be made of ranks ``start`` to ``stop`` of the runs that ``index`` lists."""

    root: str
    folder: str
    index: str
    part: str
    specs: tuple[FieldSpec, ...]
    start: int
    stop: int
    first: int
    """Rank of the part's first row."""
    sketched: int
    """Rows of the part from its first one on that are sketched."""

    def __str__(self) -> str:
        return f"rows {self.start - self.first:,} to {self.stop - self.first:,} of part {self.part}"

    @property
    def made(self) -> str:
        """Address of the record that says it is made."""
        digest = hashlib.sha256(self.model_dump_json(exclude={"root", "folder"}).encode()).hexdigest()
        return storage.join(self.folder, f"file-{digest[:20]}.json")


def rows_per_file(rows: int, size: int) -> int:
    """Rows of each file, for ``rows`` rows whose values have ``size`` bytes."""
    return ROW_GROUP * min(max(FILE_BYTES * rows // max(size * ROW_GROUP, 1), 1), MOST_GROUPS)


def write_index(folder: str, runs: Sequence[Run]) -> str:
    """The name of the file that lists runs."""
    table = pa.table(
        {
            "uri": pa.array([run.uri for run in runs], pa.string()),
            "rows": pa.array([run.rows for run in runs], pa.int64()),
            "index": pa.array([run.index for run in runs], pa.list_(pa.uint64())),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    name = f"index-{hashlib.sha256(data).hexdigest()[:20]}.arrow"
    storage.write_bytes(storage.join(folder, name), data)
    return name


def read_index(folder: str, name: str) -> list[Run]:
    """The runs that a file lists."""
    table = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(storage.join(folder, name)))).read_all()
    return [Run.model_validate(row) for row in table.to_pylist()]


def made_file(output: Output) -> RowsFile | None:
    """The file, if a task before has made it."""
    if not storage.exists(output.made):
        return None
    try:
        file = RowsFile.read(output.made)
    except DamagedError:
        return None
    return file if is_whole(output.root, file) else None


def merge_file(output: Output) -> RowsFile:
    """Make a file and its sketches."""
    sketching = Sketching(output.part, output.specs, output.start - output.first, output.sketched)
    file = write_rows(output.root, output.part, _sorted(output), sketching.add)
    sketching.save(output.root, file, output.part)
    file.write(output.made)
    return file


def _sorted(output: Output) -> Iterator[pa.Table]:
    runs = read_index(output.folder, output.index)
    order = Order(runs)
    starts, stops = order.split(output.start), order.split(output.stop)
    sorter: Sorter | None = None
    for run, start, stop in zip(runs, starts.tolist(), stops.tolist(), strict=True):
        for table in read_run(run, start, stop) if start < stop else ():
            sorter = sorter or Sorter(0, rows=output.stop - output.start)
            sorter.add(table.drop_columns(KEY), table.column(KEY).to_numpy())
    for table in sorter.sorted() if sorter else ():
        yield table.drop_columns(KEY)
