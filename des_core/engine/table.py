"""The rows one worker owns: an index on the CPU, weights and optimizer state on the training device.

One index and one store serve all fields and all operators: a row is [w | v_1 .. v_k], its optimizer
state lies beside it in a second array. A row is born when training first meets its id: w = 0 and v from
a counter draw keyed by (seed, id), so its first value is the same on any worker, in any order.
Evaluation never inserts.

Dims: U unique ids of a batch, K numbers per row, Z numbers of optimizer state, S slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, uint64
from torch import Tensor

from des_core.data.hashing import splitmix64
from des_core.engine import index

Array = np.ndarray[Any, np.dtype[Any]]


class Table:
    """Rows by id, grown as ids appear.

    Args:
        width: numbers per row, K: the linear weight, then the factors.
        state_width: numbers of optimizer state per row, Z.
        seed: seed of first values.
        init: standard deviation of the factors' first values (they are uniform).
        device, dtype: of rows and state.
    """

    def __init__(
        self, width: int, state_width: int, seed: int, init: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._seed = seed
        self._init = init
        self.used = 0
        self._entries = np.zeros(index.capacity_for(0), np.uint64)
        self._ids = np.empty(1024, np.int64)
        self._tables = np.empty(1024, np.uint16)
        self.rows_SK = torch.zeros(1024, width, device=device, dtype=dtype)
        self.state_SZ = torch.zeros(1024, state_width, device=device, dtype=dtype)

    @property
    def ids(self) -> Array:
        """Ids in slot order, int64 [S]."""
        return self._ids[: self.used]

    @property
    def tables(self) -> Array:
        """Numbers of the tables that the slots belong to, uint16 [S]."""
        return self._tables[: self.used]

    @property
    def load(self) -> float:
        """Share of the index in use."""
        return self.used / len(self._entries)

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows, state, ids and index now held."""
        tensors = sum(t.numel() * t.element_size() for t in (self.rows_SK, self.state_SZ))
        return tensors + self._ids.nbytes + self._tables.nbytes + self._entries.nbytes

    def find(self, ids_U: Array) -> Array:
        """Slots [U], -1 where unseen."""
        found: Array = index.find(self._entries, self._ids, ids_U)
        return found

    def find_or_insert(self, ids_U: Array, tables_U: Array) -> Array:
        """Slots [U] of unique ids; unseen ones get a new row."""
        slots_U = self.find(ids_U)
        fresh = slots_U < 0
        if fresh.any():
            slots_U[fresh] = np.arange(self.used, self.used + int(fresh.sum()))
            self._append(ids_U[fresh], tables_U[fresh])
        return slots_U

    def restore(self, ids: Array, tables: Array, rows: Array, state: Array) -> None:
        """Append rows of a checkpoint, none of which is here yet."""
        start = self.used
        self._append(ids, tables)
        self.rows_SK[start : self.used] = torch.from_numpy(rows).to(self.rows_SK)
        self.state_SZ[start : self.used] = torch.from_numpy(state).to(self.state_SZ)

    def _append(self, ids: Array, tables: Array) -> None:
        start, stop = self.used, self.used + len(ids)
        self._grow(stop)
        self._ids[start:stop] = ids
        self._tables[start:stop] = tables
        index.place(self._entries, self._ids, start, stop)
        factors = first_values(ids, self.rows_SK.shape[1] - 1, self._seed, self._init)
        self.rows_SK[start:stop, 1:] = torch.from_numpy(factors).to(self.rows_SK)
        self.used = stop

    def _grow(self, slots: int) -> None:
        """Make room for ``slots``: arrays by half again, the index by doubling."""
        if slots > len(self._ids):
            size = max(slots, len(self._ids) * 3 // 2)
            self._ids = np.concatenate([self.ids, np.empty(size - self.used, np.int64)])
            self._tables = np.concatenate([self.tables, np.empty(size - self.used, np.uint16)])
            self.rows_SK = _extended(self.rows_SK, self.used, size)
            self.state_SZ = _extended(self.state_SZ, self.used, size)
        if slots > index.MAX_LOAD * len(self._entries):
            self._entries = np.zeros(index.capacity_for(slots), np.uint64)
            index.place(self._entries, self._ids, 0, self.used)


def _extended(old: Tensor, used: int, size: int) -> Tensor:
    new = torch.zeros(size, old.shape[1], device=old.device, dtype=old.dtype)
    new[:used] = old[:used]
    return new


def first_values(ids: Array, factors: int, seed: int, init: float) -> Array:
    """Uniform factors [len(ids), factors] of standard deviation ``init``, drawn by counter from (seed, id)."""
    values: Array = _draw(ids, factors, np.uint64(seed)) * (init * 3.0**0.5)
    return values


@njit(nogil=True, cache=True)
def _draw(ids: Array, factors: int, seed: Any) -> Array:
    """Numbers in [-1, 1): 53 bits of one hash each."""
    key = splitmix64(seed ^ uint64(0x6669727374))
    out = np.empty((len(ids), factors), np.float64)
    for i in range(len(ids)):
        base = splitmix64(uint64(ids[i]) ^ key)
        for j in range(factors):
            out[i, j] = np.float64(splitmix64(base + uint64(j)) >> uint64(11)) * 2.0**-52 - 1.0
    return out
