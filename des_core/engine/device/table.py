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

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from des_core.config import TableConfig
from des_core.engine.device import id_kernels
from des_core.engine.device.batch import seed_key, signed
from des_core.engine.device.eviction import beyond_budget
from des_core.engine.device.rows import CHUNK_BITS, DeviceRows
from des_core.engine.device.support import kernel_type, no_room
from des_core.engine.weights import index
from des_core.engine.weights.eviction import Total
from des_core.engine.weights.snapshot import HostRows, Snapshot

Array = np.ndarray[Any, np.dtype[Any]]
BLOCK = id_kernels.BLOCK
MOST_SLOTS = (1 << 31) - 1
"""Lookups are sorted by slot in 32 bits with a sign, of which the largest number is no row."""
AHEAD = 4
"""Batches of new ids that there is room for after a growth: more than can pass before the host knows how many came."""
MAX_LOAD = 0.8
"""More than on the CPU: four entries are read at once, and all bits of an id say where its search begins."""


def grid(many: int, block: int = BLOCK) -> tuple[int]:
    """Programs for so many things."""
    return (max(1, -(-many // block)),)


def capacity_for(slots: int) -> int:
    """The least power of two of entries that hold ``slots``.

    Raises:
        UserError: they are more than one index takes.
    """
    index.capacity_for(slots, MOST_SLOTS)
    return max(1024, 1 << math.ceil(math.log2(max(slots, 1) / MAX_LOAD)))


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
        kinds = (torch.int64, torch.int16, torch.int32, torch.int32)
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
        return ids, tables.view(np.uint16), counts.view(np.uint32), last.view(np.uint32)

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

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where everything is; it moves when it grows."""
        return (self.capacity, *(array.data_ptr() for array in (self.entries, *self.columns)))

    def _grow(self, used: int, more: int, ahead: int = AHEAD) -> None:
        capacity_for(used + more)
        wanted = min(used + ahead * more, MOST_SLOTS)
        try:
            if wanted > self.room:
                self.room = max(wanted, min(self.room // 8 * 9, MOST_SLOTS), 1 << 12)
                for number in range(len(self.columns)):
                    # One by one, so that no more than one is held twice.
                    self.columns[number] = _longer(self.columns[number], self.room)
            if capacity_for(wanted) > self.capacity:
                self.capacity = capacity_for(wanted)
                self.rebuild()
        except (torch.OutOfMemoryError, MemoryError):
            columns = sum(column.element_size() for column in self.columns)
            needed = self.room * columns + 8 * self.capacity
            what = f"the index and the counters of {wanted:,} rows"
            raise no_room(self._device, what, needed, used, needed // wanted) from None

    def rebuild(self) -> None:
        """The index anew from the ids."""
        used = self.used
        # The old one goes first: it is not needed, and the new one is as large.
        self.entries = self.entries[:0].clone()
        self.entries = self._new_entries()
        id_kernels.enter[grid(used)](self.ids, self.entries, 0, used, self.capacity, BLOCK=BLOCK)

    def find(self, ids_L: Tensor, wanted_L: Tensor) -> Tensor:
        """Slots int32 [L], -1 where unseen or not wanted."""
        slots_L = torch.empty(len(ids_L), dtype=torch.int32, device=self._device)
        id_kernels.find[grid(len(ids_L))](
            ids_L, wanted_L, self.entries, self.ids, slots_L, len(ids_L), self.capacity, BLOCK=BLOCK
        )
        return slots_L

    def append(self, ids: Array, tables: Array, counts: Array, last: Array) -> None:
        """Ids of a checkpoint, none of which is here yet."""
        start = self.used
        if start + len(ids) > min(self.room, int(MAX_LOAD * self.capacity)):
            self._grow(start, len(ids), ahead=1)
        stop = start + len(ids)
        signed_arrays = (ids, tables.view(np.int16), counts.view(np.int32), last.view(np.int32))
        for column, values in zip(self.columns, signed_arrays, strict=True):
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
        # And those at which lanes aim that have nothing to do.
        return torch.zeros(self.capacity + BLOCK, dtype=torch.int64, device=self._device)


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


class _New(NamedTuple):
    """A batch's lookups, and the hash table of those whose ids are new."""

    ids_L: Tensor
    piece_L: Tensor | None
    table_O: Tensor
    seat_L: Tensor
    batch_5T: Tensor
    control: Tensor
    samples: int
    places: int


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

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where everything is that kernels are told of; it moves when it grows. Chunks of rows never move."""
        return self.keys.addresses + self.waiting.addresses

    def make_room(self, lookups: int) -> None:
        """Room for a batch, each of whose lookups may be of a new id; ``look_up`` allocates nothing that stays."""
        self.keys.make_room(lookups)
        self.rows.grow(self.keys.bound)
        if self._settings.admit_count > 1:
            self.waiting.make_room(lookups)

    def ask_used(self) -> None:
        """Start to copy the numbers of slots in use to the host, where ``make_room`` finds them later."""
        self.keys.ask_used()
        if self._settings.admit_count > 1:
            self.waiting.ask_used()

    def look_up(
        self, ids_L: Tensor, mine_L: Tensor, piece_L: Tensor | None, table_O: Tensor, control: Tensor, samples: int = 1
    ) -> Tensor:
        """Slots int32 [L] of a step's lookups, -1 without a row; new ids are admitted, and their rows made.

        There must be room: see ``make_room``. Nothing here waits for the device.

        Args:
            mine_L: int8, whether this worker owns the lookup.
            piece_L, table_O: place of the lookup's field, and the field's table.
            samples: where there are no ``piece_L``, for a field has one lookup for each.
        """
        keys, lookups, device = self.keys, len(ids_L), self._device
        slots_L = keys.find(ids_L, mine_L)
        if not lookups:
            return slots_L
        places = 1 << max(10, (2 * lookups - 1).bit_length())
        batch_5T = torch.full((5 * places + BLOCK,), -1, dtype=torch.int32, device=device)
        seat_L, admitted_L = (torch.empty(lookups, dtype=torch.int32, device=device) for _ in range(2))
        id_kernels.claim_new[grid(lookups)](ids_L, mine_L, slots_L, batch_5T, seat_L, lookups, places, BLOCK=BLOCK)
        new = _New(ids_L, piece_L, table_O, seat_L, batch_5T, control, samples, places)
        before_L = None
        if self._settings.admit_count == 1:
            id_kernels.admit_by_coin[grid(lookups)](
                ids_L, seat_L, batch_5T, admitted_L, lookups, places, control, self._probability, BLOCK=BLOCK
            )
        else:
            before_L = self._admit_by_count(new, admitted_L)
        rank_L = self._insert(keys, new, admitted_L, before_L)
        self._settle(keys, new, rank_L, slots_L)
        return slots_L

    def _admit_by_count(self, new: _New, admitted_L: Tensor) -> Tensor:
        """How often each id was looked up before, int64 [L]; the others wait on, or begin to."""
        waiting, lookups, ids_L = self.waiting, len(admitted_L), new.ids_L
        waiting_L = waiting.find(ids_L, (new.seat_L >= 0).to(torch.int8))
        before_L, enters_L = torch.empty_like(ids_L), torch.empty_like(admitted_L)
        id_kernels.admit_by_count[grid(lookups)](
            new.seat_L, new.batch_5T, waiting_L, waiting.counts, admitted_L, before_L, enters_L, lookups, new.places,
            self._settings.admit_count, BLOCK=BLOCK,
        )  # fmt: skip
        rank_L = self._insert(waiting, new, enters_L, None)
        self._settle(waiting, new, rank_L, waiting_L)
        id_kernels.wait_longer[grid(lookups)](
            admitted_L, waiting_L, new.seat_L, new.batch_5T, before_L, waiting.counts, waiting.last, lookups,
            new.places, new.control, BLOCK=BLOCK,
        )  # fmt: skip
        return before_L

    def _insert(self, keys: DeviceKeys, new: _New, chosen_L: Tensor, before_L: Tensor | None) -> Tensor:
        """Give the chosen lookups the next slots, in their order; which of them each is, int32 [L]."""
        rows, lookups = self.rows, len(chosen_L)
        rank_L = chosen_L.cumsum(0, dtype=torch.int32)
        plain = new.piece_L is None
        id_kernels.insert[grid(lookups)](
            new.ids_L, new.ids_L if new.piece_L is None else new.piece_L, new.table_O, chosen_L, rank_L,
            new.ids_L if before_L is None else before_L, new.seat_L, keys.used_1, keys.entries, keys.ids, keys.tables,
            keys.counts, keys.last, new.batch_5T, lookups, new.samples, keys.capacity, new.places, new.control,
            rows.bases, rows.states, self._first_key, self._scale, HAS_BEFORE=before_L is not None, PLAIN=plain,
            ROWS=keys is self.keys, K=self._width, Z=self._state_width, STRIDE=rows.stride,
            STATE_STRIDE=rows.state_stride, SHIFT=rows.shift, DTYPE=kernel_type(rows.dtype),
            ROW=kernel_type(rows.row_dtype), BLOCK=BLOCK,
        )  # fmt: skip
        return rank_L

    def _settle(self, keys: DeviceKeys, new: _New, rank_L: Tensor, slots_L: Tensor) -> None:
        own = keys is self.keys
        id_kernels.slots_of_new[grid(len(rank_L) if own else 1)](
            new.seat_L, new.batch_5T, rank_L, keys.used_1, self._born, slots_L, len(rank_L), new.places, ROWS=own,
            BLOCK=BLOCK,
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
            scores_S = scores[:used].long() & 0xFFFFFFFF
            gone_S |= beyond_budget(scores_S, keys.ids[:used], ~gone_S, settings.max_rows, total)
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


def _longer(column: Tensor, room: int) -> Tensor:
    longer = column.new_zeros(room)
    longer[: len(column)] = column
    return longer
