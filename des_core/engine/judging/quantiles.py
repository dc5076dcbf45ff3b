"""Rows at ranks of all workers' scores: by histograms of the scores' bits, eight at a time, with counts on the wire.

    calibration bins: the sorted rows in equal numbers, equal scores in stored order -> sums within this worker's cuts
    score histogram: from 0 to the 0.999 quantile -> counts

Dims: B rows here, K ranks, W ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging.swap import told, total

Array = np.ndarray[Any, np.dtype[Any]]

BINS = 20
"""Of the calibration figure."""
SCORE_BINS = 24
HIGH = 0.999
"""The share of scores that the histogram shows."""

WAYS = 256
"""Into so many parts a range of keys is cut at once."""

_SIGN = np.uint64(1 << 63)


def at_ranks(peers: Collectives, scores_B: Array, order_B: Array, ranks_K: Array) -> Array:
    """The scores [K] of these ranks, from 0, among all workers' rows."""
    ends = told(peers, scores_B[order_B[[0, -1]]] if len(scores_B) else np.array([np.inf, -np.inf]))

    def upto(keys_KW: Array) -> Array:
        return np.searchsorted(scores_B, _numbers(keys_KW), "right", sorter=order_B)

    return _numbers(_least(peers, _keys(ends[:, 0].min()), _keys(ends[:, 1].max()), upto, ranks_K + 1))


def cuts(peers: Collectives, scores_B: Array, order_B: Array, positions_B: Array, ranks_K: Array) -> Array:
    """Where this worker's sorted rows [K] are cut by ranks of all rows; equal scores are in the order of positions.

    Args:
        positions_B: places in the stored order of all rows, ascending.
    """
    values = at_ranks(peers, scores_B, order_B, ranks_K)
    starts, stops = (np.searchsorted(scores_B, values, side, sorter=order_B) for side in ("left", "right"))
    wanted = ranks_K - total(peers, starts)
    ends = told(peers, np.array([positions_B[-1] + 1 if len(positions_B) else 0]))

    def before(places_KW: Array) -> Array:
        """How many rows of each run of equal scores come before places; rows of a run are in stored order."""
        rows_KW = np.searchsorted(positions_B, places_KW.astype(np.int64))
        runs = zip(starts.tolist(), stops.tolist(), rows_KW, strict=True)
        return np.array([np.searchsorted(order_B[start:stop], rows) for start, stop, rows in runs], np.int64)

    last = _least(peers, np.uint64(0), np.uint64(ends.max()), before, wanted)
    return starts + before(last[:, None])[:, 0]


def calibration_bins(
    peers: Collectives, labels_B: Array, scores_B: Array, order_B: Array, positions_B: Array
) -> list[dict[str, float]]:
    """Mean prediction and mean label in bins of equally many samples."""
    samples = int(total(peers, [len(scores_B)])[0])
    bins = min(BINS, samples)
    sizes = samples // bins + (np.arange(bins) < samples % bins)
    inner = cuts(peers, scores_B, order_B, positions_B, np.cumsum(sizes)[:-1])
    sums = [(float(scores_B[at].sum()), float(labels_B[at].sum(dtype=np.float64))) for at in np.split(order_B, inner)]
    return [
        {"predicted": predicted / size, "observed": observed / size, "samples": size}
        for (predicted, observed), size in zip(total(peers, sums).tolist(), sizes.tolist(), strict=True)
    ]


def histogram(peers: Collectives, scores_B: Array, order_B: Array, positive_B: Array) -> dict[str, Any]:
    """Shares of the positive and of the other samples in each bin of the score, and the last bin's end."""
    samples = int(total(peers, [len(scores_B)])[0])
    place = HIGH * (samples - 1)
    low = int(place)
    first, second = at_ranks(peers, scores_B, order_B, np.array([low, min(low + 1, samples - 1)])).tolist()
    share = place - low
    high = first + (second - first) * share if share < 0.5 else second - (second - first) * (1 - share)
    high = high or 1.0
    parts = [scores_B[part] for part in (positive_B, ~positive_B)]
    counts = [np.append(np.histogram(part, SCORE_BINS, (0.0, high))[0], len(part)) for part in parts]
    clicked, others = (each[:-1] / each[-1] for each in total(peers, counts))
    return {"clicked": clicked.tolist(), "others": others.tolist(), "high": high}


def _least(
    peers: Collectives, low: np.uint64, high: np.uint64, count: Callable[[Array], Array], wanted_K: Array
) -> Array:
    """The least keys [K] from low to high at which a count over all workers, which grows with the key, is as wanted.

    Args:
        count: of this worker's rows, at keys [K, W].
    """
    low_K, high_K = np.full(len(wanted_K), low), np.full(len(wanted_K), high)
    while (low_K < high_K).any():
        span_K1 = (high_K - low_K)[:, None]
        step_K1 = span_K1 // np.uint64(WAYS) + np.uint64(1)
        ends_KW = np.minimum(np.arange(1, WAYS + 1, dtype=np.uint64) * step_K1 - np.uint64(1), span_K1)
        reached_KW = total(peers, count(low_K[:, None] + ends_KW)) >= wanted_K[:, None]
        way_K = reached_KW.argmax(axis=1)
        high_K = low_K + np.take_along_axis(ends_KW, way_K[:, None], 1)[:, 0]
        low_K = low_K + way_K.astype(np.uint64) * step_K1[:, 0]
    return low_K


def _keys(numbers: Any) -> np.uint64:
    """An unsigned integer in the order of the numbers."""
    bits = np.float64(numbers).view(np.uint64)
    return np.uint64(~bits if bits & _SIGN else bits | _SIGN)


def _numbers(keys: Array) -> Array:
    """The other way round."""
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float64)
