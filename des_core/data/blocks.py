"""Text logs as blocks of whole records: bytes -> where each record starts, and on which line.

A block is some 8 MiB, cut where a record ends. Without quotes, carriage returns and empty lines a record is
a line. Otherwise a pass over the bytes finds each record, its line and its number of columns, by the rules
that the CSV parser follows too: a quote opens only at a column's start, "" inside it is a quote, and a line end
inside it belongs to the value. Empty lines are no records.

Dims: R records of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numba import njit

from des_core import storage
from des_core.data.hashing import I64, Array
from des_core.errors import DataError

BLOCK_BYTES = 8 << 20
LONGEST_RECORD = 64 << 20
"""A record that is longer has no end: the quote that it opens is never closed, or it is no text."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole records: their bytes, and each one's start, line and, once counted, columns.

    ``open_quote``: the last record opens a quote that the file does not close.
    """

    data: bytes
    starts_R: I64
    lines_R: I64
    columns_R: I64 | None = None
    open_quote: bool = False

    def pieces(self, keep_R: Array) -> Iterator[memoryview]:
        """Bytes of the records to keep, neighbours in one piece."""
        edges = np.append(self.starts_R, len(self.data))
        changes = np.flatnonzero(np.diff(np.concatenate([[False], keep_R, [False]]).astype(np.int8)))
        view = memoryview(self.data)
        for first, last in changes.reshape(-1, 2):
            yield view[edges[first] : edges[last]]

    def kept(self, keep_R: Array) -> Block:
        """The block of the records to keep."""
        pieces = [bytes(piece) for piece in self.pieces(keep_R)]
        lengths_R = np.diff(np.append(self.starts_R, len(self.data)))[keep_R]
        starts_R = np.cumsum(lengths_R) - lengths_R
        columns_R = None if self.columns_R is None else self.columns_R[keep_R]
        return Block(b"".join(pieces), starts_R, self.lines_R[keep_R], columns_R)


def blocks(path: str, delimiter: str, quoting: bool) -> Iterator[Block]:
    """The records of a text file, plain or packed, some 8 MiB at a time.

    Raises:
        DataError: missing, not text, cannot be unpacked, or a record has no end.
    """
    rest, line, first = b"", 1, True
    stream = _pieces(path)
    for piece in stream:
        if first:
            if b"\0" in piece[:65536]:
                raise DataError(f"{path}: holds binary data, not text; check source.format and the file's ending")
            piece = piece.removeprefix(_BOM)
            first = False
        data = rest + piece
        block, consumed, line = _cut(data, delimiter, quoting, line, last=False)
        rest = data[consumed:]
        if len(rest) > LONGEST_RECORD:
            raise DataError(
                f"{path}: line {line}: no record ends within 64 MiB; is a quote not closed, or is it no text?"
            )
        if len(block.starts_R):
            yield block
    if rest:
        block, _, _ = _cut(rest, delimiter, quoting, line, last=True)
        if len(block.starts_R):
            yield block


def _pieces(path: str) -> Iterator[bytes]:
    filesystem, inner = storage.resolve(path)
    try:
        with filesystem.open_input_stream(inner) as stream:
            while piece := stream.read(BLOCK_BYTES):
                yield piece
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct the path") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read, is it whole? ({one_line(error)})") from None


def one_line(error: BaseException) -> str:
    """An error's first line, without its full stop."""
    return str(error).split("\n")[0].strip().rstrip(".")


def _cut(data: bytes, delimiter: str, quoting: bool, line: int, last: bool) -> tuple[Block, int, int]:
    """The records of ``data``, how many bytes they take, and the line that follows them."""
    if b"\r" in data or (quoting and b'"' in data):
        return cut_closely(data, delimiter, quoting, line, last)
    stops_R = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    if last and not data.endswith(b"\n"):
        stops_R = np.append(stops_R, len(data))
    if not len(stops_R):
        return Block(b"", stops_R, stops_R), 0, line
    starts_R = np.append(0, stops_R[:-1])
    if (stops_R - starts_R == 1).any():
        return cut_closely(data, delimiter, quoting, line, last)
    consumed, count = int(stops_R[-1]), len(stops_R)
    whole = data if consumed == len(data) else data[:consumed]
    return Block(whole, starts_R, np.arange(line, line + count)), consumed, line + count


def cut_closely(data: bytes, delimiter: str, quoting: bool, line: int, last: bool) -> tuple[Block, int, int]:
    """Records found byte by byte, with their numbers of columns; returns as ``_cut``."""
    ends = data.count(b"\n") + data.count(b"\r") + 1
    starts, columns, lines = (np.empty(ends, np.int64) for _ in range(3))
    count, consumed, line, open_quote = _scan(
        np.frombuffer(data, np.uint8), ord(delimiter), ord('"') if quoting else -1, line, last, starts, columns, lines
    )
    whole = data if consumed == len(data) else data[:consumed]
    return Block(whole, starts[:count], lines[:count], columns[:count], open_quote), consumed, line


@njit(nogil=True, cache=True)
def _scan(
    data: Array, delimiter: int, quote: int, line: int, last: bool, starts: Array, columns: Array, lines: Array
) -> tuple[int, int, int, bool]:
    """Find the records; returns their number, the bytes they take, the next line, whether a quote is open."""
    size = len(data)
    count, at, start, width = 0, 0, 0, 1
    first_line = line
    fresh, quoted = True, False
    while at < size:
        c = data[at]
        if quoted:
            if c == quote:
                if at + 1 < size and data[at + 1] == quote:
                    at += 1
                elif at + 1 == size and not last:
                    break
                else:
                    quoted = False
            elif c == 10:
                line += 1
        elif c == delimiter:
            width += 1
            fresh = True
            at += 1
            continue
        elif c == 10 or c == 13:
            if c == 13 and at + 1 == size and not last:
                break
            if c == 13 and at + 1 < size and data[at + 1] == 10:
                at += 1
            line += 1
            if at - start > (1 if data[at] == 10 and at > 0 and data[at - 1] == 13 else 0):
                starts[count], columns[count], lines[count] = start, width, first_line
                count += 1
            start, width, first_line, fresh = at + 1, 1, line, True
            at += 1
            continue
        elif fresh and c == quote:
            quoted = True
        fresh = False
        at += 1
    if last and start < size:
        starts[count], columns[count], lines[count] = start, width, first_line
        return count + 1, size, line, quoted
    return count, start, first_line, False
