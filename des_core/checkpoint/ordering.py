"""The order of rows in a checkpoint: by table, then by id as an unsigned number.

A cell is one bucket of one table. Rows are laid into cells by counting, and only a cell at a time is sorted.

Dims: S ids, M of them wanted, T tables, H buckets of a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit, uint64

from des_core.checkpoint.blocks import prefixes
from des_core.data.feed.batches import BUCKET_BITS, BUCKETS

Array = np.ndarray[Any, np.dtype[Any]]


def sorted_blocks(ids: Array, tables: Array, most: int) -> Iterator[tuple[int, Array]]:
    """Blocks of ids that are all in memory: a table's number, and the places of at most about ``most`` ids."""
    order, starts = by_cell(ids, tables, np.ones(len(ids), np.uint32), np.uint32(0), int(tables.max(initial=0)) + 1)
    for first, stop in grouped(starts, most):
        places = order[first:stop][np.argsort(ids[order[first:stop]].view(np.uint64))]
        table = table_at(starts, first)
        for piece in cut(ids[places], most):
            yield table, places[piece]


def table_at(starts: Array, place: int) -> int:
    """The table whose cells hold a place in their order."""
    return int(np.searchsorted(starts, place, side="right") - 1) // BUCKETS


def grouped(starts: Array, most: int) -> Iterator[tuple[int, int]]:
    """Neighbouring cells of one table together, as long as they hold at most ``most``; a larger one alone."""
    edges = starts.tolist()
    for table in range(0, len(edges) - 1, BUCKETS):
        begin = edges[table]
        for cell in range(table, min(table + BUCKETS, len(edges) - 1)):
            if edges[cell + 1] - begin > most and edges[cell] > begin:
                yield begin, edges[cell]
                begin = edges[cell]
        stop = edges[min(table + BUCKETS, len(edges) - 1)]
        if stop > begin:
            yield begin, stop


def cut(ids: Array, most: int) -> Iterator[slice]:
    """Ascending ids in pieces of about ``most``, no prefix in two of them."""
    start = 0
    while start < len(ids):
        stop = min(start + most, len(ids))
        if stop < len(ids):
            prefix = prefixes(ids)
            # To the end of the prefix that the piece would cut.
            stop = int(np.searchsorted(prefix, prefix[stop - 1], side="right"))
        yield slice(start, stop)
        start = stop


@njit(nogil=True, cache=True)
def by_cell(ids: Array, tables: Array, last: Array, since: Any, many: int) -> Any:
    """Slots whose last step is after ``since``, by table and bucket, uint32 [M]; where each cell begins [T H + 1]."""
    shift = uint64(64 - BUCKET_BITS)
    starts = np.zeros(many * BUCKETS + 1, np.int64)
    for slot in range(len(tables)):
        if last[slot] > since or since == 0:
            starts[np.int64(tables[slot]) * BUCKETS + np.int64(uint64(ids[slot]) >> shift) + 1] += 1
    starts = np.cumsum(starts)
    order = np.empty(starts[-1], np.uint32)
    at = starts[:-1].copy()
    for slot in range(len(tables)):
        if last[slot] > since or since == 0:
            cell = np.int64(tables[slot]) * BUCKETS + np.int64(uint64(ids[slot]) >> shift)
            order[at[cell]] = slot
            at[cell] += 1
    return order, starts
