"""Squares of what rows add to a number's error, summed within their groups first.

    home: rows by group -> one sum of each group here -> the worker of the group's range
    there: sums of a group added -> squared, summed

A group's id is a hash, so equal ranges of ids hold about equally many groups. Rows of nobody are each a group.

Dims: B rows here, K numbers, E groups sent in a round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from des_core.contracts import GROUP
from des_core.data.feed.batches import ids_of
from des_core.data.read.hashing import MISSING
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging.swap import bits, floats, pieces, rounds, swap, total

Array = np.ndarray[Any, np.dtype[Any]]

Pulls = Callable[[Any], Array]
"""What the rows at given places [b] add to the error of each number [K, b]."""


def group_ids(keys_B: Array) -> Array:
    """Ids of groups, evenly spread over all integers, from their keys."""
    ids: Array = ids_of(np.ascontiguousarray(keys_B, np.int64), GROUP)
    return ids


NOBODY = int(group_ids(np.array([MISSING]))[0])
"""Id of the rows whose group is missing."""


def squares(peers: Collectives, groups_B: Array, pulls: Pulls, numbers: int) -> tuple[int, Array]:
    """How many groups there are over all workers, and the sum of their squared sums [K]."""
    mine_K, groups = np.zeros(numbers), 0
    alone = np.flatnonzero(groups_B == NOBODY)
    for piece in pieces(len(alone)):
        mine_K += (pulls(alone[piece]) ** 2).sum(axis=1)
    groups += len(alone)
    order = np.argsort(groups_B, kind="stable")
    order = order[groups_B[order] != NOBODY] if len(alone) else order
    for sent, sizes in _sums(peers, groups_B, order, pulls, numbers):
        received, _ = swap(peers, sent, sizes)
        by_group = np.argsort(received[:, 0], kind="stable")
        starts = _starts(received[by_group, 0])
        groups += len(starts)
        if len(starts):
            sums = np.add.reduceat(floats(received[by_group, 1:]), starts, axis=0)
            mine_K += (sums**2).sum(axis=0)
    return int(total(peers, [groups])[0]), total(peers, mine_K)


def _sums(peers: Collectives, groups_B: Array, order: Array, pulls: Pulls, numbers: int) -> Any:
    """Round by round, each group's sums here [E, 1 + K], and how many are for each worker."""
    workers = peers.workers
    ranges = workers * rounds(peers, len(order))
    bounds = np.array([number * 2**64 // ranges - 2**63 for number in range(1, ranges)], np.int64)
    cuts = np.concatenate([[0], np.searchsorted(groups_B[order], bounds), [len(order)]])
    for first in range(0, ranges, workers):
        edges = cuts[first : first + workers + 1]
        at = order[edges[0] : edges[-1]]
        starts = _starts(groups_B[at])
        sums = np.add.reduceat(pulls(at), starts, axis=1) if len(starts) else np.zeros((numbers, 0))
        sent = np.column_stack([groups_B[at][starts], *map(bits, sums)])
        yield sent, np.diff(np.searchsorted(starts, edges - edges[0]))


def _starts(groups: Array) -> Array:
    return np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]][: len(groups)])
