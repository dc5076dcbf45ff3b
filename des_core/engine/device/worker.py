"""One worker whose id side and rows are on its GPU.

    batch -> keys -> (device) ids -> slots -> lookups sorted by row
          -> pooled rows -> partials -> exchange -> finish, towers, loss at home
          <- row update from gradients of what was pooled

The host decodes columns and hands over keys; the rest of a step is on one stream. Operators, exchanges and the
upper network are those of every worker; the exchange ``rows`` needs lists of rows on the host, and several
workers do without it here.

Dims: B samples, O fields owned here, L lookups, U unique rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from des_core.config import Config
from des_core.data.feed.batches import BUCKETS, Raw
from des_core.engine.dense_layers import Home
from des_core.engine.device import id_kernels
from des_core.engine.device.batch import Segments, segments_of
from des_core.engine.device.pooling import Pooled
from des_core.engine.device.table import BLOCK, DeviceTable, grid
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.exchange import Exchange
from des_core.engine.exchange.plan import Link, combinations, link_of
from des_core.engine.exchange.row_routing import RowRouting
from des_core.engine.operators import Shard
from des_core.engine.worker import Worker
from des_core.errors import ConfigError
from des_core.run import Run


class Keys(NamedTuple):
    """A batch's lookups before they are hashed, on the device or on their way there; see ``Raw``."""

    tensors: tuple[Tensor, ...]
    """Keys, samples, fields and x [L], and offsets [O B + 1]."""
    copied: torch.cuda.Event | None
    """Set when they are there."""


@dataclass(frozen=True)
class DeviceReady:
    """A batch whose keys are on their way to the device."""

    batch: pa.Table
    step: int
    keys: Keys
    routing: None = None


class Pending(NamedTuple):
    """A step whose loss has not been read yet."""

    mean: Tensor
    """On the host, once ``copied`` is set."""
    copied: torch.cuda.Event | None
    loss_b: Tensor
    ready: DeviceReady
    home: Home


@dataclass(frozen=True)
class DeviceShard(Shard):
    """A shard whose rows stay in the table."""

    pooled: Pooled | None = None
    segments: Segments | None = None

    @cached_property
    def _pooled(self) -> tuple[Tensor, Tensor, Tensor]:
        pooled = self.pooled
        assert pooled is not None
        pooled.by_field, pooled.squares = self.by_field, self.squares
        return pooled.forward() if self.segments is None else pooled.with_gradients()


class DeviceWorker(Worker):
    """A worker on a device for which the Triton kernels are made."""

    table: DeviceTable  # type: ignore[assignment]

    def __init__(self, run: Run, peers: Collectives) -> None:
        super().__init__(run, peers)
        self._finite = torch.ones(1, dtype=torch.int32, device=peers.device)
        self._pending: Pending | None = None
        self._copies: torch.cuda.Stream | None = None
        device, ownership = peers.device, self.ownership
        owned_OH = np.array(ownership.owned, np.int8).reshape(-1, BUCKETS)
        self._owned_OH = torch.from_numpy(owned_OH).to(device)
        self._salts_O = torch.from_numpy(ownership.salts).to(device)
        self._table_O = torch.from_numpy(ownership.table_of_piece.astype(np.int32)).to(device)

    def _make_table(self, config: Config, zeros: int) -> DeviceTable:  # type: ignore[override]
        settings, device = config.table, self.peers.device
        return DeviceTable(
            self.model.row_width, zeros, config.run.seed, config.model.init, settings, device, self.dtype
        )

    def choose_plan(self, link: Link | None = None, chosen: dict[str, Any] | None = None) -> None:
        """Choose the plan, without the exchange ``rows``.

        Raises:
            ConfigError: the config asks for that exchange.
        """
        settings = self.run.config.train
        link = link_of(self.run.config) or link
        plans = combinations(self._base, settings.batch, settings.exchange, settings.upper, link)
        plans = [plan for plan in plans if not plan.rows]
        if not plans:
            raise ConfigError("train.exchange = 'rows' needs train.kernels = 'torch'; set it, or exchange to 'auto'")
        self.plan = next((plan for plan in plans if plan.chosen == chosen), plans[0])
        self.exchange = Exchange(self.plan, self.peers)

    def _make_ready(self, batch: pa.Table, step: int) -> DeviceReady:  # type: ignore[override]
        with self.profile.phase("decode"):
            return DeviceReady(batch, step, self._send(self.ownership.raw(batch)))

    def _read(self, ready: DeviceReady, home: Home) -> Shard:  # type: ignore[override]
        ids_L, mine_L, places = self._hashed(ready.keys)
        slots_L = self.table.look_up(ids_L, mine_L, places[1], self._table_O, ready.step)
        segments = segments_of(slots_L)
        segments.record(self.table.keys, ready.step)
        pooled = self._pooled(slots_L, places, ready.batch.num_rows)
        if self.decay.pieces:
            previous_U = (segments.previous_U.long() & 0xFFFFFFFF).clamp(max=ready.step - 1)
            pooled.catch_up(segments, self.decay.missed_on(previous_U, ready.step), ready.step)
        return self._device_shard(pooled, segments, home)

    def _read_only(self, batch: pa.Table, home: Home) -> tuple[Shard, RowRouting | None]:
        ids_L, mine_L, places = self._hashed(self._send(self.ownership.raw(batch)))
        slots_L = self.table.keys.find(ids_L, mine_L)
        pooled = self._pooled(slots_L, places, batch.num_rows)
        if self.decay.pieces:
            # Rows are only read: what they have missed goes to the numbers that they are multiplied by.
            last_L = self.table.keys.last[slots_L.clamp(min=0)].long() & 0xFFFFFFFF
            pooled.x_L = pooled.x_L * self.decay.missed_on(last_L, self.steps + 1).to(self.dtype)
        return self._device_shard(pooled, None, home), None

    def _update_rows(self, shard: Shard, ready: DeviceReady, rate: float) -> None:  # type: ignore[override]
        assert isinstance(shard, DeviceShard) and shard.pooled is not None and shard.segments is not None
        shard.pooled.update(shard.segments, self.run.config.optimizer.rows, ready.step, rate, self._finite)

    def _without_factors(self, shard: Shard, ready: DeviceReady) -> None:  # type: ignore[override]
        """Nothing: the config refuses wide fields on a device."""

    def _row_squares(self, shard: Shard) -> Tensor | None:
        if not self.plan.clips:
            return None
        assert isinstance(shard, DeviceShard) and shard.pooled is not None and shard.segments is not None
        return shard.pooled.row_squares(shard.segments)

    def _scale_rows(self, shard: Shard, scale: Tensor) -> None:
        assert isinstance(shard, DeviceShard) and shard.pooled is not None
        shard.pooled.scale(scale)

    def _update_dense(self, rate: float) -> None:
        self.dense.step_if(rate, self._finite)

    def _accept(self, mean: Tensor, loss_b: Tensor, ready: DeviceReady, home: Home) -> float:  # type: ignore[override]
        """The mean loss of the step before, which is known by now; from the first one that is not finite on, nothing
        is updated any more."""
        self._finite *= torch.isfinite(mean).int()
        on_gpu = self.peers.device.type == "cuda"
        host = torch.empty((), dtype=mean.dtype, pin_memory=on_gpu).copy_(mean, non_blocking=True)
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record()
        before, self._pending = self._pending, Pending(host, copied, loss_b, ready, home)
        return self._read_loss(before or self._pending)

    def _read_loss(self, pending: Pending) -> float:
        if pending.copied is not None:
            pending.copied.synchronize()
        value = float(pending.mean)
        if not math.isfinite(value):
            self._refuse(value, pending.loss_b, pending.ready, pending.home)  # type: ignore[arg-type]
        return value

    def settle(self) -> None:
        """Wait until the loss of every step is known to be finite."""
        if self._pending is not None:
            self._read_loss(self._pending)
            self._pending = None

    def _send(self, raw: Raw) -> Keys:
        """Lookups on their way to the device, under the step that runs there."""
        device = self.peers.device
        arrays = [torch.from_numpy(array) for array in (raw.keys, raw.sample, raw.piece, raw.x, raw.offsets)]
        if device.type != "cuda":
            return Keys(tuple(arrays), None)
        if self._copies is None:
            self._copies = torch.cuda.Stream(device)
        with torch.cuda.stream(self._copies):
            there = [array.pin_memory().to(device, non_blocking=True) for array in arrays]
            copied = torch.cuda.Event()
            copied.record()
        return Keys(tuple(there), copied)

    def _hashed(self, keys: Keys) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Ids, whether they are owned here, and each lookup's sample, field, x and offsets, on the device."""
        keys_L, sample_L, piece_L, x_L, offsets_OB = keys.tensors
        if keys.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(keys.copied)
            for tensor in keys.tensors:
                # The memory is not to be used again before this stream is through with it.
                tensor.record_stream(stream)
        ids_L, mine_L = torch.empty_like(keys_L), torch.empty(len(keys_L), dtype=torch.int8, device=keys_L.device)
        id_kernels.ids_of_keys[grid(len(keys_L))](
            keys_L, piece_L, self._salts_O, self._owned_OH, ids_L, mine_L, len(keys_L), BUCKETS=BUCKETS, BLOCK=BLOCK
        )
        return ids_L, mine_L, (sample_L, piece_L, x_L.to(self.dtype), offsets_OB)

    def _pooled(self, slots_L: Tensor, places: tuple[Tensor, ...], samples: int) -> Pooled:
        sample_L, piece_L, x_L, offsets_OB = places
        fields, table, seed = len(self.ownership.fields), self.table, self.run.config.run.seed
        places = (sample_L, piece_L, x_L, offsets_OB)
        return Pooled(table.rows, table.keys.ids, slots_L, *places, samples, fields, False, False, seed)

    def _device_shard(self, pooled: Pooled, segments: Segments | None, home: Home) -> Shard:
        empty = torch.empty(0, dtype=torch.int64, device=self.peers.device)
        shard = DeviceShard(
            rows_UK=torch.empty(0, self.model.row_width, dtype=self.dtype, device=self.peers.device),
            inverse_L=empty,
            sample_L=pooled.sample_L,
            piece_L=pooled.piece_L,
            x_L=pooled.x_L,
            samples=pooled.samples,
            fields_O=self._fields_O,
            inputs_BM=self._inputs(pooled.samples, home),
            pooled=pooled,
            segments=segments,
        )
        return replace(self.plan.with_pooling(shard), total=self.exchange.sum_over_workers)
