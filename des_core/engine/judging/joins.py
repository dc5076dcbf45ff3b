"""Values that other rows of other workers have, by key: how scores of logs that were ingested twice meet.

    theirs: (id, value) -> the worker of the id's range <- id: ours;  there: found by halving -> value, back to ours

Dims: B rows here, C rows there (of this worker's).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from des_core.contracts import FILE, ROW, Dataset, Reference
from des_core.data.feed.batches import ids_of
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging.homes import columns
from des_core.engine.judging.swap import bits, floats, rounds, swap

Array = np.ndarray[Any, np.dtype[Any]]

FILE_BITS = 22
"""Files are counted in so many bits, rows of one in the rest."""


def sample_keys(peers: Collectives, dataset: Reference, split: str, files: Sequence[str]) -> Array:
    """Ids [B] of this worker's samples, -1 of those whose raw file is not among the digests ``files``."""
    numbers = {digest: number for number, digest in reversed(list(enumerate(files)))}
    known = np.array([numbers.get(digest, -1) for digest in Dataset.load(dataset).files], np.int64)
    found = [np.zeros(0, np.int64)]
    for table in columns(peers, dataset, split, [FILE, ROW]):
        file = known[table.column(FILE).to_numpy()]
        ids = ids_of((file << (63 - FILE_BITS)) | table.column(ROW).to_numpy().astype(np.int64), ROW)
        found.append(np.where(file < 0, np.int64(-1), ids))
    return np.concatenate(found)


def look_up(peers: Collectives, keys_B: Array, keys_C: Array, values_C: Array) -> tuple[Array, Array]:
    """The values [B] of keys among all workers' (keys_C, values_C), and whether there is one."""
    workers = peers.workers
    ranges = workers * max(rounds(peers, len(keys_B)), rounds(peers, len(keys_C)))
    bounds = np.array([number * 2**64 // ranges - 2**63 for number in range(1, ranges)], np.int64)
    values_B, found_B = np.zeros(len(keys_B)), np.zeros(len(keys_B), np.bool_)
    (order_B, cuts_B), (order_C, cuts_C) = (_cut(keys, bounds) for keys in (keys_B, keys_C))
    for first in range(0, ranges, workers):
        ours, theirs = (cuts[first : first + workers + 1] for cuts in (cuts_B, cuts_C))
        at_B, at_C = order_B[ours[0] : ours[-1]], order_C[theirs[0] : theirs[-1]]
        known, _ = swap(peers, np.stack([keys_C[at_C], bits(values_C[at_C])], 1), np.diff(theirs))
        asked, came = swap(peers, keys_B[at_B, None], np.diff(ours))
        answered, _ = swap(peers, _answers(known, asked[:, 0]), came, np.diff(ours))
        values_B[at_B], found_B[at_B] = floats(answered[:, 0]), answered[:, 1] > 0
    return values_B, found_B


def _cut(keys: Array, bounds: Array) -> tuple[Array, Array]:
    """Rows by key, without those of key -1, and where ranges of keys begin among them."""
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] != -1]
    return order, np.concatenate([[0], np.searchsorted(keys[order], bounds), [len(order)]]).astype(np.int64)


def _answers(known: Array, asked: Array) -> Array:
    """For each key asked for, the bits of its value, and 1 where there is one."""
    answers = np.zeros((len(asked), 2), np.int64)
    if len(known):
        known = known[np.argsort(known[:, 0], kind="stable")]
        place = np.minimum(np.searchsorted(known[:, 0], asked), len(known) - 1)
        here = known[place, 0] == asked
        answers[here] = np.stack([known[place[here], 1], np.ones(int(here.sum()), np.int64)], 1)
    return answers
