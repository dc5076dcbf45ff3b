"""Text logs as blocks of whole records: finds in the bytes each record's place, its line, and the ends of its columns.

A block is some 8 MiB, cut where a record ends. One pass over its bytes finds everything, by the rules of CSV: a quote
opens only at a column's start, "" inside it is a quote, and a line end inside it belongs to the value. Empty lines
are no records.

A stray quote must not swallow the lines up to the next one. A value that spans lines is taken for one only if its
quote closes before a delimiter or a line end, within ``LONGEST_VALUE``, and its record has as many columns as the
first; otherwise the record ends with the line that opened the quote, is a bad one, and the next line begins another.

Dims: R records of a block, E edges of its columns.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit

from des_core import remote, storage
from des_core.data.read.hashing import I64, Array
from des_core.errors import DataError, UnusableLogsError

BLOCK_BYTES = 8 << 20
LONGEST_RECORD = 64 << 20
"""A record that is longer has no end: the quote that it opens is never closed, or it is no text."""

LINE_WINDOW = 1 << 20
"""Bytes before a block in which a line's end is looked for."""

LONGEST_VALUE = 64 << 10
"""Bytes of a quoted value that spans lines; a longer one was never meant."""

SLACK = 8
"""Bytes behind the records that may be read: values are read 8 bytes at a time."""

OPEN = -1
"""For the number of columns of a record whose quote is not closed."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole records: column c of record r is ``data[edges_E[e] + 1 : edges_E[e + 1]]`` where e = ``edges_R[r] + c``.

    Record r begins on line ``lines_R[r]`` and has ``widths_R[r]`` columns, or ``OPEN`` where it opens a quote that is
    not closed. ``quote`` is the byte that quotes values, or -1.
    """

    data: Array
    edges_E: Array
    edges_R: I64
    lines_R: I64
    widths_R: I64
    quote: int

    def kept(self, keep_R: Array) -> Block:
        """The block of the records to keep."""
        return replace(
            self,
            edges_R=self.edges_R[keep_R],
            lines_R=self.lines_R[keep_R],
            widths_R=self.widths_R[keep_R],
        )


@dataclass(frozen=True)
class Range:
    """Blocks ``first`` to ``stop`` of a text file that is neither packed nor recoded; no ``stop``: to its end.

    Block n holds the records that end in the file's bytes (n BLOCK_BYTES, (n + 1) BLOCK_BYTES], whoever reads it.
    """

    first: int = 0
    stop: int | None = None
    begin: int = 0
    """Offset of the first record, which may begin in a block before."""
    line: int = 1
    """Of the first record."""


class Blocks:
    """The records of a text file, plain or packed, some 8 MiB at a time.

    Args:
        delimiter: an ASCII character, or none: then each record is one column.
        width: columns of a record; 0: as many as the first one has.
        encoding: of the file.
        within: which blocks; None: all.
    """

    def __init__(
        self,
        path: str,
        delimiter: str,
        quoting: bool,
        width: int = 0,
        encoding: str = "utf-8",
        within: Range | None = None,
    ) -> None:
        self._path, self._encoding, self._range = path, encoding, within
        self._delimiter, self._quote = ord(delimiter or "\n"), ord('"') if quoting else -1
        self.width = width
        self.line = within.line if within else 1
        """After iteration: of the record that follows."""
        self.offset = within.begin if within else 0
        """After iteration: of the record that follows."""

    def __iter__(self) -> Iterator[Block]:
        """Whole blocks.

        Raises:
            DataError: missing, not text, cannot be unpacked, or a record has no end.
        """
        rest, count = np.zeros(0, np.uint8), -1
        place, stop = (self._range.first, self._range.stop) if self._range else (0, None)
        with _opened(self._path, self._range is not None) as file:
            if place:
                file.seek(self.offset)
                rest = np.frombuffer(file.read(place * BLOCK_BYTES - self.offset), np.uint8)
            stream = file if self._encoding == "utf-8" else Recoded(self._path, file, self._encoding)
            while count and place != stop:
                data = np.empty(len(rest) + BLOCK_BYTES + SLACK, np.uint8)
                data[: len(rest)] = rest
                fresh = count < 0 and not place
                count, place = stream.readinto(data[len(rest) : -SLACK]), place + 1
                data = data[: len(rest) + count + SLACK]
                data[-SLACK:] = 0
                if fresh:
                    data = self._checked(data, count)
                block, consumed, self.line = _cut(
                    data, self._delimiter, self._quote, self.width, self.line, last=not count
                )
                rest = data[consumed:-SLACK]
                self.offset += consumed
                if len(rest) > LONGEST_RECORD:
                    raise UnusableLogsError(
                        f"{self._path}: line {self.line}: no record ends within 64 MiB; is it no text?"
                    )
                if len(block.lines_R):
                    self.width = self.width or max(0, int(block.widths_R[0]))
                    yield block

    def _checked(self, data: Array, count: int) -> Array:
        """A file's first bytes without its mark of UTF-8."""
        if (data[: min(count, 65536)] == 0).any():
            raise UnusableLogsError(f"{self._path}: holds {_binary(data)}")
        mark = len(_BOM) if data[: len(_BOM)].tobytes() == _BOM else 0
        self.offset += mark
        return data[mark:]


def likely_begin(path: str, block: int) -> int:
    """Where the first record of a block most likely begins: after the last line that ends before the block.

    It does not where that line end belongs to a quoted value; then the block before ends elsewhere.
    """
    stop = block * BLOCK_BYTES
    start = max(stop - LINE_WINDOW, 0)
    with _opened(path, True) as file:
        file.seek(start)
        window: bytes = file.read(stop - start)
    return start + max(window.rfind(b"\n"), window.rfind(b"\r")) + 1


class Recoded:
    """A stream of text in some encoding, read as UTF-8."""

    def __init__(self, path: str, stream: Any, encoding: str) -> None:
        self._path, self._stream, self._encoding = path, stream, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._rest = b""

    def readinto(self, buffer: Array) -> int:
        """Fill a buffer as far as there is text; 0 at its end."""
        while not self._rest:
            piece = self._stream.read(len(buffer) // 4 or 1)
            try:
                self._rest = self._decoder.decode(piece, final=not piece).encode()
            except UnicodeError as error:
                raise UnusableLogsError(
                    f"{self._path}: is not text in source.encoding = {self._encoding!r} ({error}); name another"
                ) from None
            if not piece:
                break
        count = min(len(buffer), len(self._rest))
        buffer[:count] = np.frombuffer(self._rest[:count], np.uint8)
        self._rest = self._rest[count:]
        return count


@contextmanager
def _opened(path: str, anywhere: bool = False) -> Iterator[Any]:
    """The bytes of a file, unpacked; ``anywhere``: as they are, to be read from any place."""
    filesystem, inner = storage.resolve(path)
    try:
        with (
            filesystem.open_input_file(inner)
            if anywhere
            else filesystem.open_input_stream(inner, compression=packing_of(inner))
        ) as stream:
            yield stream
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; correct the path") from None
    except (OSError, pa.ArrowException) as error:
        remote.raise_passing(path, error)
        raise UnusableLogsError(f"{path}: cannot be read, is it whole? ({one_line(error)})") from None


def packing_of(path: str) -> str | None:
    """How a file is packed by its ending, in capitals too."""
    try:
        name: str = pa.Codec.detect(path.lower()).name
    except (TypeError, ValueError):
        # Pyarrow raises either where the ending names no codec.
        return None
    return name


def _binary(data: Array) -> str:
    """What a file that is no text is, and what to do."""
    first = data[:4].tobytes()
    if first[:2] == b"\x1f\x8b":
        return "gzip without the ending .gz; rename it"
    if first == b"PK\x03\x04":
        return "a zip archive; unpack it, or pack it by gzip"
    return "binary data, not text; check source.format and the file's ending"


def one_line(error: BaseException) -> str:
    """An error's first line, without its full stop."""
    return str(error).split("\n")[0].strip().rstrip(".")


def _cut(data: Array, delimiter: int, quote: int, width: int, line: int, last: bool) -> tuple[Block, int, int]:
    """The records of ``data`` before its slack, how many bytes they take, and the line that follows them."""
    text = data[:-SLACK]
    columns, lines = _count(text, np.uint8(delimiter))
    edges_E = np.empty(columns + 2 * lines + 3, np.int32)
    edges_R, lines_R, widths_R = np.empty((3, lines + 1), np.int64)
    special = np.zeros(256, np.bool_)
    special[[delimiter, ord("\n"), ord("\r"), *([quote] if quote >= 0 else [])]] = True
    count, consumed, line = _scan(
        text, special, delimiter, quote, LONGEST_VALUE, width, line, last, edges_E, edges_R, lines_R, widths_R
    )
    return Block(data, edges_E, edges_R[:count], lines_R[:count], widths_R[:count], quote), consumed, line


@njit(nogil=True, cache=True)
def _count(text: Array, delimiter: Any) -> tuple[int, int]:
    """How many columns and lines may end here."""
    columns, lines = 0, 0
    for c in text:
        columns += c == delimiter
        lines += (c == 10) | (c == 13)
    return columns, lines


@njit(nogil=True, cache=True)
def _quoted_end(
    text: Array, at: int, delimiter: int, quote: int, longest: int, last: bool
) -> tuple[int, int, int, bool]:
    """The end of the quoted value that opens at ``at``.

    Returns:
        where it ends; where the line after its first one begins, 0 if it has one line; the line ends in it; whether
        its quote is not closed as one that was meant. A value that goes on behind ``text`` ends with it.
    """
    size, opened, after, lines, quoted = len(text), at, 0, 0, True
    at += 1
    while quoted and at < size and (not after or at - opened <= longest):
        c = text[at]
        if c == 10 or c == 13:
            lines += c == 10
            if not after:
                after = at + (2 if c == 13 and at + 1 < size and text[at + 1] == 10 else 1)
        elif c == quote:
            quoted = at + 1 < size and text[at + 1] == quote
            at += quoted
        at += 1
    if quoted:
        return at, after, lines, at < size or last
    goes_on = at < size and text[at] != delimiter and text[at] != 10 and text[at] != 13
    return at, after, lines, after > 0 and goes_on


@njit(nogil=True, cache=True)
def _scan(
    text: Array,
    special: Array,
    delimiter: int,
    quote: int,
    longest: int,
    width: int,
    line: int,
    last: bool,
    edges_E: Array,
    edges_R: Array,
    lines_R: Array,
    widths_R: Array,
) -> tuple[int, int, int]:
    """Find the records; returns their number, the bytes they take, the next line."""
    size = len(text)
    count, at, start, first_line, first_edge, edge = 0, 0, 0, line, 0, 1
    edges_E[0] = -1
    # Where the record's second line begins, if a quoted value spans lines.
    second = 0
    while at < size or (last and start < size):
        stop, unclosed = at, False
        if at == size:
            line += 1
        else:
            c = text[at]
            if not special[c]:
                at += 1
                continue
            if c == delimiter and c != 10:
                edges_E[edge] = at
                edge += 1
                at += 1
                continue
            if c == quote:
                if at != edges_E[edge - 1] + 1:
                    at += 1
                    continue
                at, after, lines, unclosed = _quoted_end(text, at, delimiter, quote, longest, last)
                line += lines
                second = second if second else after
                if not unclosed:
                    continue
            elif c == 13 and at + 1 == size and not last:
                break
            else:
                at += 2 if c == 13 and at + 1 < size and text[at + 1] == 10 else 1
                line += 1
        if unclosed or (second > 0 and width > 0 and edge - first_edge != width):
            # The record ends with its first line; its edges are never read.
            edges_R[count], lines_R[count], widths_R[count] = first_edge, first_line, OPEN
            count += 1
            at = second if second else size
            line = first_line + 1
        elif stop > start:
            edges_E[edge] = stop
            edges_R[count], lines_R[count], widths_R[count] = first_edge, first_line, edge - first_edge
            width = width if width else edge - first_edge
            count += 1
            first_edge = edge + 1
        edge = first_edge + 1
        edges_E[first_edge] = at - 1
        start, first_line, second = at, line, 0
    return count, start, first_line
