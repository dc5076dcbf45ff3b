"""Which rows a budget over all workers lets go: radix select of a threshold, one sum of 256 counts a byte.

Rows are ordered by (score, id), the id as an unsigned number, and exactly the ``keep`` largest stay. Each
worker counts its rows by the highest byte of the score, the counts are summed, and the byte in which
the ``keep``-th row lies is known to all; so on through the 4 bytes of the score and the 8 of the id. Scores are
integers and ids are unique, so the same rows stay for any number of workers.

Traffic: 13 sums, 24.6 kB per worker and eviction, whatever the rows.
Dims: S slots in use here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, uint64

Array = np.ndarray[Any, np.dtype[Any]]
Total = Callable[[Array], Array]
"""Sums an int64 array over the workers, all of which call it."""


def beyond_budget(scores_S: Array, ids_S: Array, staying_S: Array, keep: int, total: Total) -> Array:
    """Which of the ``staying_S`` rows exceed a budget of ``keep`` over all workers: bool [S].

    Args:
        scores_S: uint32, higher stays.
        ids_S: int64; breaks ties.
    """
    if total(np.array([np.count_nonzero(staying_S)]))[0] <= keep:
        return np.zeros(len(ids_S), np.bool_)
    ids_S = ids_S.view(np.uint64)
    score, keep = _threshold(scores_S, staying_S, keep, total)
    tied_S = staying_S & (scores_S == score)
    least, _ = _threshold(ids_S, tied_S, keep, total)
    beyond_S: Array = staying_S & (scores_S < score) | tied_S & (ids_S < least)
    return beyond_S


def _threshold(words_S: Array, among_S: Array, keep: int, total: Total) -> tuple[np.uint64, int]:
    """The ``keep``-th largest word over the workers, and how many of those equal to it are within ``keep``."""
    word = 0
    for shift in range(words_S.itemsize * 8 - 8, -1, -8):
        counts = total(_histogram(words_S, among_S, np.uint64(word), np.uint64(shift)))
        # above[b] rows have a byte of b or more.
        above = np.append(counts[::-1].cumsum()[::-1], 0)
        byte = int(np.flatnonzero(above >= keep)[-1])
        keep -= int(above[byte + 1])
        word = word << 8 | byte
    return np.uint64(word), keep


@njit(nogil=True, cache=True)
def _histogram(words_S: Array, among_S: Array, prefix: Any, shift: Any) -> Array:
    """Rows by the byte at ``shift``, int64 [256], of those whose higher bytes are ``prefix``."""
    counts = np.zeros(256, np.int64)
    for slot in range(len(words_S)):
        rest = uint64(words_S[slot]) >> shift
        if among_S[slot] and rest >> uint64(8) == prefix:
            counts[rest & uint64(255)] += 1
    return counts
