"""A run's predictions of its test rows: one Parquet part for each worker, and a manifest that is written last.

    runs/KEY/predictions/part-00000.parquet   file int32, row int64, label float32, probability float64
    runs/KEY/predictions/_manifest.json       digests of the raw files, which ``file`` counts, and of the parts

A sample is a row of a raw file; ``DIGEST:ROW`` in one text names it whatever else was ingested. The manifest's name
begins with an underscore, so that what reads a folder of Parquet files (pyarrow, Spark, DuckDB, pandas) passes it by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from des_core import storage
from des_core.contracts import Record, Reference
from des_core.data.read.parsing import one_chunk
from des_core.data.store.parts import Digested
from des_core.errors import StorageError

MANIFEST = "_manifest.json"
SCHEMA = pa.schema({"file": pa.int32(), "row": pa.int64(), "label": pa.float32(), "probability": pa.float64()})
ROW_GROUP = 1 << 17
"""Rows that a worker holds before it writes them."""


class Predictions(Record):
    """``_manifest.json``."""

    samples: int
    files: tuple[str, ...]
    """Digests of the raw files, 16 hex digits of their sha256."""
    parts: dict[str, str]
    """Name of each part -> its sha256."""


class PartWriter:
    """One worker's predictions on their way to storage."""

    def __init__(self, file: Digested) -> None:
        self._file = file
        self._writer = pq.ParquetWriter(
            pa.PythonFile(file, mode="w"),
            SCHEMA,
            compression="zstd",
            use_dictionary=["file", "label"],
            column_encoding={"row": "DELTA_BINARY_PACKED"},
            write_page_checksum=True,
        )
        self._held: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        """Take rows of the schema."""
        self._held.append(table)
        self._rows += table.num_rows
        if self._rows >= ROW_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._writer.close()

    @property
    def sha256(self) -> str:
        """Of the part, once it is closed."""
        return self._file.hexdigest()

    def _flush(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held), row_group_size=ROW_GROUP)
        self._held, self._rows = [], 0


def part_name(worker: int) -> str:
    """File name of a worker's part."""
    return f"part-{worker:05d}.parquet"


@contextmanager
def part(folder: str, worker: int) -> Iterator[PartWriter]:
    """A worker's part, which is there when the block ends well."""
    with storage.writer(storage.join(folder, part_name(worker))) as file:
        writer = PartWriter(Digested(file))
        yield writer
        writer.close()


def read(folder: str) -> pa.Table:
    """Sample ids ``DIGEST:ROW``, labels and probabilities of all test rows, in one table.

    Raises:
        StorageError: the manifest or a part is missing, or has other bytes than were written.
    """
    known = Predictions.read(storage.join(folder, MANIFEST))
    tables = [SCHEMA.empty_table()]
    for name, sha256 in known.parts.items():
        tables.append(pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(folder, name), sha256))))
    table = pa.concat_tables(tables)
    samples = sample_names(table["file"], table["row"], known.files)
    return table.select(["label", "probability"]).add_column(0, "sample", samples)


def is_whole(folder: str, sha256: str) -> bool:
    """Whether the manifest of this digest is there, with all the parts that it names."""
    try:
        known = Predictions.load(Reference(storage.join(folder, MANIFEST), sha256))
        return all(storage.digest_file(storage.join(folder, name)) == own for name, own in known.parts.items())
    except (StorageError, FileNotFoundError):
        return False


def copy(folder: str, to: str) -> None:
    """Put the predictions of one folder in the place of another's, unless they are there."""
    manifest = storage.read_bytes(storage.join(folder, MANIFEST))
    there = storage.join(to, MANIFEST)
    if storage.exists(there) and storage.read_bytes(there) == manifest:
        return
    storage.delete(to)
    for name in Predictions.read(storage.join(folder, MANIFEST)).parts:
        storage.copy(storage.join(folder, name), storage.join(to, name))
    storage.write_bytes(there, manifest)


def sample_names(file_B: pa.Array, row_B: pa.Array, files: Sequence[str]) -> pa.Array:
    """Sample ids ``DIGEST:ROW`` [B]; ``files`` are the digests that ``file_B`` counts."""
    digests = pa.array(files, pa.string()).take(one_chunk(file_B))
    return pc.binary_join_element_wise(digests, one_chunk(row_B).cast(pa.string()), ":")
