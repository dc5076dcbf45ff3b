"""The exchange ``rows`` where ids and rows are on a device: routing, messages and what homes do with them.

An owner finds the rows that each home's samples read by a sort of (home, slot), and gathers them, one home after the
other: for the rows, that is a batch in which each sample looks up one row. To each home go, beside them, 32-bit
integers about its lookups:

    of a field with one lookup of x = 1 for each sample, all of it owned here: per sample its row's place, or -1
    of other fields: how many lookups each has, then of all of them the rows' places, the samples, the bits of x

Places count the rows sent to that home. Which field is of which kind is known to all. The host waits once for the
numbers of rows and integers, for no collective can do without them.

Dims: N homes, O fields owned, L lookups, R rows sent, B samples of the batch, b of a home.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from des_core.contracts import FieldSpec
from des_core.data.feed.batches import is_one
from des_core.engine.device.batch import Places
from des_core.engine.device.pooling import Pooled
from des_core.engine.device.rows import DeviceRows
from des_core.engine.device.shard import DeviceShard, RowsShard, bare
from des_core.engine.exchange.exchange import Exchange
from des_core.engine.operators import Shard, totals_alone

Array = np.ndarray[Any, np.dtype[Any]]
NO_ROW = (1 << 63) - 1


@dataclass(frozen=True)
class Lookups:
    """The lookups of a batch on an owner: slots, -1 without a row, and where they belong."""

    slots_L: Tensor
    sample_L: Tensor
    piece_L: Tensor
    x_L: Tensor
    offsets_OB: Tensor


@dataclass
class DeviceRouting:
    """What an owner sends of a batch to homes that begin at ``edges``."""

    place_L: Tensor
    """The row's place among those sent to the lookup's home, -1 without one."""
    slots: Tensor
    """Of the rows, home by home; there is room for more than there are."""
    explicit_L: Tensor
    """Lookups that are told of one by one, home by home; there is room for more than there are."""
    explicit_NO: Tensor
    """How many they are, by home and field."""
    rows_N: Tensor
    edges: list[int]
    plain: list[bool]
    """By owned field."""
    lookups: Lookups
    sent: Array | None = None
    """Numbers of rows and integers by home [N, 2], once the host knows them."""

    @property
    def sizes_N2(self) -> Tensor:
        """Numbers of rows and of explicit lookups by home."""
        return torch.stack([self.rows_N, self.explicit_NO.sum(1)], 1)

    def messages(self, explicit_N: list[int]) -> list[Tensor]:
        """The integers for each home, int32."""
        lookups, samples = self.lookups, self.edges[-1]
        columns = [number for number, plain in enumerate(self.plain) if plain]
        others = [number for number, plain in enumerate(self.plain) if not plain]
        # Of a plain field the lookup of each sample is the first and only one.
        starts = lookups.offsets_OB[:-1].view(len(self.plain), samples)[columns]
        places = self.place_L[starts] if columns else self.place_L.new_zeros(0, samples)
        chosen = self.explicit_L[: sum(explicit_N)].split(explicit_N)
        return [
            torch.cat(
                [
                    places[:, begin:end].reshape(-1).int(),
                    self.explicit_NO[home, others].int(),
                    self.place_L[which].int(),
                    (lookups.sample_L[which] - begin).int(),
                    lookups.x_L[which].float().view(torch.int32),
                ]
            )
            for home, (begin, end, which) in enumerate(zip(self.edges, self.edges[1:], chosen, strict=False))
        ]


def route(lookups: Lookups, edges: list[int], plain: list[bool]) -> DeviceRouting:
    """The routing of a batch whose homes begin at ``edges`` (and its end)."""
    slots_L, device, homes = lookups.slots_L.long(), lookups.slots_L.device, len(edges) - 1
    many = len(slots_L)
    inner = torch.tensor(edges[1:-1], dtype=torch.int64).to(device)
    home_L = torch.bucketize(lookups.sample_L, inner, right=True)
    known_L = (slots_L >= 0) & (lookups.x_L != 0)
    words_L, order_L = torch.where(known_L, (home_L << 32) | slots_L, NO_ROW).sort(stable=True)
    before_L = torch.cat([words_L.new_full((1,), -1), words_L])[:many]
    known_sorted_L = words_L != NO_ROW
    new_L = known_sorted_L & (words_L != before_L)
    number_L = new_L.cumsum(0) - 1
    home_sorted_L = torch.where(known_sorted_L, words_L >> 32, homes)
    rows_N = torch.zeros(homes + 1, dtype=torch.int64, device=device).index_add_(0, home_sorted_L, new_L.long())
    starts_N = rows_N.cumsum(0) - rows_N
    place_L = torch.empty_like(slots_L)
    place_L[order_L] = torch.where(known_sorted_L, number_L - starts_N[home_sorted_L], -1)
    # What is not new goes behind all others, where no one reads.
    slots = torch.zeros(many + 1, dtype=torch.int64, device=device)
    slots[torch.where(new_L, number_L, many)] = words_L & 0xFFFFFFFF
    explicit = torch.tensor([not one for one in plain], dtype=torch.bool).to(device)
    # Lookups that only fill up the batch have no field.
    told_L = known_L & explicit[lookups.piece_L.clamp(min=0)] if many else known_L
    group_L = torch.where(told_L, home_L, homes)
    explicit_L = group_L.sort(stable=True).indices
    cells = torch.zeros((homes + 1) * max(len(plain), 1), dtype=torch.int64, device=device)
    cells.index_add_(0, group_L * len(plain) + lookups.piece_L.clamp(min=0), told_L.long())
    explicit_NO = cells.view(homes + 1, -1)[:homes]
    return DeviceRouting(place_L, slots, explicit_L, explicit_NO, rows_N[:homes], edges, plain, lookups)


class DeviceExchange(Exchange):
    """The exchanges of ``Exchange``, ``rows`` by messages that are made and read on the device."""

    fields_of_owner: list[list[FieldSpec]]
    """Fields that each owner owns pieces of."""
    whole: list[list[bool]]
    """Whether it owns all of their tables."""

    def is_plain(self, owner: int) -> list[bool]:
        """By field of an owner, whether each sample has one lookup there, of x = 1."""
        return [
            is_one(field) and whole for field, whole in zip(self.fields_of_owner[owner], self.whole[owner], strict=True)
        ]

    def totals(self, shard: Shard, inputs_bM: Tensor, routing: Any) -> dict[str, Tensor]:
        """Every operator's total ``[b, P]`` of the home slice; see ``Exchange``. One worker has no one to pack for."""
        if self._peers.workers == 1 and routing is None:
            return totals_alone(self._operators, shard)
        return super().totals(shard, inputs_bM, routing)

    def _brought_home(self, shard: Shard, inputs_bM: Tensor, routing: Any, samples: int) -> Shard:
        assert isinstance(routing, DeviceRouting) and isinstance(shard, RowsShard)
        peers, reads = self._peers, self._plan.reads
        workers, width = peers.workers, reads.stop - reads.start
        sizes_N2 = routing.sizes_N2
        one = [{"rows": 2} for _ in range(workers)]
        come_N2 = peers.all_to_all(sizes_N2.reshape(-1), one, [2] * workers).view(-1, 2)
        # The step's one wait for the device.
        both = torch.stack([sizes_N2, come_N2]).tolist()
        send_rows, come_rows = ([rows for rows, _ in side] for side in both)
        messages = routing.messages([explicit for _, explicit in both[0]])
        lengths = [len(message) for message in messages]
        come_lengths = [self._length(owner, samples, explicit) for owner, (_, explicit) in enumerate(both[1])]
        routing.sent = np.array([send_rows, lengths]).T
        come = peers.all_to_all(torch.cat(messages), [{"rows": n} for n in lengths], come_lengths)
        rows_RK = shard.gather(sum(send_rows))
        sent_R = rows_RK[:, reads].reshape(-1)
        flat = self._swap(sent_R, [{"rows": n * width} for n in send_rows], [{"rows": n * width} for n in come_rows])
        rows_UK = flat.view(-1, width)
        rows_UK = rows_UK if reads.start == 0 else torch.nn.functional.pad(rows_UK, (1, 0))
        explicit_come = [explicit for _, explicit in both[1]]
        slots_L, places = self._read(come.split(come_lengths), come_rows, explicit_come, samples)
        return self._at_home(rows_UK, slots_L, places, inputs_bM)

    def _length(self, owner: int, samples: int, explicit: int) -> int:
        plain = self.is_plain(owner)
        return sum(plain) * samples + len(plain) - sum(plain) + 3 * explicit

    def _read(
        self, messages: tuple[Tensor, ...], rows_N: list[int], explicit_N: list[int], samples: int
    ) -> tuple[Tensor, Places]:
        """Slots among the rows that came, and places of the home's lookups, field by field in sample order."""
        device, fields = messages[0].device, self._fields
        parts: list[list[Tensor]] = [[], [], []]
        at = 0
        for owner, message in enumerate(messages):
            plain, numbers = self.is_plain(owner), self._plan.owned[owner]
            some = torch.tensor([n for n, one in zip(numbers, plain, strict=True) if one], dtype=torch.int64)
            others = torch.tensor([n for n, one in zip(numbers, plain, strict=True) if not one], dtype=torch.int64)
            explicit = explicit_N[owner]
            sizes = [len(some) * samples, len(others), explicit, explicit, explicit]
            direct, counts, place, sample, x = message.split(sizes)
            field = others.to(device).repeat_interleave(counts.long(), output_size=explicit)
            cell = (some[:, None] * samples + torch.arange(samples)).reshape(-1).to(device)
            place = torch.cat([direct, place])
            parts[0].append(torch.where(place < 0, -1, place + at))
            parts[1] += [cell, field * samples + sample]
            parts[2] += [torch.ones(len(cell), device=device), x.view(torch.float32)]
            at += rows_N[owner]
        slots_L, cell_L, x_L = (torch.cat(part) for part in parts)
        cell_L, order_L = cell_L.sort(stable=True)
        offsets = torch.searchsorted(cell_L, torch.arange(fields * samples + 1, device=device))
        sample_L, piece_L = cell_L % samples, cell_L // samples
        return slots_L[order_L].int(), Places(samples, fields, sample_L, piece_L, x_L[order_L], offsets)

    def _at_home(self, rows_UK: Tensor, slots_L: Tensor, places: Places, inputs_bM: Tensor) -> Shard:
        """The shard of a home that has been brought all rows its samples read."""
        copy = rows_UK.detach()
        ids = slots_L.new_empty(max(len(copy), 1), dtype=torch.int64)
        pooled = Pooled(DeviceRows.of(copy), ids, slots_L, places, False, False, rows_UK)
        numbers = torch.arange(self._fields, device=copy.device)
        shard = bare(DeviceShard, places.samples, copy.shape[1], copy.dtype, numbers, inputs_bM)
        assert isinstance(shard, DeviceShard)
        return self._plan.with_pooling(replace(shard, pooled=pooled, trains=rows_UK.requires_grad))
