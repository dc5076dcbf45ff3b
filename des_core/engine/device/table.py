"""The rows one worker owns, with their index, on a device: the same rows as the CPU's table at every step.

Ids, slots, counts and steps are those of weights/table.py, admission and eviction too; ``DeviceTable`` is used where
that is, but that a batch is looked up at the start of its step, for all of a step is on one stream. New ids of a batch
take slots in the order of their first lookups, as on the CPU. All sizes that a batch decides stay on the device: the
host knows a bound on the rows in use, which it renews without waiting, and grows what is short before a step.

An id that waits for admission is a key without a row in a second index. One that is admitted keeps its place
there with a count of zero, which means that it does not wait; evictions clear such places away.

Dims: L lookups, S slots, U unique rows, K numbers per row, Z numbers of state, n rows of a piece.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from des_core.config import TableConfig
from des_core.data.read.hashing import splitmix64
from des_core.engine.device import id_kernels
from des_core.engine.device.rows import CHUNK_BITS, DeviceRows
from des_core.engine.weights.eviction import Total, beyond_budget
from des_core.engine.weights.index import MAX_LOAD, capacity_for
from des_core.engine.weights.snapshot import HostRows, Snapshot

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK = id_kernels.BLOCK
MOST_SLOTS = (1 << 31) - 1
"""Lookups are sorted by slot in 32 bits with a sign, of which the largest number is no row."""
AHEAD = 4
"""Batches of new ids that there is room for after a growth: more than can pass before the host knows how many came."""
_WORD = (1 << 64) - 1


def grid(many: int, block: int = BLOCK) -> tuple[int]:
    """Programs for so many things."""
    return (max(1, -(-many // block)),)


def signed(word: int) -> int:
    """A 64-bit word as torch holds it."""
    return word - (1 << 64) if word >> 63 else word


def seed_key(seed: int, purpose: int) -> int:
    """The key of a kind of counter draw, as ``first_values`` and coins have it on the CPU."""
    return int(splitmix64(np.uint64((seed ^ purpose) & _WORD)))


class DeviceKeys:
    """Ids with slots 0 .. used - 1, and what is known of each, on a device.

    Args:
        device: of all arrays.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.capacity = capacity_for(0)
        self.entries = self._new_entries()
        # Never none, so that slot 0 can be read in place of no slot.
        self.room = 1
        kinds = (torch.int64, torch.int32, torch.int32, torch.int32)
        self.columns = [torch.zeros(1, dtype=kind, device=device) for kind in kinds]
        self.used_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.bound = 0
        """Slots in use are no more than this; known without waiting for the device."""
        on_gpu = device.type == "cuda"
        self._known_1 = torch.zeros(1, dtype=torch.int64, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._asked, self._since = False, 0

    @property
    def ids(self) -> Tensor:
        """Ids in slot order, int64."""
        return self.columns[0]

    @property
    def tables(self) -> Tensor:
        """Numbers of the tables that the ids belong to."""
        return self.columns[1]

    @property
    def counts(self) -> Tensor:
        """Lookups of each id so far, uint32 in the bits of int32."""
        return self.columns[2]

    @property
    def last(self) -> Tensor:
        """The last step that looked up each id, uint32 in the bits of int32."""
        return self.columns[3]

    @property
    def used(self) -> int:
        """Slots in use; waits for the device."""
        self.bound = int(self.used_1)
        return self.bound

    @property
    def memory_bytes(self) -> int:
        """Bytes of the index and of what is known of the ids."""
        return sum(array.numel() * array.element_size() for array in (self.entries, *self.columns))

    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """Ids, tables, counts and last steps in slot order, as the CPU's ``Keys`` holds them."""
        ids, tables, counts, last = (column[: self.used].cpu().numpy() for column in self.columns)
        return ids, tables.astype(np.uint16), counts.view(np.uint32), last.view(np.uint32)

    def ask_used(self) -> None:
        """Start to copy the number of slots in use to the host, where ``make_room`` finds it later."""
        if not self._asked:
            self._known_1.copy_(self.used_1, non_blocking=True)
            if self._copied is not None:
                self._copied.record()
            self._asked, self._since = True, 0

    def make_room(self, more: int) -> None:
        """Room for ``more`` new ids."""
        if self._asked and (self._copied is None or self._copied.query()):
            self.bound = min(self.bound, int(self._known_1) + self._since)
            self._asked = False
        self._since += more
        if self.bound + more > min(self.room, int(MAX_LOAD * self.capacity)):
            # Only now is it worth to wait for the exact number.
            self._grow(self.used, more)
        self.bound += more

    def _grow(self, used: int, more: int) -> None:
        capacity_for(used + more, MOST_SLOTS)
        wanted = min(used + AHEAD * more, MOST_SLOTS)
        if wanted > self.room:
            self.room = max(wanted, min(self.room // 4 * 5, MOST_SLOTS), 1 << 12)
            for number in range(len(self.columns)):
                # One by one, so that no more than one is held twice.
                self.columns[number] = _longer(self.columns[number], self.room)
        if capacity_for(wanted) > self.capacity:
            self.capacity = capacity_for(wanted)
            self.rebuild()

    def rebuild(self) -> None:
        """The index anew from the ids."""
        used = self.used
        self.entries = self._new_entries()
        id_kernels.enter[grid(used)](self.ids, self.entries, 0, used, self.capacity, BLOCK=BLOCK)

    def find(self, ids_L: Tensor, wanted_L: Tensor) -> Tensor:
        """Slots int64 [L], -1 where unseen or not wanted."""
        slots_L = torch.empty_like(ids_L)
        id_kernels.find[grid(len(ids_L))](
            ids_L, wanted_L, self.entries, self.ids, slots_L, len(ids_L), self.capacity, BLOCK=BLOCK
        )
        return slots_L

    def append(self, ids: Array, tables: Array, counts: Array, last: Array) -> None:
        """Ids of a checkpoint, none of which is here yet."""
        start = self.used
        self.make_room(len(ids))
        stop = start + len(ids)
        for column, values in zip(self.columns, (ids, tables, counts.view(np.int32), last.view(np.int32)), strict=True):
            column[start:stop] = torch.from_numpy(np.ascontiguousarray(values)).to(column)
        self.used_1.fill_(stop)
        self.bound = stop
        id_kernels.enter[grid(len(ids))](self.ids, self.entries, start, stop, self.capacity, BLOCK=BLOCK)

    def remove(self, gone_S: Tensor) -> tuple[Tensor, Tensor]:
        """Free slots; (from, to) of the last ones, which moved into the holes as on the CPU."""
        used = self.used
        slots = gone_S.nonzero()[:, 0]
        stay = used - len(slots)
        source = stay + (~gone_S[stay:used]).nonzero()[:, 0]
        target = slots[slots < stay]
        for column in self.columns:
            column[target] = column[source]
        self.used_1.fill_(stay)
        self.bound = stay
        self.rebuild()
        return source, target

    def _new_entries(self) -> Tensor:
        # One more, at which lanes aim that have nothing to do.
        return torch.zeros(self.capacity + 1, dtype=torch.int64, device=self._device)


class Waiting(NamedTuple):
    """Ids that wait for admission, as the CPU's ``Keys`` holds them."""

    ids: Array
    tables: Array
    counts: Array
    last: Array

    @property
    def used(self) -> int:
        """How many they are."""
        return len(self.ids)


class DeviceTable:
    """Rows by id on a device; see weights/table.py for arguments.

    Args:
        chunk_bits: slots of a chunk of rows, as a power of two.
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
        chunk_bits: int = CHUNK_BITS,
    ) -> None:
        self._width, self._state_width, self._seed, self._settings, self._device = (
            width, state_width, seed, settings, device,
        )  # fmt: skip
        self.keys, self.waiting = DeviceKeys(device), DeviceKeys(device)
        self.rows = DeviceRows(width, state_width, device, dtype, chunk_bits, settings.rows == "bf16")
        self.evicted = 0
        self._admitted_before, self._born = 0, torch.zeros(1, dtype=torch.int64, device=device)
        self._scale = torch.tensor([init * 3.0**0.5], dtype=torch.float64, device=device)
        self._first_key = torch.tensor([signed(seed_key(seed, 0x6669727374))], device=device)
        self._probability = torch.tensor([settings.admit_probability], dtype=torch.float64, device=device)

    def look_up(self, ids_L: Tensor, mine_L: Tensor, piece_L: Tensor, table_O: Tensor, step: int) -> Tensor:
        """Slots int64 [L] of a step's lookups, -1 without a row; new ids are admitted, and their rows made.

        Args:
            mine_L: int8, whether this worker owns the lookup.
            piece_L, table_O: place of the lookup's field, and the field's table.
        """
        keys, lookups = self.keys, len(ids_L)
        if not lookups:
            return torch.empty_like(ids_L)
        keys.make_room(lookups)
        self.rows.grow(keys.bound)
        slots_L = keys.find(ids_L, mine_L)
        places = 1 << max(10, (2 * lookups - 1).bit_length())
        seats_T = torch.full((places + 1,), -1, dtype=torch.int32, device=self._device)
        first_T = torch.full((places,), lookups, dtype=torch.int32, device=self._device)
        count_T = torch.zeros(places, dtype=torch.int32, device=self._device)
        slot_T = torch.full((places,), -1, dtype=torch.int64, device=self._device)
        seat_L = torch.empty(lookups, dtype=torch.int32, device=self._device)
        id_kernels.claim_new[grid(lookups)](
            ids_L, mine_L, slots_L, seats_T, seat_L, first_T, count_T, lookups, places, BLOCK=BLOCK
        )
        step_1 = torch.full((1,), step, dtype=torch.int32, device=self._device)
        admitted_L, before_L = self._admit(ids_L, piece_L, table_O, seat_L, first_T, count_T, step, step_1)
        rank_L = admitted_L.cumsum(0)
        self._insert(keys, ids_L, piece_L, table_O, admitted_L, rank_L, before_L, seat_L, slot_T, step_1)
        new_1 = rank_L[-1:]
        self._make_rows(new_1, lookups)
        keys.used_1 += new_1
        keys.ask_used()
        self._born += new_1
        id_kernels.slots_of_new[grid(lookups)](seat_L, slot_T, slots_L, lookups, BLOCK=BLOCK)
        return slots_L

    def _admit(
        self,
        ids_L: Tensor,
        piece_L: Tensor,
        table_O: Tensor,
        seat_L: Tensor,
        first_T: Tensor,
        count_T: Tensor,
        step: int,
        step_1: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Whether each lookup is the first of an id that gets a row now, int32 [L]; and its lookups before."""
        lookups, admitted_L = len(ids_L), torch.empty(len(ids_L), dtype=torch.int32, device=self._device)
        if self._settings.admit_count == 1:
            coin = int(splitmix64(np.uint64(seed_key(self._seed, 0x636F696E) ^ step)))
            key = torch.full((1,), signed(coin), dtype=torch.int64, device=self._device)
            id_kernels.admit_by_coin[grid(lookups)](
                ids_L, seat_L, first_T, admitted_L, lookups, key, self._probability, BLOCK=BLOCK
            )
            return admitted_L, None
        waiting = self.waiting
        waiting.make_room(lookups)
        new_L = (seat_L >= 0).to(torch.int8)
        waiting_L, before_L = waiting.find(ids_L, new_L), torch.empty_like(ids_L)
        least = self._settings.admit_count
        id_kernels.admit_by_count[grid(lookups)](
            seat_L, first_T, count_T, waiting_L, waiting.counts, admitted_L, before_L, lookups, least, BLOCK=BLOCK
        )
        seat = seat_L.clamp(min=0).long()
        first_L = (seat_L >= 0) & (first_T[seat] == torch.arange(lookups, device=self._device))
        enters_L = (first_L & (waiting_L < 0) & (admitted_L == 0)).to(torch.int32)
        rank_L = enters_L.cumsum(0)
        slot_T = torch.full_like(first_T, -1, dtype=torch.int64)
        self._insert(waiting, ids_L, piece_L, table_O, enters_L, rank_L, None, seat_L, slot_T, step_1)
        waiting.used_1 += rank_L[-1:]
        waiting.ask_used()
        waiting_L = torch.where(enters_L != 0, slot_T[seat], waiting_L)
        id_kernels.wait_longer[grid(lookups)](
            first_L.to(torch.int32), admitted_L, waiting_L, seat_L, count_T, before_L, waiting.counts, waiting.last,
            lookups, step_1, BLOCK=BLOCK,
        )  # fmt: skip
        return admitted_L, before_L

    def _insert(
        self, keys: DeviceKeys, ids_L: Tensor, piece_L: Tensor, table_O: Tensor, chosen_L: Tensor, rank_L: Tensor,
        before_L: Tensor | None, seat_L: Tensor, slot_T: Tensor, step_1: Tensor,
    ) -> None:  # fmt: skip
        id_kernels.insert[grid(len(ids_L))](
            ids_L, piece_L, table_O, chosen_L, rank_L, ids_L if before_L is None else before_L, seat_L, keys.used_1,
            keys.entries, keys.ids, keys.tables, keys.counts, keys.last, slot_T, len(ids_L), keys.capacity, step_1,
            HAS_BEFORE=before_L is not None, BLOCK=BLOCK,
        )  # fmt: skip

    def _make_rows(self, new_1: Tensor, most: int) -> None:
        rows = self.rows
        wide = 1 << (max(self._width, self._state_width) - 1).bit_length()
        block = max(1, 2048 // wide)
        id_kernels.first_rows[grid(most, block)](
            self.keys.ids, rows.bases, rows.states, self.keys.used_1, new_1, self._first_key, self._scale,
            K=self._width, Z=self._state_width, STRIDE=rows.stride, STATE_STRIDE=rows.state_stride,
            SHIFT=rows.shift, WIDE=wide, DTYPE=kernel_type(rows.dtype), ROW=kernel_type(rows.row_dtype), BLOCK=block,
        )  # fmt: skip

    # What checkpoints and reports ask for, as the CPU's table has it; all of it waits for the device.

    @property
    def admitted(self) -> int:
        """Ids that were given a row so far."""
        return self._admitted_before + int(self._born)

    @admitted.setter
    def admitted(self, count: int) -> None:
        self._admitted_before = count - int(self._born)

    @property
    def used(self) -> int:
        """Ids that own a row."""
        return self.keys.used

    @property
    def candidates(self) -> Waiting:
        """Ids that wait for admission."""
        ids, tables, counts, last = self.waiting.arrays()
        waits = counts != 0
        return Waiting(ids[waits], tables[waits], counts[waits], last[waits])

    @property
    def ids(self) -> Array:
        """Ids in slot order, int64 [S]."""
        return self.keys.arrays()[0]

    @property
    def tables(self) -> Array:
        """Numbers of the tables that the slots belong to, uint16 [S]."""
        return self.keys.arrays()[1]

    @property
    def counts(self) -> Array:
        """Lookups of each slot's id so far, uint32 [S]."""
        return self.keys.arrays()[2]

    @property
    def last(self) -> Array:
        """The last step that looked up each slot's id, uint32 [S]."""
        return self.keys.arrays()[3]

    @property
    def rows_SK(self) -> Tensor:
        """A copy of all rows."""
        return self.rows.read(0, self.used)[0]

    @property
    def state_SZ(self) -> Tensor:
        """A copy of their optimizer state."""
        return self.rows.read(0, self.used)[1]

    def statistics(self) -> dict[str, float]:
        """Statistics of the table for log lines and reports, as of the CPU's."""
        used = self.used
        held = self.keys.memory_bytes + self.rows.held_bytes
        waits = int((self.waiting.counts[: self.waiting.used] != 0).sum())
        return {
            "rows": used,
            "candidates": waits,
            "admitted": self.admitted,
            "evicted": self.evicted,
            "bytes": held + self.waiting.memory_bytes,
            "bytes_per_row": held / max(used, 1),
            "load": used / self.keys.capacity,
        }

    def find(self, ids_U: Tensor) -> Tensor:
        """Slots [U], -1 where unseen."""
        return self.keys.find(ids_U, torch.ones(len(ids_U), dtype=torch.int8, device=self._device))

    def evict(self, step: int, total: Total, idle_before: int = 0) -> int:
        """Free the rows that the settings do not let stay, and return how many; all workers call it."""
        settings, keys, used = self._settings, self.keys, self.used
        oldest = max(step - settings.idle_steps if settings.idle_steps else 0, idle_before)
        waiting = self.waiting.used
        if waiting:
            last = self.waiting.last[:waiting].long() & 0xFFFFFFFF
            self.waiting.remove((last < oldest) | (self.waiting.counts[:waiting] == 0))
        gone_S = (keys.last[:used].long() & 0xFFFFFFFF) < oldest
        if settings.evict_zero and used:
            gone_S |= torch.cat([~rows.any(1) for rows, _ in self.rows.pieces(0, used)])
        if settings.max_rows:
            scores = keys.counts if settings.budget_keeps == "frequent" else keys.last
            ids, scores_S = keys.ids[:used].cpu().numpy(), scores[:used].cpu().numpy().view(np.uint32)
            beyond = beyond_budget(scores_S, ids, ~gone_S.cpu().numpy(), settings.max_rows, total)
            gone_S |= torch.from_numpy(beyond).to(self._device)
        many = int(gone_S.sum())
        if many:
            self.rows.move(*keys.remove(gone_S))
            self.rows.release(used - many)
        self.evicted += many
        return many

    def snapshot(self, since: int) -> Snapshot:
        """The rows that were looked up after step ``since`` (0: all), copied to the host."""
        copies = HostRows(self.ids, self.rows_SK.cpu().numpy(), self.state_SZ.cpu().numpy())
        return Snapshot(copies, self.tables, self.counts, self.last, since)

    def take_gone(self, before: list[tuple[Array, Array]]) -> list[tuple[Array, Array]] | None:
        """None: evictions leave no list of what they removed, so every save is whole."""
        return None

    def restore(self, ids: Array, tables: Array, counts: Array, last: Array, rows: Array, state: Array) -> None:
        """Append rows of a checkpoint, none of which is here yet."""
        start = self.used
        self.keys.append(ids, tables, counts, last)
        self.rows.grow(start + len(ids))
        self.rows.write(start, torch.from_numpy(rows).to(self._device), torch.from_numpy(state).to(self._device))

    def restore_candidates(self, ids: Array, tables: Array, counts: Array, last: Array) -> None:
        """Append ids of a checkpoint that wait, none of which is here yet."""
        self.waiting.append(ids, tables, counts, last)


def kernel_type(dtype: torch.dtype) -> Any:
    """Triton's name of a type."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16}[dtype]


def _longer(column: Tensor, room: int) -> Tensor:
    longer = column.new_zeros(room)
    longer[: len(column)] = column
    return longer
