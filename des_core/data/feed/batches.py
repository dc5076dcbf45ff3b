"""One worker's columns of the global batch stream, and the lookups they make.

Batch t of an epoch is samples [t G, (t + 1) G) of the epoch's order, and every worker knows that
order without talking: the stored one or, shuffled, a permutation of row groups, cut into windows of
8 groups, each window's rows permuted in turn. Permutations sort a counter hash of (seed, epoch,
index), so they never change with a library. A worker reads, for whole batches, only the columns of
fields it owns pieces of. A cursor is one number: samples of the epoch already consumed.

A lookup is one value of one sample: x times the row of its id. ``id = splitmix64(key ^ salt)``, salt =
hash of the table's name, is a bijection of the key per table, so the id stands for (table, key).
Its 8 high bits are the bucket, which has an owner; its low bits are for the index.

Dims: B samples of the batch, L lookups owned here, T tables.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit, uint64

from des_core.contracts import FILE, LABEL, ROW, ROW_GROUP, WEIGHT, Dataset, FieldSpec, Reference
from des_core.data.feed.prefetch import in_order
from des_core.data.read.hashing import MISSING, hash_text, splitmix64
from des_core.data.read.parsing import one_chunk
from des_core.data.store.parts import RowGroups
from des_core.data.store.predictions import sample_names

WINDOW = 8
"""Row groups whose rows are shuffled together."""

BUCKET_BITS = 8
BUCKETS = 1 << BUCKET_BITS
"""Logical buckets of a table: the unit of placement."""

NUMBER = 7294026770890427427
"""Key of the one row that a numeric field scales by its value: splitmix64 of 0x6E756D6265720000."""

I64 = np.ndarray[Any, np.dtype[np.int64]]
F32 = np.ndarray[Any, np.dtype[np.float32]]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Lookups:
    """Lookups of one batch owned by one worker, in field-major sample order; arrays of length L.

    ``piece`` is the position in ``Ownership.fields`` of the lookup's field.
    """

    ids: I64
    sample: I64
    piece: I64
    x: F32


@dataclass(frozen=True)
class Raw:
    """Lookups of one batch by their keys, in field-major sample order.

    Where each field has one for each sample, that says to which they belong. Otherwise ``offsets`` [O B + 1] are the
    lookups of each field and sample.
    """

    keys: I64
    sample: I64 | None
    piece: I64 | None
    x: F32 | None
    """None: each is 1."""
    offsets: I64 | None


class Ownership:
    """Which fields and buckets one worker answers for.

    Args:
        fields: all fields of the model, in order.
        owned: table name -> bool [BUCKETS].
    """

    def __init__(self, fields: Sequence[FieldSpec], owned: dict[str, Array]) -> None:
        self.indices = [i for i, field in enumerate(fields) if owned[field.table].any()]
        self.fields = [fields[i] for i in self.indices]
        self.owned = [np.ascontiguousarray(owned[field.table]) for field in self.fields]
        self.tables = sorted({field.table for field in fields})
        self.table_of_piece = np.array([self.tables.index(field.table) for field in self.fields], np.int64)
        self._salts = [table_salt(field.table) for field in self.fields]

    @property
    def columns(self) -> list[str]:
        """Columns of the feature store that this worker must read."""
        return [column for field in self.fields for column in columns_of(field)]

    def raw(self, table: pa.Table, room: Callable[[int], I64] = lambda size: np.empty(size, np.int64)) -> Raw:
        """The lookups of a batch's feature columns before they are hashed, those of other owners' buckets too.

        Args:
            room: makes the array of keys.
        """
        if all(is_one(field) and field.kind == "categorical" for field in self.fields):
            return Raw(_laid([_keys(table, field) for field in self.fields], room), None, None, None, None)
        values = [field_values(table, field) for field in self.fields]
        lengths = [len(keys) for keys, _, _ in values]
        keys = _laid([keys for keys, _, _ in values], room)
        x = None if all(map(is_one, self.fields)) else np.concatenate([x for _, x, _ in values])
        if all(field.kind != "multi" for field in self.fields):
            return Raw(keys, None, None, x, None)
        counts = np.concatenate([np.diff(offsets) for _, _, offsets in values])
        sample = np.tile(np.arange(table.num_rows), len(values)).repeat(counts)
        piece = np.arange(len(values)).repeat(lengths)
        return Raw(keys, sample, piece, x, np.concatenate([[0], counts.cumsum()]).astype(np.int64))

    @property
    def salts(self) -> I64:
        """What the keys of each owned field are XORed with, in the bits of int64."""
        return np.array(self._salts, np.uint64).view(np.int64)

    def lookups(self, table: pa.Table) -> Lookups:
        """The owned lookups of a batch's feature columns."""
        values = [field_values(table, field) for field in self.fields]
        most = sum(len(keys) for keys, _, _ in values)
        ids, sample, piece = (np.empty(most, np.int64) for _ in range(3))
        x = np.empty(most, np.float32)
        used = 0
        for number, (keys, weights, offsets) in enumerate(values):
            used = _lay(
                keys, weights, offsets, self._salts[number], self.owned[number], number, ids, sample, piece, x, used
            )
        return Lookups(ids[:used], sample[:used], piece[:used], x[:used])


def everything(fields: Sequence[FieldSpec]) -> Ownership:
    """The ownership of a single worker."""
    return Ownership(fields, {field.table: np.ones(BUCKETS, np.bool_) for field in fields})


def table_salt(table: str) -> np.uint64:
    """What a table's keys are XORed with before mixing."""
    return np.uint64(hash_text(pa.array([table])).view(np.uint64)[0])


def ids_of(keys: I64, table: str) -> I64:
    """Ids of a table's keys, int64 of the same length."""
    out: I64 = _mix(keys, table_salt(table))
    return out


def keys_of(ids: I64, table: str) -> I64:
    """The other way round: keys of a table's ids."""
    z = ids.view(np.uint64)
    z = (z ^ (z >> np.uint64(31)) ^ (z >> np.uint64(62))) * np.uint64(0x319642B2D24D8EC3)
    z = (z ^ (z >> np.uint64(27)) ^ (z >> np.uint64(54))) * np.uint64(0x96DE1B173F119089)
    z = z ^ (z >> np.uint64(30)) ^ (z >> np.uint64(60))
    keys: I64 = ((z - np.uint64(0x9E3779B97F4A7C15)) ^ table_salt(table)).view(np.int64)
    return keys


@njit(nogil=True, cache=True)
def _mix(keys: Array, salt: Any) -> Array:
    out = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        out[i] = np.int64(splitmix64(uint64(keys[i]) ^ salt))
    return out


@njit(nogil=True, cache=True)
def _lay(
    keys: Array,
    weights: Array,
    offsets: Array,
    salt: Any,
    owned: Array,
    number: int,
    ids: Array,
    sample: Array,
    piece: Array,
    x: Array,
    used: int,
) -> int:
    """Append one field's owned lookups; returns the new count."""
    for row in range(len(offsets) - 1):
        for at in range(offsets[row], offsets[row + 1]):
            mixed = splitmix64(uint64(keys[at]) ^ salt)
            if owned[mixed >> uint64(64 - BUCKET_BITS)]:
                ids[used] = np.int64(mixed)
                sample[used] = row
                piece[used] = number
                x[used] = weights[at]
                used += 1
    return used


def columns_of(field: FieldSpec) -> list[str]:
    """Columns of the feature store that hold a field."""
    return [field.name, WEIGHT + field.name] if field.weight else [field.name]


def is_one(field: FieldSpec) -> bool:
    """Whether a sample has exactly one lookup of a field, with x = 1."""
    if field.kind == "numeric":
        return field.transform == "bucket"
    return field.kind == "categorical" and not field.weight


def field_values(table: pa.Table, field: FieldSpec) -> tuple[I64, F32, I64]:
    """Keys [V], factors x [V] and row offsets [B + 1] of a field's values; training and serving share it."""
    column = one_chunk(table.column(field.name))
    ones = np.arange(len(column) + 1, dtype=np.int64)
    if field.kind == "numeric":
        keys, x = _number_values(column, field)
        return keys, x, ones
    if field.kind == "categorical":
        keys = _keys(table, field)
        x = np.ones(len(keys), np.float32)
        if field.weight:
            x = one_chunk(table.column(WEIGHT + field.name)).to_numpy(zero_copy_only=False).astype(np.float32)
        return keys, x, ones
    offsets = column.offsets.to_numpy().astype(np.int64)
    keys = column.values.to_numpy()[offsets[0] : offsets[-1]]
    x = np.ones(len(keys), np.float32)
    if field.weight:
        weights = one_chunk(table.column(WEIGHT + field.name))
        start, stop = weights.offsets[0].as_py(), weights.offsets[-1].as_py()
        x = weights.values.to_numpy()[start:stop].astype(np.float32)
    offsets -= offsets[0]
    if field.pooling != "sum":
        listed = np.repeat(np.diff(offsets), np.diff(offsets)).astype(np.float32)
        x = (x / (listed if field.pooling == "mean" else np.sqrt(listed))).astype(np.float32)
    return keys, x, offsets


def _keys(table: pa.Table, field: FieldSpec) -> I64:
    """Keys [B] of a categorical field."""
    column = one_chunk(table.column(field.name))
    keys: I64 = column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
    return keys


def _laid(parts: Sequence[I64], room: Callable[[int], I64]) -> I64:
    """The parts one after the other, in an array made by ``room``."""
    out = room(sum(map(len, parts)))
    if parts:
        np.concatenate(parts, out=out)
    return out


def dense_values(table: pa.Table, fields: Sequence[FieldSpec]) -> F32:
    """Dense inputs [B, M], transformed; a missing one is 0."""
    columns = [_transformed(one_chunk(table.column(field.name)), field) for field in fields]
    return np.nan_to_num(np.stack(columns, 1)) if columns else np.zeros((table.num_rows, 0), np.float32)


def sample_ids(batch: pa.Table, files: Sequence[str]) -> pa.Array:
    """Sample ids ``DIGEST:ROW`` [B] of a batch with the columns FILE and ROW; ``files`` are the dataset's."""
    return sample_names(batch.column(FILE), batch.column(ROW), files)


def _number_values(column: pa.Array, field: FieldSpec) -> tuple[I64, F32]:
    """A number scales the field's one row; a missing one has a row of its own; a bucket is a key."""
    values = _transformed(column, field)
    absent = np.isnan(values)
    if field.transform == "bucket":
        keys = np.searchsorted(np.array(field.edges, np.float32), values, side="right").astype(np.int64)
        return np.where(absent, MISSING, keys), np.ones(len(values), np.float32)
    return np.where(absent, np.int64(MISSING), np.int64(NUMBER)), np.where(absent, np.float32(1), values)


def _transformed(column: pa.Array, field: FieldSpec) -> F32:
    """Numbers [B], nan where missing."""
    values: Array = column.to_numpy(zero_copy_only=False).astype(np.float32)
    if field.transform == "log1p":
        values = (np.sign(values) * np.log1p(np.abs(values))).astype(np.float32)
    elif field.transform == "standard":
        values = ((values - np.float32(field.mean)) / np.float32(field.std or 1.0)).astype(np.float32)
    return values


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of one row group of one part."""

    part: str
    group: int
    start: int
    stop: int


class Stream:
    """A split's batches, as tables of the columns asked for.

    Args:
        dataset: reference of the data manifest.
        split: train, valid or test.
        columns: columns to read.
        seed: seed of the shuffle, or None for the stored order.
        threads: that read and decode in advance; what comes out is the same for any number.
    """

    def __init__(
        self, dataset: Reference, split: str, columns: Sequence[str], seed: int | None = None, threads: int = 1
    ) -> None:
        self._manifest = Dataset.load(dataset)
        self._folder = dataset.uri.rpartition("/")[0]
        self._columns = list(dict.fromkeys(columns))
        self._seed = seed
        self._threads = threads
        self._parts: dict[tuple[int, str], RowGroups] = {}
        self.samples = self._manifest.rows(split)
        self._blocks = [
            Block(segment.part, group, max(segment.start - group * ROW_GROUP, 0), stop)
            for segment in self._manifest.splits[split]
            for group in range(segment.start // ROW_GROUP, -(-segment.stop // ROW_GROUP))
            if (stop := min(segment.stop - group * ROW_GROUP, ROW_GROUP)) > 0
        ]

    def batches(self, batch: int, epoch: int = 0, cursor: int = 0) -> Iterator[pa.Table]:
        """Tables of ``batch`` rows (the last may be shorter), from sample ``cursor`` of the epoch on."""
        rest: pa.Table | None = None
        for window in self._windows(epoch, cursor):
            rest = window if rest is None else pa.concat_tables([rest, window])
            while rest.num_rows >= batch:
                yield rest.slice(0, batch)
                rest = rest.slice(batch)
        if rest is not None and rest.num_rows:
            yield rest

    def _windows(self, epoch: int, cursor: int) -> Iterator[pa.Table]:
        """The epoch's rows in order, a window at a time, without the first ``cursor``."""
        blocks = self._blocks
        if self._seed is not None:
            blocks = [blocks[i] for i in _permutation(self._seed, epoch, 0, len(blocks))]
        size = WINDOW if self._seed is not None else 1
        windows = []
        for number, first in enumerate(range(0, len(blocks), size)):
            window = blocks[first : first + size]
            rows = sum(block.stop - block.start for block in window)
            if cursor < rows:
                windows.append((window, epoch, number, cursor))
            cursor = max(cursor - rows, 0)
        yield from in_order(self._window, windows, self._threads)

    def _window(self, asked: tuple[list[Block], int, int, int]) -> pa.Table:
        """The rows of a window in their order, without the first ones."""
        window, epoch, number, without = asked
        table = pa.concat_tables([self._read(block) for block in window])
        if self._seed is not None:
            table = table.take(pa.array(_permutation(self._seed, epoch, number + 1, table.num_rows)))
        return table.slice(without).combine_chunks()

    def _read(self, block: Block) -> pa.Table:
        part = self._manifest.parts[block.part]
        # A file's reader is one thread's; several of them decode a column each by themselves.
        key = (threading.get_ident() if self._threads > 1 else 0, block.part)
        if key not in self._parts:
            self._parts[key] = RowGroups(self._folder, part, self._columns or [LABEL])
        table = self._parts[key].read(block.group, threads=self._threads == 1)
        table = table.slice(block.start, block.stop - block.start)
        first_file = part.first_file
        if first_file and FILE in table.column_names:
            files = pc.add(table.column(FILE), pa.scalar(first_file, pa.int32()))
            table = table.set_column(table.column_names.index(FILE), FILE, files)
        return table


def _permutation(seed: int, epoch: int, window: int, size: int) -> I64:
    """A permutation of ``size``, by sorting a counter hash."""
    hashes = _draws(np.uint64(seed), np.uint64(epoch), np.uint64(window), size)
    order: I64 = np.argsort(hashes, kind="stable")
    return order


@njit(nogil=True, cache=True)
def _draws(seed: Any, epoch: Any, window: Any, size: int) -> Array:
    base = splitmix64(splitmix64(splitmix64(seed) ^ epoch) ^ window)
    out = np.empty(size, np.uint64)
    for i in range(size):
        out[i] = splitmix64(base ^ uint64(i))
    return out
