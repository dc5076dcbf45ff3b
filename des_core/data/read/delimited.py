"""CSV and TSV: blocks of records -> columns of text, and the records that are not whole.

Those with other than the header's number of columns, or with bytes that are no UTF-8, are taken out. Only chosen
columns are looked at. Values are copied record by record: column by column, each value would come from another line of
the cache.

Dims: R records of a block, E edges of its columns, K chosen columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numba import int32, int64, njit, uint8, uint64

from des_core.data.read.blocks import OPEN, SLACK, Block, Blocks, Range
from des_core.data.read.hashing import I64, Array, word_at
from des_core.errors import DataError


@dataclass(frozen=True)
class Raw:
    """Records of one block: their texts, and those that are not whole.

    ``rows_R`` counts a file's records from 0, bad ones too, a header not; ``lines_R`` its lines from 1.
    ``bad`` holds a line and a reason each; ``read`` counts the records, the bad ones among them.
    """

    table: pa.Table
    rows_R: I64
    lines_R: I64
    bad: tuple[tuple[int, str], ...]
    read: int


def read_delimited(
    path: str,
    delimiter: str,
    quoting: bool,
    header: bool | Sequence[str],
    missing: Sequence[str],
    choose: Callable[[list[str]], list[str]],
    encoding: str = "utf-8",
    within: Range | None = None,
    width: int = 0,
    row: int = 0,
) -> Iterator[Raw]:
    """The records of a CSV or TSV as columns of text, null where a value is missing.

    Args:
        header: whether the first record names the columns, or their names; false names them "0", "1", ...
        choose: from the columns that there are to those that are read.
        encoding: of the file.
        within: which blocks, None: all; if not the first, ``header`` are the names and ``width`` their number.
        row: number of the first record.
    """
    names: list[str] = []
    chosen: list[str] = []
    width = width or (0 if isinstance(header, bool) else len(header))
    for block in Blocks(path, delimiter, quoting, width, encoding, within):
        if not names:
            names = names_of(path, block, header)
            block = block.kept(np.arange(len(block.lines_R)) > 0) if header is True else block
            chosen = choose(names)
        read = len(block.lines_R)
        if read:
            yield _columns(block, row, names, chosen, missing)
        row += read


def names_of(path: str, block: Block, header: bool | Sequence[str]) -> list[str]:
    """Names of the columns, by a file's first block."""
    if header is False:
        return [str(position) for position in range(_width(path, block))]
    if header is not True:
        return list(header)
    names = _first_record(path, block)
    bare = [name.strip() for name in names]
    return bare if len(set(bare)) == len(bare) else names


def _first_record(path: str, block: Block) -> list[str]:
    first = block.kept(np.arange(len(block.lines_R)) == 0)
    if first.widths_R[0] == OPEN:
        raise DataError(
            f"{path}: the first line, which names the columns, opens a quote that is not closed; close it, "
            'or set source.quoting = "none"'
        )
    try:
        return [column.view(pa.binary())[0].as_py().decode() for column in texts(first, range(first.widths_R[0]))]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the first line is not UTF-8 text ({error.reason}); convert the file") from None


def _width(path: str, block: Block) -> int:
    """Columns of the first record that is whole."""
    known = block.widths_R[block.widths_R != OPEN]
    if not len(known):
        raise DataError(f'{path}: every line opens a quote that is not closed; set source.quoting = "none"')
    return int(known[0])


def _columns(block: Block, row: int, names: list[str], chosen: list[str], missing: Sequence[str]) -> Raw:
    """Columns of the block's whole records, of which the first is the file's record ``row``."""
    read = len(block.lines_R)
    rows_R = np.arange(row, row + read)
    whole_R, bad = _whole(block, len(names))
    if bad:
        rows_R, block = rows_R[whole_R], block.kept(whole_R)
    places = {name: place for place, name in enumerate(names)}
    wanted = chosen or list(places)
    table = pa.table(texts(block, [places[name] for name in wanted], missing), names=wanted)
    faults: dict[int, str] = {}
    if block.data.max() > 127:
        for name in reversed(wanted):
            faults |= dict.fromkeys(not_text(table.column(name).chunk(0)), f"column {name}: not UTF-8 text")
    if not faults:
        return Raw(table, rows_R, block.lines_R, tuple(bad), read)
    bad += [(int(block.lines_R[index]), reason) for index, reason in faults.items()]
    keep_R = np.ones(len(rows_R), np.bool_)
    keep_R[list(faults)] = False
    return Raw(table.filter(pa.array(keep_R)), rows_R[keep_R], block.lines_R[keep_R], tuple(sorted(bad)), read)


def _whole(block: Block, width: int) -> tuple[Array, list[tuple[int, str]]]:
    """Which records have ``width`` columns, and the line of each other one and why."""
    whole_R = block.widths_R == width
    reasons = {
        i: "a quote is not closed" if block.widths_R[i] == OPEN else f"{block.widths_R[i]} columns instead of {width}"
        for i in np.flatnonzero(~whole_R).tolist()
    }
    return whole_R, [(int(block.lines_R[index]), reason) for index, reason in reasons.items()]


def not_text(column: pa.Array) -> list[int]:
    """Positions of the values that are not UTF-8."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return [
            index for index, value in enumerate(column.view(pa.binary()).to_pylist()) if value and not _is_text(value)
        ]
    return []


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def texts(block: Block, places: Sequence[int], missing: Sequence[str] = ()) -> list[pa.Array]:
    """Columns of records that all have them: texts, of bytes as they are, null where one is of ``missing``."""
    places_K = np.array(places, np.int64)
    starts_K = np.append(0, np.cumsum(_measure(block.edges_E, block.edges_R, places_K) + SLACK))
    out = np.empty(starts_K[-1], np.uint8)
    offsets_KR = np.empty((len(places_K), len(block.lines_R) + 1), np.int32)
    gone_KR = np.zeros((len(places_K), len(block.lines_R)), np.bool_)
    words = [text.encode() for text in missing]
    # First bytes of values that need a closer look: a quote, or a missing word's.
    odd = np.zeros(256, np.bool_)
    odd[[word[0] for word in words if word] + [block.quote] * (block.quote >= 0)] = True
    _gather(
        block.data,
        block.edges_E,
        block.edges_R,
        places_K,
        odd,
        block.quote,
        np.frombuffer(b"".join(words), np.uint8),
        np.cumsum([0, *map(len, words)]),
        out,
        starts_K,
        offsets_KR,
        gone_KR,
    )
    if "" in missing:
        gone_KR |= offsets_KR[:, 1:] == offsets_KR[:, :-1]
    nulls_K = np.count_nonzero(gone_KR, axis=1)
    valid_K8 = np.packbits(~gone_KR, axis=1, bitorder="little")
    values = pa.py_buffer(out)
    return [
        pa.StringArray.from_buffers(len(gone_R), pa.py_buffer(offsets_R), values, pa.py_buffer(valid_8), nulls)
        for gone_R, offsets_R, valid_8, nulls in zip(gone_KR, offsets_KR, valid_K8, nulls_K.tolist(), strict=True)
    ]


@njit(nogil=True, cache=True)
def _measure(edges_E: Array, edges_R: Array, places_K: Array) -> Array:
    """Bytes of each column."""
    sizes_K = np.zeros(len(places_K), np.int64)
    for edge in edges_R:
        for k in range(len(places_K)):
            at = edge + places_K[k]
            sizes_K[k] += edges_E[at + 1] - edges_E[at] - 1
    return sizes_K


@njit(nogil=True, cache=True)
def _gather(
    data: Array,
    edges_E: Array,
    edges_R: Array,
    places_K: Array,
    odd: Array,
    quote: int,
    words: Array,
    word_edges: Array,
    out: Array,
    starts_K: Array,
    offsets_KR: Array,
    gone_KR: Array,
) -> None:
    """Copy values, record by record, to where each column starts; mark those that stand for a missing value."""
    at_K = starts_K.astype(np.uint64)
    for r in range(len(edges_R)):
        for k in range(len(places_K)):
            edge = edges_R[r] + places_K[k]
            begin, to = uint64(edges_E[edge] + 1), at_K[k]
            size = uint64(edges_E[edge + 1]) - begin
            offsets_KR[k, r] = int32(to)
            # A word is copied even of an empty value: a branch that no one can foretell would take longer.
            word = word_at(data, begin)
            _put_word(out, to, word)
            more = uint64(8)
            while more < size:
                _put_word(out, to + more, word_at(data, begin + more))
                more += uint64(8)
            if odd[word & uint64(255)]:
                size = _unquoted(data, begin, size, quote, out, to)
                gone_KR[k, r] = _is_one_of(words, word_edges, out, to, size)
            at_K[k] = to + size
    for k in range(len(places_K)):
        offsets_KR[k, len(edges_R)] = int32(at_K[k])


@njit(nogil=True, cache=True)
def _is_one_of(words: Array, word_edges: Array, out: Array, to: Any, size: Any) -> bool:
    for m in range(len(word_edges) - 1):
        first = word_edges[m]
        same = word_edges[m + 1] - first == int64(size)
        for i in range(int64(size) if same else 0):
            same = same and out[int64(to) + i] == words[first + i]
        if same:
            return True
    return False


@njit(nogil=True, cache=True)
def _unquoted(data: Array, begin: Any, size: Any, quote: int, out: Array, to: Any) -> Any:
    """The size of a value without its quotes, to which it is written anew if it begins with one."""
    if not size or data[begin] != quote:
        return size
    stop, first, quoted = begin + size, to, True
    at = begin + uint64(1)
    while at < stop:
        if quoted and data[at] == quote:
            quoted = at + uint64(1) < stop and data[at + uint64(1)] == quote
            at += uint64(1)
            if not quoted:
                continue
        out[to] = data[at]
        to += uint64(1)
        at += uint64(1)
    return to - first


@njit(nogil=True, cache=True)
def _put_word(out: Array, to: Any, word: Any) -> None:
    """Write 8 bytes."""
    # Written out whole: the compiler makes one 8-byte store of it.
    out[to] = uint8(word)
    out[to + uint64(1)] = uint8(word >> uint64(8))
    out[to + uint64(2)] = uint8(word >> uint64(16))
    out[to + uint64(3)] = uint8(word >> uint64(24))
    out[to + uint64(4)] = uint8(word >> uint64(32))
    out[to + uint64(5)] = uint8(word >> uint64(40))
    out[to + uint64(6)] = uint8(word >> uint64(48))
    out[to + uint64(7)] = uint8(word >> uint64(56))
