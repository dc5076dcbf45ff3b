"""Candidate against champion among the test rows of single values of a field.

The values of a field are its 20 most frequent ones among the rows that both scored; a row of a multi field belongs to
every value it lists. Values are counted on the worker of their id's range; each value is then compared by itself.

Dims: B rows here that are compared, V values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from des_core.contracts import Dataset, Reference
from des_core.data.feed.batches import ids_of
from des_core.data.read.hashing import MISSING
from des_core.data.read.parsing import one_chunk
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging.homes import columns
from des_core.engine.judging.measure import Judge, Rows
from des_core.engine.judging.swap import PIECE, swap, told, total
from des_core.verdict import SliceDifference

Array = np.ndarray[Any, np.dtype[Any]]

MOST_VALUES = 20


def compare(
    judge: Judge, dataset: Reference, field: str, compared: Array, rows: Rows, ours_B: Array, theirs_B: Array
) -> tuple[SliceDifference, ...]:
    """The slices of one field of the test rows, the most frequent value first.

    Args:
        compared: which of this worker's test rows the others are.
    """
    peers = judge.peers
    keys_V = frequent(peers, _counts(_values(peers, dataset, field, compared)))
    # One bit for each value.
    listed_B = np.zeros(len(rows.labels), np.uint32)
    for keys, row in _values(peers, dataset, field, compared):
        for number, key in enumerate(keys_V.tolist()):
            here = row[keys == key]
            listed_B[here] |= np.uint32(1 << number)
    texts = {key: text for key, _, text in Dataset.load(dataset).stats[field].top}
    found = []
    for number, key in enumerate(keys_V.tolist()):
        mine = np.flatnonzero(listed_B & np.uint32(1 << number))
        here = rows.where(mine)
        samples, positives = total(peers, [len(mine), int((here.labels > 0.5).sum())]).tolist()
        if not 2 <= positives <= samples - 2:
            continue
        theirs, difference, (low, _) = judge.difference(here, ours_B[mine], theirs_B[mine])
        auc = (theirs.wins.auc or 0.0) if theirs.wins else 0.0
        found.append(
            SliceDifference(
                field=field,
                value="(missing)" if key == MISSING else texts.get(key) or f"key {key & (1 << 64) - 1:016x}",
                samples=samples,
                auc=auc + difference,
                champion_auc=auc,
                difference=difference,
                low=low,
            )
        )
    return tuple(found)


def frequent(peers: Collectives, counts: tuple[Array, Array]) -> Array:
    """The keys [V] most frequent over all workers; of equally many the smaller one first."""
    keys, many = counts
    ids = ids_of(keys, "slice")
    bounds = [number * 2**64 // peers.workers - 2**63 for number in range(1, peers.workers)]
    owner = np.searchsorted(np.array(bounds, np.int64), ids, "right")
    order = np.argsort(owner, kind="stable")
    sizes = np.bincount(owner, minlength=peers.workers)
    received, _ = swap(peers, np.stack([keys[order], many[order]], 1), sizes)
    found = np.zeros((MOST_VALUES, 2), np.int64)
    mine = np.stack(_merged(received[:, 0], received[:, 1]), 1)
    mine = mine[np.lexsort((mine[:, 0], -mine[:, 1]))][:MOST_VALUES]
    found[: len(mine)] = mine
    known = told(peers, found).reshape(-1, 2)
    known = known[known[:, 1] > 0]
    best: Array = known[np.lexsort((known[:, 0], -known[:, 1]))][:MOST_VALUES, 0]
    return best


def _values(peers: Collectives, dataset: Reference, field: str, compared: Array) -> Iterator[tuple[Array, Array]]:
    """Keys and rows among those compared, each pair once, some rows at a time."""
    place = np.cumsum(compared) - 1
    start = 0
    for table in columns(peers, dataset, "test", [field]):
        keys = one_chunk(table.column(field))
        row = np.arange(start, start + table.num_rows)
        start += table.num_rows
        if pa.types.is_list(keys.type):
            row, keys = row[pc.list_parent_indices(keys).to_numpy()], keys.flatten()
        here = compared[row]
        # A list may name a value twice.
        pairs = np.unique(np.stack([keys.to_numpy()[here], place[row[here]]]), axis=1)
        yield pairs[0], pairs[1]


def _counts(values: Iterator[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Distinct keys, and in how many rows each is."""
    held, many, waiting = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for keys, _ in values:
        found, counts = np.unique(keys, return_counts=True)
        held.append(found)
        many.append(counts)
        waiting += len(found)
        if waiting > max(PIECE, len(held[0])):
            merged = _merged(np.concatenate(held), np.concatenate(many))
            held, many, waiting = [merged[0]], [merged[1]], 0
    return _merged(np.concatenate(held), np.concatenate(many))


def _merged(keys: Array, counts: Array) -> tuple[Array, Array]:
    found, place = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(found), np.int64)
    np.add.at(sums, place, counts)
    return found, sums
