"""Spans: what one task reads of a raw file, cut where a record begins.

    text       blocks of 8 MiB; the file's records are found by reading from its start, so a span says where its first
               record begins, on which line and after how many records. Packed files, and those in another encoding
               than UTF-8, are one span.
    Parquet    units: row groups of together PARQUET_BATCH rows

A file's blocks and units are the same however it is cut into spans. Where the records of a block begin is guessed, by
the last line's end before it, and then known from the block before: a guess that was wrong is made good.

Source: Ge et al., "Speculative distributed CSV data parsing for big data analytics", SIGMOD 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from des_core import remote, storage
from des_core.contracts import Record
from des_core.data.read import blocks
from des_core.data.read.blocks import Range, one_line, packing_of
from des_core.errors import DataError, UnusableLogsError

PARQUET_BATCH = 65_536


class Span(Record):
    """Blocks or units ``first`` to ``stop`` of a raw file; no ``stop``: to its end."""

    path: str
    bytes: int = 0
    """As stored."""
    first: int = 0
    stop: int | None = None
    begin: int = 0
    """Offset of the first record."""
    line: int = 1
    """Of the first record."""
    row: int = 0
    """Number of the first record in the file."""
    names: tuple[str, ...] = ()
    """The columns, where the span does not begin with the file."""
    width: int = 0
    """Columns of the file's first record, likewise."""

    @property
    def blocks(self) -> Range | None:
        """Of a text file; None: the whole of it, as it is packed."""
        return Range(self.first, self.stop, self.begin, self.line) if self.first or self.stop is not None else None

    def __str__(self) -> str:
        if not self.first and self.stop is None:
            return self.path
        return (
            f"{self.path} from byte {self.begin:,}"
            if self.begin or not self.row
            else f"{self.path} from row {self.row:,}"
        )


def is_divisible(path: str, encoding: str) -> bool:
    """Whether a text file can be read from its middle."""
    return packing_of(path) is None and encoding == "utf-8"


def size_of(path: str) -> int:
    """Bytes of a file as it is stored.

    Raises:
        DataError: there is none.
    """
    filesystem, inner = storage.resolve(path)
    info = filesystem.get_file_info(inner)
    if info.type != pafs.FileType.File:
        raise DataError(f"{path}: no such file; correct the path")
    return int(info.size)


def spans_of_text(path: str, most: int) -> list[Span]:
    """Spans of about ``most`` bytes, at least a block; where their first records begin is not known yet."""
    size = size_of(path)
    each = max(most // blocks.BLOCK_BYTES, 1)
    firsts = range(0, max(-(-size // blocks.BLOCK_BYTES), 1), each)
    spans = [Span(path=path, bytes=each * blocks.BLOCK_BYTES, first=first, stop=first + each) for first in firsts]
    spans[-1] = spans[-1].model_copy(update={"stop": None, "bytes": size - spans[-1].first * blocks.BLOCK_BYTES})
    return spans


def spans_of_parquet(path: str, most: int) -> list[Span]:
    """Spans of about ``most`` bytes, at least a unit."""
    with opened_parquet(path) as file:
        found = units(file)
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    rows = [sum(groups[group].num_rows for group in unit) for unit in found]
    sizes = [sum(groups[group].total_byte_size for group in unit) for unit in found]
    before = [0, *accumulate(rows)]
    starts = [0]
    held = 0
    for place, size in enumerate(sizes):
        if held and held + size > most:
            starts.append(place)
            held = 0
        held += size
    spans = []
    for start, stop in zip(starts, [*starts[1:], None], strict=True):
        spans.append(Span(path=path, bytes=sum(sizes[start:stop]), first=start, stop=stop, row=before[start]))
    return spans


@contextmanager
def opened_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; failures to read it are one line.

    Raises:
        DataError: it is missing, or not whole.
    """
    filesystem, inner = storage.resolve(path)
    try:
        with filesystem.open_input_file(inner) as stream:
            yield pq.ParquetFile(stream)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct the path") from None
    except (OSError, pa.ArrowException) as error:
        remote.raise_passing(path, error)
        raise UnusableLogsError(f"{path}: not a whole Parquet file ({one_line(error)})") from None


def units(file: pq.ParquetFile) -> list[list[int]]:
    """Row groups that are read together."""
    found: list[list[int]] = [[]]
    rows = 0
    for group in range(file.num_row_groups):
        if rows >= PARQUET_BATCH:
            found.append([])
            rows = 0
        found[-1].append(group)
        rows += file.metadata.row_group(group).num_rows
    return found
