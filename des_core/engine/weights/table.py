"""The rows one worker owns: an index on the CPU, weights and optimizer state on the training device.

One index and one store serve all fields and all operators: a row is [w | v_1 .. v_k], its optimizer
state lies beside it in a second array. A row is born in the step that admits its id, at its n-th lookup or by
a coin: w = 0 and v from a counter draw keyed by (seed, id), so its first value is the same on any worker,
in any order. Steps are the only clock, so the same ids own rows for any number of workers.

Two sides, two threads. ``stage`` looks up the ids of a coming batch, in step order, and changes no row;
``commit`` makes its new rows, in the same order, before the step uses them. All else wants every staged batch
committed.

Dims: U unique ids of a batch, N rows born in it, K numbers per row, Z numbers of optimizer state, S slots.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, uint64
from torch import Tensor

from des_core.config import TableConfig
from des_core.data.read.hashing import splitmix64
from des_core.engine.weights.eviction import Total, beyond_budget
from des_core.engine.weights.index import Keys
from des_core.engine.weights.memory import Rows
from des_core.engine.weights.snapshot import Snapshot

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StagedBatch:
    """The lookups of one step's batch, and the rows that it adds."""

    slots_U: Array
    """int64, -1 for ids that own no row yet."""
    previous_U: Array
    """uint32: the step that met each row last before this one; this one for new rows and slot -1."""
    first_slot: int
    new_rows_NK: Array
    """First values of slots ``first_slot`` and on."""


class Table:
    """The rows of one worker by id, with admission and eviction.

    Args:
        width: numbers per row, K: the linear weight, then the factors.
        state_width: numbers of optimizer state per row, Z.
        seed: seed of first values and of coins.
        init: standard deviation of the factors' first values (they are uniform).
        settings: which ids own rows.
        device, dtype: of rows and state.
        bare: numbers of tables whose rows are born with factors of zero.
    """

    def __init__(
        self,
        width: int,
        state_width: int,
        seed: int,
        init: float,
        settings: TableConfig,
        device: torch.device,
        dtype: torch.dtype,
        bare: Array | None = None,
    ) -> None:
        self._bare = bare
        self._width, self._seed, self._init, self._settings = width, seed, init, settings
        self._keys, self._committed = Keys(), 0
        self._rows, self._state = Rows(width, device, dtype), Rows(state_width, device, dtype)
        self._number = torch.empty(0, dtype=dtype).numpy().dtype
        self.candidates = Keys()
        """Ids that were met but own no row yet."""
        self.admitted = self.evicted = 0
        self.lock = threading.Lock()
        """Held while rows or ids may move, and by a snapshot's thread while it reads them."""
        self._snapshot: Snapshot | None = None
        self._gone: list[tuple[Array, Array]] = []

    @property
    def used(self) -> int:
        """Ids that own a row, also one not committed yet."""
        return self._keys.used

    @property
    def ids(self) -> Array:
        """Ids in slot order, int64 [S]."""
        return self._keys.ids

    @property
    def tables(self) -> Array:
        """Numbers of the tables that the slots belong to, uint16 [S]."""
        return self._keys.tables

    @property
    def counts(self) -> Array:
        """Lookups of each slot's id so far, uint32 [S]."""
        return self._keys.counts

    @property
    def last(self) -> Array:
        """The last step that looked up each slot's id, uint32 [S]."""
        return self._keys.last

    @property
    def rows_SK(self) -> Tensor:
        """The committed rows; a view that is invalid after the next commit, which may move them."""
        return self._rows.tensor_SW[: self._committed]

    @property
    def state_SZ(self) -> Tensor:
        """Their optimizer state; a view like ``rows_SK``."""
        return self._state.tensor_SW[: self._committed]

    @property
    def load(self) -> float:
        """Share of the index in use."""
        return self._keys.load

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows, state, index, ids and candidates now held."""
        return self._row_bytes + self.candidates.memory_bytes

    @property
    def bytes_per_row(self) -> float:
        """Bytes held for each row, candidates apart."""
        return self._row_bytes / max(self.used, 1)

    @property
    def _row_bytes(self) -> int:
        return self._keys.memory_bytes + sum(store.held_bytes(self._committed) for store in (self._rows, self._state))

    def statistics(self) -> dict[str, float]:
        """Statistics of the table for log lines and reports."""
        return {
            "rows": self.used,
            "candidates": self.candidates.used,
            "admitted": self.admitted,
            "evicted": self.evicted,
            "bytes": self.memory_bytes,
            "bytes_per_row": self.bytes_per_row,
            "load": self.load,
        }

    def find(self, ids_U: Array) -> Array:
        """Slots [U], -1 where unseen."""
        return self._keys.find(ids_U)

    def stage(self, ids_U: Array, tables_U: Array, counts_U: Array, step: int) -> StagedBatch:
        """Look up the unique ids of a step's batch, each ``counts_U`` times, and admit new ones."""
        slots_U = self._keys.find(ids_U)
        unseen = np.flatnonzero(slots_U < 0)
        admitted, before = self._admit(ids_U[unseen], tables_U[unseen], counts_U[unseen], step)
        born = unseen[admitted]
        first_slot = self.used
        with self.lock:
            slots_U[born] = self._keys.insert(ids_U[born], tables_U[born], before[admitted], step)
        new_rows_NK = np.zeros((len(born), self._width), self._number)
        new_rows_NK[:, 1:] = first_values(ids_U[born], self._width - 1, self._seed, self._init)
        if self._bare is not None:
            new_rows_NK[np.isin(tables_U[born], self._bare), 1:] = 0
        self.admitted += len(born)
        return StagedBatch(slots_U, self._keys.record_lookups(slots_U, counts_U, step), first_slot, new_rows_NK)

    def commit(self, staged: StagedBatch) -> None:
        """Write the first values and zero state of a staged batch's new rows."""
        if len(staged.new_rows_NK):
            self._write(torch.from_numpy(staged.new_rows_NK), None)

    def evict(self, step: int, total: Total, idle_before: int = 0) -> int:
        """Free the rows that the settings do not let stay, and return how many; all workers call it.

        Args:
            step: the last step trained.
            total: sums an int64 array over the workers.
            idle_before: ids met last before this step have been idle for too many days; 0: no day has ended.
        """
        settings, keys = self._settings, self._keys
        if self._committed != self.used:
            raise RuntimeError(f"{self.used - self._committed} rows are not committed; evict after their commit")
        if self._snapshot is not None:
            self._snapshot.done.wait()
        oldest = max(step - settings.idle_steps if settings.idle_steps else 0, idle_before)
        idle = np.flatnonzero(self.candidates.last < oldest)
        self._note_gone(self.candidates, idle)
        self.candidates.remove(idle)
        gone_S = keys.last < oldest
        if settings.evict_zero:
            gone_S |= ~self.rows_SK.any(1).cpu().numpy()
        if settings.max_rows:
            scores_S = keys.counts if settings.budget_keeps == "frequent" else keys.last
            gone_S |= beyond_budget(scores_S, keys.ids, ~gone_S, settings.max_rows, total)
        slots = np.flatnonzero(gone_S)
        self._note_gone(keys, slots)
        source, target = keys.remove(slots)
        for store in (self._rows, self._state):
            store.move(source, target)
            store.release(self.used)
        keys.release()
        self.candidates.release()
        self._committed = self.used
        self.evicted += len(slots)
        return len(slots)

    def views(self) -> tuple[Array, Array, Array]:
        """Ids [S], rows [S, K] and state [S, Z] as they lie in memory; valid while ``lock`` is held."""
        return self.ids, self.rows_SK.numpy(), self.state_SZ.numpy()

    def snapshot(self, since: int) -> Snapshot:
        """The rows that were looked up after step ``since`` (0: all), for a thread that writes them; at a pause."""
        self._snapshot = Snapshot(self, self.tables, self.counts, self.last, since)
        return self._snapshot

    def keep(self, slots_U: Array) -> None:
        """Copy rows that are about to change, where a snapshot still waits for them."""
        if self._snapshot is not None:
            self._snapshot.keep(slots_U)

    def take_gone(self, before: list[tuple[Array, Array]]) -> list[tuple[Array, Array]] | None:
        """``before``, and the ids and tables that evictions have removed since the last call."""
        gone, self._gone = [*before, *self._gone], []
        return gone

    def _note_gone(self, keys: Keys, slots: Array) -> None:
        if len(slots):
            self._gone.append((keys.ids[slots], keys.tables[slots]))

    def restore(self, ids: Array, tables: Array, counts: Array, last: Array, rows: Array, state: Array) -> None:
        """Append rows of a checkpoint, none of which is here yet."""
        self._keys.insert(ids, tables, counts, last)
        self._write(torch.from_numpy(rows), torch.from_numpy(state))

    def restore_candidates(self, ids: Array, tables: Array, counts: Array, last: Array) -> None:
        """Append candidates of a checkpoint, none of which is here yet."""
        self.candidates.insert(ids, tables, counts, last)

    def _write(self, rows_NK: Tensor, state_NZ: Tensor | None) -> None:
        """Append rows with their state, or with none."""
        start, stop = self._committed, self._committed + len(rows_NK)
        with self.lock:
            self._rows.grow(stop)
            self._state.grow(stop)
        self._rows.tensor_SW[start:stop] = rows_NK
        self._state.tensor_SW[start:stop] = 0 if state_NZ is None else state_NZ
        self._committed = stop

    def _admit(self, ids: Array, tables: Array, counts: Array, step: int) -> tuple[Array, Array]:
        """Which unseen ids get a row now, bool, and the number of earlier lookups of each, uint32."""
        settings, waiting = self._settings, self.candidates
        before = np.zeros(len(ids), np.uint32)
        if settings.admit_count == 1:
            return _heads(ids, np.uint64(self._seed), np.uint64(step), settings.admit_probability), before
        slots = waiting.find(ids)
        known = slots >= 0
        before[known] = waiting.counts[slots[known]]
        admitted = before.astype(np.uint64) + counts >= settings.admit_count
        new = ~known & ~admitted
        slots[new] = waiting.insert(ids[new], tables[new])
        waiting.record_lookups(slots[~admitted], counts[~admitted], step)
        waiting.remove(slots[known & admitted])
        return admitted, before


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


@njit(nogil=True, cache=True)
def _heads(ids: Array, seed: Any, step: Any, probability: float) -> Array:
    """Whether each id's coin of this step falls for it, bool: a counter draw from (seed, id, step)."""
    key = splitmix64(splitmix64(seed ^ uint64(0x636F696E)) ^ step)
    out = np.empty(len(ids), np.bool_)
    for i in range(len(ids)):
        out[i] = np.float64(splitmix64(uint64(ids[i]) ^ key) >> uint64(11)) * 2.0**-53 < probability
    return out
