"""Rows of a checkpoint by their ids, found by search in mapped files: nothing of a table is held in memory.

Of each table there is a list of blocks by the prefixes of their ids. A block's ids ascend and are hashes, so they lie
evenly between its first and its last: the place of an id is guessed to some dozens of rows and found from there, in
one page or two. Layers are searched from the newest on, and in each its rows before the ids that are gone. Ids are
looked up in groups, whose cache misses overlap.

Sources: Perl, Itai and Avni, "Interpolation search: a log log N search", CACM 1978; Bentley and Yao, "An almost optimal
algorithm for unbounded searching", 1976 (galloping); Linux, madvise(2), MADV_DONTNEED.
Dims: U ids, L levels, T tables, B blocks, K numbers per row, W 32-bit words per row.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from llvmlite import ir
from numba import njit, types, uint64
from numba.core import cgutils
from numba.extending import intrinsic

from des_core.checkpoint.blocks import PREFIX_BITS
from des_core.errors import CheckpointError
from des_core.release.serve.weight_files import FIX, MappedBlock, Part, advise

Array = np.ndarray[Any, np.dtype[Any]]

GROUP = 64
"""Ids whose searches overlap."""
STRIDE = 8
"""Rows of the first step of a search away from its guess."""
PIECE = 16 << 20
"""Bytes of a mapped file that are let go at once."""
_SHIFT = np.uint64(64 - PREFIX_BITS)


class Found(NamedTuple):
    """Where the rows of ids lie."""

    block_U: Array
    """Number of the block; -1: no row."""
    place_U: Array
    """Row in the block."""


class Rows:
    """The rows of a checkpoint.

    Args:
        layers: the mapped parts of each, the oldest first.
        tables: their names, by which ids are looked up.
        width: numbers per row that the model has, K.
        memory: most bytes of the mapped files to keep in this process's memory; 0: the system decides.

    Raises:
        CheckpointError: blocks overlap, or have another width.
    """

    def __init__(self, layers: Sequence[Sequence[Part]], tables: Sequence[str], width: int, memory: int = 0) -> None:
        parts = [part for layer in layers for part in layer]
        forms = {(part.width, part.dtype) for part in parts} or {(width, "float32")}
        if forms != {(width, max(forms)[1])}:
            raise CheckpointError(
                f"the checkpoint's rows are {sorted(forms)} and the model's have {width} numbers; {FIX}"
            )
        self.dtype = np.dtype(max(forms)[1])
        self.width = width
        self._parts = parts
        """Whoever holds addresses holds the files."""
        levels = [
            [one for part in layer for one in part.blocks if one.block.kind == kind]
            for layer in reversed(layers)
            for kind in ("weights", "gone")
        ]
        self._starts_LT, blocks = _ordered([level for level in levels if level], tables)
        self._index = _index(blocks)
        self._bound = _Bound(self.files, memory) if memory else None

    @property
    def files(self) -> list[pa.Buffer]:
        """The mapped files."""
        return [file for part in self._parts for file in part.files]

    @property
    def size(self) -> int:
        """Bytes of the mapped files."""
        return sum(file.size for file in self.files)

    def find(self, ids_U: Array, tables_U: Array) -> Found:
        """Where the rows of ids of tables, by their numbers, lie."""
        return Found(*_find(ids_U.view(np.uint64), tables_U, self._starts_LT, *self._index[:6]))

    def rows(self, found: Found) -> Array:
        """A copy of rows [U, K]; zeros where there is none."""
        rows_UK = np.zeros((len(found.block_U), self.width), self.dtype)
        _gather(*found, self._index[7], rows_UK.view(np.uint32))
        if self._bound is not None:
            self._bound.keep()
        return rows_UK

    def last(self, found: Found) -> Array:
        """The newest step that looked each row up in training, uint32 [U]; 0 where there is none."""
        last_U = np.zeros(len(found.block_U), np.uint32)
        _gather(*found, self._index[6], last_U[:, None])
        return last_U


def _ordered(levels: list[list[MappedBlock]], tables: Sequence[str]) -> tuple[Array, list[MappedBlock]]:
    """Where the blocks of each level and table begin, int64 [L, T + 1], and all blocks in that order."""
    starts_LT = np.zeros((len(levels), len(tables) + 1), np.int64)
    ordered: list[MappedBlock] = []
    for number, level in enumerate(levels):
        by_table: dict[str, list[MappedBlock]] = {}
        for one in level:
            by_table.setdefault(one.block.table, []).append(one)
        for at, table in enumerate(tables):
            starts_LT[number, at] = len(ordered)
            ordered += sorted(by_table.get(table, []), key=lambda one: one.block.first)
            _check_apart(ordered[starts_LT[number, at] :])
        starts_LT[number, -1] = len(ordered)
    return starts_LT, ordered


def _check_apart(blocks: list[MappedBlock]) -> None:
    for before, after in zip(blocks, blocks[1:], strict=False):
        if after.block.first <= before.block.last:
            table, first = after.block.table, after.block.first
            raise CheckpointError(f"two blocks of table {table} hold ids of prefix {first}; {FIX}")


def _index(blocks: list[MappedBlock]) -> tuple[Array, ...]:
    """Of each block: first prefix, first and last id, rows, address of ids, whether they are gone, of last, of rows."""
    numbers = np.array([(one.block.first, one.block.rows, one.ids, one.last, one.numbers) for one in blocks], np.int64)
    first_B, rows_B, ids_B, last_B, numbers_B = numbers.reshape(-1, 5).T.copy()
    low_B, high_B = _edges(ids_B, rows_B)
    return first_B, low_B, high_B, rows_B, ids_B, numbers_B == 0, last_B, numbers_B


class _Bound:
    """Lets go of pages of mapped files while a process holds more of them than it should.

    Pages leave the process's memory, not the system's: one that is wanted again comes back without reading the disk,
    unless a control group, or the machine, had no room for it meanwhile. Which ones stay there the system knows best.

    Args:
        files: the mapped ones.
        most: bytes.
    """

    def __init__(self, files: list[pa.Buffer], most: int) -> None:
        self._pieces = [
            (file, start, min(PIECE, file.size - start)) for file in files for start in range(0, file.size, PIECE)
        ]
        self._most, self._next = most, 0
        self._one = threading.Lock()
        for _ in self._pieces:
            self._let_go()
        self._others = _mapped_bytes()
        """Libraries, of which pages are in memory too."""

    def keep(self) -> None:
        """Let go of pages, in the order of the files, if they are too many; only one thread does."""
        if self._held() <= self._most or not self._one.acquire(blocking=False):
            return
        try:
            for _ in self._pieces:
                self._let_go()
                if self._held() <= self._most // 4 * 3:
                    return
            self._others = _mapped_bytes()
        finally:
            self._one.release()

    def _held(self) -> int:
        return _mapped_bytes() - self._others

    def _let_go(self) -> None:
        file, start, size = self._pieces[self._next]
        self._next = (self._next + 1) % len(self._pieces)
        advise(file, mmap.MADV_DONTNEED, start, size)


def _mapped_bytes() -> int:
    """Bytes of files that this process has in its memory."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")


def _load(kind: Any) -> Any:
    def load(_: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.load(builder.inttoptr(values[0], context.get_value_type(kind).as_pointer()), align=1)

        return kind(types.int64), build

    return intrinsic(load)


def _fetch(_: Any, address: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(instruction, [builder.inttoptr(values[0], cgutils.voidptr_t), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), build


_load_id: Any = _load(types.uint64)
_load_word: Any = _load(types.uint32)
_prefetch: Any = intrinsic(_fetch)


@njit(nogil=True, cache=True)
def _edges(ids_B: Array, rows_B: Array) -> Any:
    low_B, high_B = np.empty(len(ids_B), np.uint64), np.empty(len(ids_B), np.uint64)
    for b in range(len(ids_B)):
        low_B[b] = _load_id(ids_B[b])
        high_B[b] = _load_id(ids_B[b] + 8 * (rows_B[b] - 1))
    return low_B, high_B


@njit(nogil=True, cache=True)
def _block_of(wanted: Any, start: int, stop: int, first_B: Array, low_B: Array, high_B: Array) -> Any:
    """The block among those from ``start`` to ``stop`` that may hold an id, or -1."""
    prefix, begin = np.int64(wanted >> _SHIFT), start
    while start < stop:
        middle = (start + stop) >> 1
        if first_B[middle] <= prefix:
            start = middle + 1
        else:
            stop = middle
    block = start - 1
    if block < begin or wanted < low_B[block] or wanted > high_B[block]:
        return -1
    return block


@njit(nogil=True, cache=True)
def _place_of(wanted: Any, address: Any, rows: Any, guess: Any) -> Any:
    """The row of an id in a block, or -1: searched from a guess on, in steps that double."""
    low, high, step = np.int64(0), np.int64(rows), np.int64(STRIDE)
    seen = _load_id(address + 8 * guess)
    if seen == wanted:
        return guess
    if seen < wanted:
        low = guess + 1
        while low + step < high and _load_id(address + 8 * (low + step)) < wanted:
            low, step = low + step + 1, 2 * step
        high = min(low + step + 1, high)
    else:
        high = guess
        while high - step > low and _load_id(address + 8 * (high - step)) > wanted:
            high, step = high - step, 2 * step
        low = max(high - step, low)
    while low < high:
        middle = (low + high) >> 1
        seen = _load_id(address + 8 * middle)
        if seen == wanted:
            return middle
        if seen < wanted:
            low = middle + 1
        else:
            high = middle
    return -1


@njit(nogil=True, cache=True)
def _find(
    ids_U: Array,
    tables_U: Array,
    starts_LT: Array,
    first_B: Array,
    low_B: Array,
    high_B: Array,
    rows_B: Array,
    ids_B: Array,
    gone_B: Array,
) -> Any:
    """Block and row of each id, block -1 where no layer has a row of it."""
    many = len(ids_U)
    block_U, place_U = np.full(many, -1, np.int32), np.zeros(many, np.int32)
    open_U, left = np.arange(many), many
    block, guess = np.empty(GROUP, np.int64), np.empty(GROUP, np.int64)
    for level in range(starts_LT.shape[0]):
        kept = 0
        for group in range(0, left, GROUP):
            size = min(GROUP, left - group)
            for i in range(size):
                u = open_U[group + i]
                wanted = uint64(ids_U[u])
                start, stop = starts_LT[level, tables_U[u]], starts_LT[level, tables_U[u] + 1]
                b = block[i] = _block_of(wanted, start, stop, first_B, low_B, high_B)
                if b >= 0:
                    share = np.float64(wanted - low_B[b]) / max(np.float64(high_B[b] - low_B[b]), 1.0)
                    guess[i] = min(np.int64(share * (rows_B[b] - 1)), rows_B[b] - 1)
                    _prefetch(ids_B[b] + 8 * guess[i])
            for i in range(size):
                u, b = open_U[group + i], block[i]
                place = _place_of(uint64(ids_U[u]), ids_B[b], rows_B[b], guess[i]) if b >= 0 else -1
                if place < 0:
                    open_U[kept] = u
                    kept += 1
                elif not gone_B[b]:
                    block_U[u], place_U[u] = b, place
        left = kept
    return block_U, place_U


@njit(nogil=True, cache=True)
def _gather(block_U: Array, place_U: Array, address_B: Array, out_UW: Array) -> None:
    """Copy the 32-bit words of rows that are found."""
    many, words = out_UW.shape
    for group in range(0, many, GROUP):
        stop = min(group + GROUP, many)
        for u in range(group, stop):
            if block_U[u] >= 0:
                address = address_B[block_U[u]] + 4 * words * np.int64(place_U[u])
                for line in range(0, 4 * words, 64):
                    _prefetch(address + line)
        for u in range(group, stop):
            if block_U[u] >= 0:
                address = address_B[block_U[u]] + 4 * words * np.int64(place_U[u])
                for word in range(words):
                    out_UW[u, word] = _load_word(address + 4 * word)
