"""What judging sends between workers: sums known to all, and rows to the worker that their order gives them to.

Rows travel in rounds, each of about ROUND on a worker, so that beside its own columns a worker holds a fixed buffer
whatever the number of rows. Nothing of it is in the ledger of training.

Dims: N workers, E rows sent, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from des_core.engine.exchange.collectives import Collectives

Array = np.ndarray[Any, np.dtype[Any]]

LINE = "judging"
ROUND = 1 << 19
"""Rows that a worker receives in a round, on average."""
PIECE = 1 << 19
"""Rows whose terms are computed at once."""


def total(peers: Collectives, mine: Any) -> Array:
    """The sum over workers of an array of int64 or float64, the same bits everywhere."""
    sent = torch.from_numpy(np.array(mine)).to(peers.device)
    with peers.uncounted():
        summed: Array = peers.all_reduce({LINE: sent})[LINE].cpu().numpy()
    return summed


def told(peers: Collectives, mine: Array) -> Array:
    """What each worker tells [N, ...], an array of one form, known to all."""
    bits = np.zeros((peers.workers, *mine.shape), np.int64)
    # As bits, so that adding the others' zeros changes nothing.
    bits[peers.rank] = np.ascontiguousarray(mine).view(np.int64)
    return total(peers, bits).view(mine.dtype)


def swap(peers: Collectives, rows_EC: Array, sizes_N: Array, come_N: Array | None = None) -> tuple[Array, Array]:
    """The rows sent here, in rank order, and how many each worker sent.

    Args:
        rows_EC: int64, those for worker 0 first.
        sizes_N: how many are for each.
        come_N: how many each worker sends here; None: it tells.
    """
    each, one = rows_EC.shape[1], [{LINE: 1}] * peers.workers
    with peers.uncounted():
        came_N = come_N
        if came_N is None:
            sizes = torch.from_numpy(np.asarray(sizes_N, np.int64)).to(peers.device)
            came_N = peers.all_to_all(sizes, one, [1] * peers.workers).cpu().numpy()
        sent = torch.from_numpy(np.ascontiguousarray(rows_EC).reshape(-1)).to(peers.device)
        send = [{LINE: int(size) * each} for size in sizes_N]
        flat = peers.all_to_all(sent, send, [int(size) * each for size in came_N])
    return flat.cpu().numpy().reshape(-1, each), came_N


def rounds(peers: Collectives, rows: int) -> int:
    """How many rounds all workers' rows take, at least one."""
    return max(1, -(-int(total(peers, [rows])[0]) // (peers.workers * ROUND)))


def pieces(rows: int) -> Iterator[slice]:
    """Consecutive slices of that many rows."""
    for start in range(0, rows, PIECE):
        yield slice(start, min(start + PIECE, rows))


def floats(bits: Array) -> Array:
    """The float64 numbers of a column of their bits."""
    return np.ascontiguousarray(bits).view(np.float64)


def bits(numbers: Array) -> Array:
    """The other way round."""
    return np.ascontiguousarray(numbers, np.float64).view(np.int64)
