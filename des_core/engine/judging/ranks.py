"""Which pairs of a positive and a negative a score orders rightly: counts by sample sort, and the AUCs made of them.

    home: rows by score -> entries (score, positives, negatives), equal scores in one -> range of the score's worker
    there: entries by score -> below each: negatives, positives; a tie counts half -> back to the home of the row

    wins = sum over positives of (2 negatives below + negatives equal)       AUC = wins / (2 P N)

Counts are integers, so they are the same for every number of workers. Ranges of scores are cut at regular samples of
each worker's sorted rows: none is much larger than its share whatever the distribution, where the bins of a histogram
of score bits would not part scores that lie close together. A score that many rows share is one entry of each worker.
There are more ranges than workers, and each round takes the next one of each worker: buffers are of fixed size.

Within groups (GAUC) the order is by group, then score; a group may lie across ranges, and counts are carried over.

Sources: Shi and Schaeffer, "Parallel sorting by regular sampling", JPDC 1992; Mann and Whitney, 1947; Zhou et al.,
"Deep interest network for click-through rate prediction", KDD 2018 (GAUC).
Dims: B rows here, N workers, E entries of a round, U distinct entries of a range, S groups of a range, P and N of AUC
positives and negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging.swap import bits, floats, rounds, swap, told, total

Array = np.ndarray[Any, np.dtype[Any]]

SAMPLES = 4
"""Samples of each worker for each range: a range is at most a quarter larger than its share."""


class Wins(NamedTuple):
    """How one score orders all rows."""

    order_B: Array
    """This worker's rows by score, equal ones as they are stored."""
    won_B: Array
    """Twice the pairs that each row wins, a tie counting half: of a positive, the negatives below it; of a negative,
    the positives above it."""
    wins: int
    """Twice the pairs of all rows that are ordered rightly."""
    positives: int
    negatives: int
    roc: list[list[float]]
    """Points of the curve; empty where none were asked for."""

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve, ties counted half; None if one class is absent."""
        pairs = self.positives * self.negatives
        return self.wins / (2 * pairs) if pairs else None


def wins(peers: Collectives, scores_B: Array, positive_B: Array, points: int = 0) -> Wins:
    """Exact counts of the pairs that a score orders rightly, over all workers' rows.

    Args:
        points: of the ROC curve, at most.
    """
    order_B = np.argsort(scores_B, kind="stable")
    won_B = np.zeros(len(scores_B), np.int64)
    open_ = _Open()
    curve: list[tuple[int, Array]] = []
    distinct = 0
    for at, starts, part, sent, came in _sweep(peers, scores_B, positive_B, None, order_B, open_):
        if points:
            curve.append((distinct + part.distinct_before, part.below_U2))
        distinct += part.distinct
        answered_E2, _ = swap(peers, part.answers(), came, sent)
        of_row = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(at))))
        won_B[at] = np.where(positive_B[at], answered_E2[of_row, 0], answered_E2[of_row, 1])
    # A negative was told the positives below it.
    won_B[~positive_B] = 2 * open_.positives - won_B[~positive_B]
    found = Wins(order_B, won_B, open_.wins, open_.positives, open_.negatives, [])
    if not points or found.auc is None:
        return found
    return found._replace(roc=_roc(peers, found, curve, distinct, points))


def gauc(peers: Collectives, scores_B: Array, positive_B: Array, groups_B: Array) -> float | None:
    """Mean of the groups' AUCs weighted by their samples; groups of one class are left out."""
    order_B = np.lexsort((scores_B, groups_B))
    open_ = _Open()
    mine = np.zeros(2)
    for _, _, part, _, _ in _sweep(peers, scores_B, positive_B, groups_B, order_B, open_):
        mine += part.inner_groups()
    open_.close()
    weighted, samples = (total(peers, mine) + np.array([open_.weighted, open_.samples])).tolist()
    return weighted / samples if samples else None


class _Open:
    """The group that the ranges end in so far: it may go on in the next one. The same on all workers."""

    def __init__(self) -> None:
        self.group: int | None = None
        self.positives = self.negatives = self.wins = 0
        self.weighted, self.samples = 0.0, 0

    def add(self, group: int, positives: int, negatives: int, wins: int) -> tuple[int, int]:
        """Take a range's part of a group; the positives and negatives of that group before it."""
        if group != self.group:
            self.close()
            self.group, self.positives, self.negatives, self.wins = group, 0, 0, 0
        before = self.positives, self.negatives
        self.wins += wins + 2 * positives * self.negatives
        self.positives += positives
        self.negatives += negatives
        return before

    def close(self) -> None:
        """The group has ended."""
        pairs = self.positives * self.negatives
        if pairs:
            samples = self.positives + self.negatives
            self.weighted += self.wins / (2 * pairs) * samples
            self.samples += samples


class _Part:
    """One range of the order, whole, on its worker."""

    def __init__(self, received_EC: Array) -> None:
        packed = received_EC[:, -1]
        scores, grouped = floats(received_EC[:, -2]), received_EC.shape[1] == 3
        groups = received_EC[:, 0] if grouped else np.zeros(len(scores), np.int64)
        order = np.lexsort((scores, groups)) if grouped else np.argsort(scores, kind="stable")
        scores, groups, packed = scores[order], groups[order], packed[order]
        new_group = np.r_[True, groups[1:] != groups[:-1]][: len(order)]
        new = new_group | np.r_[True, scores[1:] != scores[:-1]][: len(order)]
        starts, places = np.flatnonzero(new), np.cumsum(new) - 1
        self._place_E = np.empty(len(order), np.int64)
        self._place_E[order] = places
        counts = np.stack([packed >> 32, packed & 0xFFFFFFFF], 1)
        self._counts_U2 = np.add.reduceat(counts, starts) if len(starts) else counts
        self.distinct, self.distinct_before = len(starts), 0
        """Distinct entries here, once settled of all workers' ranges of this round; those of the workers before."""
        self._first_S = np.flatnonzero(new_group[starts])
        self._groups_S = groups[starts][self._first_S]
        below = np.cumsum(self._counts_U2, axis=0) - self._counts_U2
        lengths = np.diff(np.append(self._first_S, self.distinct))
        self.below_U2 = below - np.repeat(below[self._first_S], lengths, axis=0)
        """Positives and negatives below each distinct entry, within its group."""
        self._of_first = int(lengths[0]) if len(lengths) else 0
        won_U = self._counts_U2[:, 0] * (2 * self.below_U2[:, 1] + self._counts_U2[:, 1])
        sums = np.column_stack([self._counts_U2, won_U])
        self._sums_S3 = np.add.reduceat(sums, self._first_S) if len(starts) else sums
        """Positives, negatives and wins of each group, within this range."""

    def settle(self, peers: Collectives, open_: _Open) -> None:
        """Learn what of the first group lies in earlier ranges."""
        ends = np.zeros((2, 4), np.int64)
        if self.distinct:
            for end, place in zip(ends, (0, -1), strict=True):
                end[:] = [self._groups_S[place], *self._sums_S3[place]]
        mine = np.concatenate([[len(self._groups_S), self.distinct], ends.reshape(-1)])
        distinct = 0
        for worker, (groups, many, *parts) in enumerate(told(peers, mine).tolist()):
            if worker == peers.rank:
                self.distinct_before = distinct
            distinct += many
            if groups:
                before = open_.add(*parts[:4])
                if worker == peers.rank:
                    self.below_U2[: self._of_first] += before
            if groups > 1:
                open_.add(*parts[4:])
        self.distinct = distinct

    def answers(self) -> Array:
        """For each entry received, twice the negatives below it and twice the positives, ties counted half."""
        twice_U2 = 2 * self.below_U2 + self._counts_U2
        return np.ascontiguousarray(twice_U2[:, ::-1][self._place_E])

    def inner_groups(self) -> Array:
        """Weighted sum of the AUCs of the groups that neither begin nor end the range, and their samples."""
        positives, negatives, won = self._sums_S3[1:-1].T
        both = (positives > 0) & (negatives > 0)
        samples = (positives + negatives)[both]
        pairs = 2.0 * positives[both] * negatives[both]
        return np.array([float((won[both] / pairs * samples).sum()), float(samples.sum())])


def _sweep(
    peers: Collectives, scores_B: Array, positive_B: Array, groups_B: Array | None, order_B: Array, open_: _Open
) -> Iterator[tuple[Array, Array, _Part, Array, Array]]:
    """Range by range: this worker's rows in it, where entries begin, the range given to it, entries sent and come."""
    workers = peers.workers
    cuts = _cuts(peers, scores_B, groups_B, order_B, workers * rounds(peers, len(scores_B)))
    for first in range(0, len(cuts) - 1, workers):
        edges = cuts[first : first + workers + 1]
        at = order_B[edges[0] : edges[-1]]
        scores, groups = scores_B[at], None if groups_B is None else groups_B[at]
        new = np.r_[True, scores[1:] != scores[:-1]][: len(at)]
        if groups is not None:
            new |= np.r_[True, groups[1:] != groups[:-1]][: len(at)]
        starts = np.flatnonzero(new)
        packed = np.where(positive_B[at], np.int64(1) << 32, np.int64(1))
        packed = np.add.reduceat(packed, starts) if len(starts) else packed
        columns = [bits(scores[starts]), packed]
        entries = np.stack(columns if groups is None else [groups[starts], *columns], 1)
        sizes = np.diff(np.searchsorted(starts, edges - edges[0]))
        received, came = swap(peers, entries, sizes)
        part = _Part(received)
        part.settle(peers, open_)
        yield at, starts, part, sizes, came


def _cuts(peers: Collectives, scores_B: Array, groups_B: Array | None, order_B: Array, ranges: int) -> Array:
    """Where each range begins among this worker's sorted rows, and their end; equal rows are in one range."""
    rows, many = len(order_B), SAMPLES * ranges
    picked = order_B[((np.arange(many) + 0.5) * rows / many).astype(np.int64)] if rows else np.zeros(0, np.int64)
    mine = np.zeros((3, many), np.int64)
    if rows:
        mine[0] = 0 if groups_B is None else groups_B[picked]
        mine[1] = bits(scores_B[picked])
        mine[2] = rows
    samples = told(peers, mine)
    groups, scores, weights = (samples[:, number].reshape(-1) for number in range(3))
    scores = floats(scores)
    order = np.lexsort((scores, groups))
    weight = np.cumsum(weights[order])
    wanted = np.arange(1, ranges) * (weight[-1] / ranges)
    chosen = order[np.minimum(np.searchsorted(weight, wanted), len(order) - 1)]
    if groups_B is None:
        inner = np.searchsorted(scores_B, scores[chosen], sorter=order_B)
    else:
        inner = np.array(
            [_cut(scores_B, groups_B, order_B, *pair) for pair in zip(groups[chosen], scores[chosen], strict=True)],
            np.int64,
        )
    return np.concatenate([[0], inner, [rows]]).astype(np.int64)


def _cut(scores_B: Array, groups_B: Array, order_B: Array, group: int, score: float) -> int:
    """Where a row of that group and score would come among the sorted rows."""
    low, high = (int(np.searchsorted(groups_B, group, side, sorter=order_B)) for side in ("left", "right"))
    return low + int(np.searchsorted(scores_B[order_B[low:high]], score))


def _roc(
    peers: Collectives, found: Wins, curve: list[tuple[int, Array]], distinct: int, points: int
) -> list[list[float]]:
    """The ROC curve as [false positive rate, true positive rate], evenly spread over the distinct scores."""
    keep = np.unique(np.linspace(0, distinct - 1, min(points - 1, distinct)).astype(np.int64))
    # From the highest score down: the k-th distinct one from the top is the last that counts.
    places = distinct - 1 - keep
    below_K2 = np.zeros((len(keep), 2), np.int64)
    for first, below_U2 in curve:
        here = (places >= first) & (places < first + len(below_U2))
        below_K2[here] = below_U2[places[here] - first]
    above_K2 = (found.positives, found.negatives) - total(peers, below_K2)
    rates = above_K2 / (found.positives, found.negatives)
    return [[0.0, 0.0], *rates[:, ::-1].tolist()]
