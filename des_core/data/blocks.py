"""Text logs as blocks of whole records: bytes -> where each record lies, on which line, and where its columns end.

A block is some 8 MiB, cut where a record ends. One pass over its bytes finds everything, by the rules of CSV: a quote
opens only at a column's start, "" inside it is a quote, and a line end inside it belongs to the value. Empty lines
are no records.

Dims: R records of a block, E edges of its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit

from des_core import storage
from des_core.data.hashing import I64, Array
from des_core.errors import DataError

BLOCK_BYTES = 8 << 20
LONGEST_RECORD = 64 << 20
"""A record that is longer has no end: the quote that it opens is never closed, or it is no text."""

SLACK = 8
"""Bytes behind the records that may be read: values are read 8 bytes at a time."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole records: column c of record r is ``data[edges_E[e] + 1 : edges_E[e + 1]]`` where e = ``edges_R[r] + c``.

    Record r begins on line ``lines_R[r]`` and has ``widths_R[r]`` columns. ``quote`` is the byte that quotes values,
    or -1; ``open_quote``: the last record opens one that the file does not close.
    """

    data: Array
    edges_E: Array
    edges_R: I64
    lines_R: I64
    widths_R: I64
    quote: int
    open_quote: bool = False

    def kept(self, keep_R: Array) -> Block:
        """The block of the records to keep."""
        return replace(
            self,
            edges_R=self.edges_R[keep_R],
            lines_R=self.lines_R[keep_R],
            widths_R=self.widths_R[keep_R],
            open_quote=False,
        )


def blocks(path: str, delimiter: str, quoting: bool) -> Iterator[Block]:
    """The records of a text file, plain or packed, some 8 MiB at a time.

    Args:
        delimiter: an ASCII character, or none: then each record is one column.

    Raises:
        DataError: missing, not text, cannot be unpacked, or a record has no end.
    """
    quote = ord('"') if quoting else -1
    delimiter = delimiter or "\n"
    rest, line, count = np.zeros(0, np.uint8), 1, -1
    with _opened(path) as stream:
        while count:
            data = np.empty(len(rest) + BLOCK_BYTES + SLACK, np.uint8)
            data[: len(rest)] = rest
            fresh = count < 0
            count = stream.readinto(data[len(rest) : -SLACK])
            data = data[: len(rest) + count + SLACK]
            data[-SLACK:] = 0
            if fresh:
                if (data[: min(count, 65536)] == 0).any():
                    raise DataError(f"{path}: holds binary data, not text; check source.format and the file's ending")
                data = data[len(_BOM) if data[: len(_BOM)].tobytes() == _BOM else 0 :]
            block, consumed, line = _cut(data, ord(delimiter), quote, line, last=not count)
            rest = data[consumed:-SLACK]
            if len(rest) > LONGEST_RECORD:
                raise DataError(
                    f"{path}: line {line}: no record ends within 64 MiB; is a quote not closed, or is it no text?"
                )
            if len(block.lines_R):
                yield block


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    filesystem, inner = storage.resolve(path)
    try:
        with filesystem.open_input_stream(inner) as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct the path") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read, is it whole? ({one_line(error)})") from None


def one_line(error: BaseException) -> str:
    """An error's first line, without its full stop."""
    return str(error).split("\n")[0].strip().rstrip(".")


def _cut(data: Array, delimiter: int, quote: int, line: int, last: bool) -> tuple[Block, int, int]:
    """The records of ``data`` before its slack, how many bytes they take, and the line that follows them."""
    text = data[:-SLACK]
    columns, lines = _count(text, np.uint8(delimiter))
    edges_E = np.empty(columns + 2 * lines + 2, np.int32)
    edges_R, lines_R, widths_R = np.empty((3, lines + 1), np.int64)
    special = np.zeros(256, np.bool_)
    special[[delimiter, ord("\n"), ord("\r"), *([quote] if quote >= 0 else [])]] = True
    count, consumed, line, open_quote = _scan(
        text, special, delimiter, quote, line, last, edges_E, edges_R, lines_R, widths_R
    )
    block = Block(data, edges_E, edges_R[:count], lines_R[:count], widths_R[:count], quote, open_quote)
    return block, consumed, line


@njit(nogil=True, cache=True)
def _count(text: Array, delimiter: Any) -> tuple[int, int]:
    """How many columns and lines may end here."""
    columns, lines = 0, 0
    for c in text:
        columns += c == delimiter
        lines += (c == 10) | (c == 13)
    return columns, lines


@njit(nogil=True, cache=True)
def _scan(
    text: Array,
    special: Array,
    delimiter: int,
    quote: int,
    line: int,
    last: bool,
    edges_E: Array,
    edges_R: Array,
    lines_R: Array,
    widths_R: Array,
) -> tuple[int, int, int, bool]:
    """Find the records; returns their number, the bytes they take, the next line, whether a quote is open."""
    size = len(text)
    count, at, start, first_line, first_edge, edge = 0, 0, 0, line, 0, 1
    edges_E[0] = -1
    quoted = False
    while at < size:
        c = text[at]
        if not special[c]:
            at += 1
        elif c == 13 and at + 1 == size and not last:
            break
        elif c == 10 or c == 13:
            stop = at
            at += 2 if c == 13 and at + 1 < size and text[at + 1] == 10 else 1
            line += 1
            if stop > start:
                edges_E[edge] = stop
                edges_R[count], lines_R[count], widths_R[count] = first_edge, first_line, edge - first_edge
                count += 1
                first_edge = edge + 1
            edge = first_edge + 1
            edges_E[first_edge] = at - 1
            start, first_line = at, line
        elif c == delimiter:
            edges_E[edge] = at
            edge += 1
            at += 1
        else:
            quoted = at == edges_E[edge - 1] + 1
            at += 1
            while quoted and at < size:
                line += text[at] == 10
                if text[at] == quote:
                    quoted = at + 1 < size and text[at + 1] == quote
                    at += quoted
                at += 1
    if last and start < size:
        edges_E[edge] = size
        edges_R[count], lines_R[count], widths_R[count] = first_edge, first_line, edge - first_edge
        return count + 1, size, line, quoted
    return count, start, first_line, False
