"""One worker whose id side and rows are on its GPU.

    batch -> keys -> (device) ids -> slots -> lookups sorted by row
          -> pooled rows -> partials -> exchange -> finish, towers, loss at home
          -> gradients -> row and dense updates

Threads of the host decode columns and hand over keys; the rest of a step is on one stream and never makes the host
wait (but for ``rows``, whose messages have sizes). What changes with a step is in tensors, so a lone worker's step can
be captured and replayed: see graphs.py. Operators, exchanges and the upper network are those of every worker. NCCL
runs on a stream of its own, and what follows an exchange waits for it there, by an event, not here.

Dims: G samples of the batch, b of the home slice, O fields owned here, L lookups, M dense inputs, P pieces of decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from des_core.checkpoint.manifest import Manifest
from des_core.config import Config
from des_core.contracts import LABEL, Reference
from des_core.data.feed.batches import BUCKETS, Raw, dense_values
from des_core.data.feed.prefetch import default_threads
from des_core.engine.dense_layers import Home, LaneDropout
from des_core.engine.device import id_kernels, row_kernels
from des_core.engine.device.batch import Places, Segments, control_of, segments_of
from des_core.engine.device.dense_rule import DeviceDenseRule
from des_core.engine.device.graphs import CudaRecorder, Replays
from des_core.engine.device.pooling import Pooled
from des_core.engine.device.row_routing import DeviceExchange, DeviceRouting, Lookups, route
from des_core.engine.device.shard import DeviceShard, RowsShard, SentRows, bare
from des_core.engine.device.support import sent
from des_core.engine.device.table import BLOCK, DeviceTable, grid
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.plan import Link, home_edges
from des_core.engine.operators import Shard
from des_core.engine.worker import Worker
from des_core.run import Run


class Inputs(NamedTuple):
    """What a step reads of its batch, on the device or on its way there; None where lookups are plain: see ``Raw``."""

    keys_L: Tensor
    sample_L: Tensor | None
    piece_L: Tensor | None
    x_L: Tensor | None
    offsets_OB: Tensor | None
    labels_b: Tensor
    inputs_bM: Tensor


class Sent(NamedTuple):
    """Inputs, and an event that is set when they are there."""

    inputs: Inputs
    copied: torch.cuda.Event | None


@dataclass(frozen=True)
class DeviceReady:
    """A batch that is being decoded and copied."""

    batch: pa.Table
    step: int
    sent: Future[Sent]


class Pending(NamedTuple):
    """A step whose loss has not been read yet."""

    mean: Tensor
    """On the host, once ``copied`` is set."""
    copied: torch.cuda.Event | None
    loss_b: Tensor
    ready: DeviceReady
    home: Home


class DeviceWorker(Worker):
    """A worker on a device for which the Triton kernels are made."""

    table: DeviceTable  # type: ignore[assignment]
    dense: DeviceDenseRule
    exchange: DeviceExchange

    def __init__(self, run: Run, peers: Collectives) -> None:
        super().__init__(run, peers)
        device, ownership, config = peers.device, self.ownership, run.config
        on_gpu = device.type == "cuda"
        self.lookahead = default_threads() if on_gpu else 2
        self._threads = ThreadPoolExecutor(self.lookahead, "decode")
        self.dense = DeviceDenseRule(config.optimizer.dense, self.model.parameters())
        self._finite = torch.ones(1, dtype=torch.int32, device=device)
        self._pending: Pending | None = None
        self._copies = torch.cuda.Stream(device) if on_gpu else None
        owned_OH = np.array(ownership.owned, np.int8).reshape(-1, BUCKETS)
        self._owned_OH = torch.from_numpy(owned_OH).to(device)
        self._salts_O = torch.from_numpy(ownership.salts).to(device)
        self._table_O = torch.from_numpy(ownership.table_of_piece.astype(np.int32)).to(device)
        self._decay_P2: Tensor | None = None
        self._decays: list[tuple[int, float]] = []
        # Draws of dropout are the host's, and exchanges are booked there: such steps are not captured.
        draws = any(isinstance(m, LaneDropout) and m.share for m in self.model.modules())
        captured = config.train.graphs and peers.workers == 1 and not draws and not self.profile.detailed
        self._shares: dict[float, Tensor] = {}
        self._plainly = Replays(None)
        self.replays = Replays(CudaRecorder() if captured and on_gpu else None)

    def _make_table(self, config: Config, zeros: int) -> DeviceTable:  # type: ignore[override]
        settings, device = config.table, self.peers.device
        return DeviceTable(
            self.model.row_width, zeros, config.run.seed, config.model.init, settings, device, self.dtype
        )

    def choose_plan(self, link: Link | None = None, chosen: dict[str, Any] | None = None) -> None:
        """Choose the plan, as every worker does; see ``Worker``."""
        super().choose_plan(link, chosen)
        fields, owned = self.dataset.row_fields, self.plan.owned
        self.exchange = DeviceExchange(self.plan, self.peers)
        self.exchange.fields_of_owner = [[fields[number] for number in numbers] for numbers in owned]
        self.exchange.whole = [
            [bool(self.placement.owned(worker)[field.table].all()) for field in some]
            for worker, some in enumerate(self.exchange.fields_of_owner)
        ]

    def load(self, reference: Reference) -> Manifest:
        """Take over a checkpoint's weights and optimizer state."""
        manifest = super().load(reference)
        self.replays.forget()
        return manifest

    # The host's side: decoding and copying, in threads.

    def _make_ready(self, batch: pa.Table, step: int) -> DeviceReady:  # type: ignore[override]
        return DeviceReady(batch, step, self._threads.submit(self._send, batch, True))

    def _send(self, batch: pa.Table, trains: bool) -> Sent:
        """A batch's inputs on their way to the device, under the step that runs there."""
        with self.profile.phase("decode"):
            device, samples = self.peers.device, batch.num_rows
            on_gpu = device.type == "cuda"
            raw = self._filled_up(self.ownership.raw(batch, _pinned if on_gpu else _plain))
            start, stop = self._home_of(samples, trains)
            labels = batch.column(LABEL).to_numpy()[start:stop] if LABEL in batch.column_names else np.zeros(0)
            inputs = dense_values(batch.slice(start, stop - start), self.dataset.dense_fields)
            arrays = (raw.keys, raw.sample, raw.piece, raw.x, raw.offsets, labels, inputs)
            host = [None if array is None else torch.from_numpy(np.require(array, None, "W")) for array in arrays]
            host[5:] = [part.to(self.dtype) for part in host[5:] if part is not None]
            if self._copies is None:
                return Sent(Inputs(*host), None)  # type: ignore[arg-type]
            with torch.cuda.stream(self._copies):
                there = [None if part is None else sent(part, device) for part in host]
                copied = torch.cuda.Event()
                copied.record()
            return Sent(Inputs(*there), copied)  # type: ignore[arg-type]

    def _filled_up(self, raw: Raw) -> Raw:
        """Lookups that are not plain, filled up by some of no field, so that few sizes occur."""
        if raw.sample is None or raw.piece is None or raw.x is None:
            return raw
        unit = max(64, 1 << max(len(raw.keys).bit_length() - 4, 0))
        more = -len(raw.keys) % unit
        keys, sample, x = (np.append(a, np.zeros(more, a.dtype)) for a in (raw.keys, raw.sample, raw.x))
        piece = np.append(raw.piece, np.full(more, -1, np.int64))
        return Raw(keys, sample, piece, x, raw.offsets)

    def _home_of(self, samples: int, trains: bool) -> tuple[int, int]:
        return (0, samples) if self.plan.replicated and trains else self._slice(samples)

    def _arrived(self, held: Sent) -> Inputs:
        if held.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(held.copied)
            for tensor in held.inputs:
                if tensor is not None:
                    # The memory is not to be used again before this stream is through with it.
                    tensor.record_stream(stream)
        return held.inputs

    # A step: what the host decides, then what the device does, plainly or by a replay.

    def step(self, ready: DeviceReady, rate_scale: float) -> float:  # type: ignore[override]
        """Train on one global batch; the mean loss of the step before, which is known by now.

        Args:
            rate_scale: factor of both learning rates.

        Raises:
            UserError: the loss of the step before is not finite, and no weight has moved since.
        """
        settings, samples = self.run.config.optimizer, ready.batch.num_rows
        with self.profile.phase("stall"):
            held = ready.sent.result()
        inputs = self._arrived(held)
        rate = settings.rows.learning_rate * rate_scale
        self.decay.record(ready.step, rate * settings.rows.weight_decay)
        self._follow_decay()
        dense = self.dense.numbers(settings.dense.learning_rate * rate_scale)
        seed, width = self.run.config.run.seed, self.model.row_width
        control = sent(control_of(seed, ready.step, settings.rows, width, rate, dense), self.peers.device)
        self.table.make_room(len(inputs.keys_L))
        home = self._home_with(inputs, samples, ready.step)
        shape = (samples, len(inputs.keys_L), str(self.plan.chosen), len(self._decays))
        addresses = (self.table.addresses, None if self._decay_P2 is None else self._decay_P2.data_ptr())
        work = partial(self._on_device, samples=samples, step=ready.step)
        # The messages of ``rows`` have sizes that the host waits for.
        replays = self._plainly if self.plan.rows else self.replays
        mean, loss_b = replays.run(shape, addresses, (control, *inputs), work)
        self.table.ask_used()
        self.profile.end_step()
        self.steps = ready.step
        return self._accept(mean, loss_b, ready, home)

    def _on_device(self, tensors: tuple[Tensor | None, ...], samples: int, step: int) -> tuple[Tensor, Tensor]:
        """The mean loss and that of each sample; all of it may be a replay, so nothing here is the host's."""
        control, inputs, profile = tensors[0], Inputs(*tensors[1:]), self.profile  # type: ignore[arg-type]
        assert control is not None
        home = self._home_with(inputs, samples, step)
        with profile.phase("gather"):
            shard, segments, routing = self._shard_of(inputs, home, control)
        with profile.phase("partial"), self._half():
            totals = self._totals(shard, home, routing)  # type: ignore[arg-type]
        with profile.phase("head"):
            with self._half():
                logits_b = self.model(totals, home)
            logits_b = logits_b.to(self.dtype)
            loss_b, gradient_b = self._losses_of(logits_b.detach().contiguous(), inputs.labels_b, home)
        with profile.phase("backward"):
            self.dense.zero_gradients()
            logits_b.backward(gradient_b)
            squares = self._squares(shard, segments, control)
            gradients, mean, squares = self._summed_gradients(loss_b.sum(), squares)
            row_kernels.judge[(1,)](mean, self._finite)
        with profile.phase("update"), torch.no_grad():
            moved = tuple(n for n, p in enumerate(self.dense.parameters) if p.grad is not None)
            if squares is not None:
                self._clipped(shard, gradients, squares)
            self.dense.update(moved, gradients, control, self._finite)
            self._update(shard, segments, control)
        if routing is not None and routing.sent is not None:
            self._sent += routing.sent.sum(0) - routing.sent[self.peers.rank]
        return mean, loss_b

    def _losses_of(self, logits_b: Tensor, labels_b: Tensor, home: Home) -> tuple[Tensor, Tensor]:
        """Each sample's share of the mean loss, and its gradient."""
        share = 1 / (home.samples * (self.peers.workers if self.plan.replicated else 1))
        if share not in self._shares:
            # Made once, for a number of the host is none in float64 to a kernel.
            self._shares[share] = sent(torch.tensor([share], dtype=self.dtype), self.peers.device)
        loss_b, gradient_b = torch.empty_like(logits_b), torch.empty_like(logits_b)
        row_kernels.losses[grid(len(logits_b))](
            logits_b, labels_b, loss_b, gradient_b, len(logits_b), self._shares[share],
            RATING=self.dataset.task != "click", BLOCK=BLOCK,
        )  # fmt: skip
        return loss_b, gradient_b

    def _update(self, shard: Shard, segments: Segments, control: Tensor) -> None:
        pooled = self._pooled_of(shard)
        if pooled is not None:
            rule = self.run.config.optimizer.rows.name
            pooled.update(self._by_row(shard, pooled, segments), rule, control, self._finite)

    def _pooled_of(self, shard: Shard) -> Pooled | None:
        """The lookups whose rows are updated here."""
        if isinstance(shard, RowsShard):
            return None if shard.sent is None else shard.sent.pooled
        return shard.pooled if isinstance(shard, DeviceShard) else None

    def _squares(self, shard: Shard, segments: Segments, control: Tensor) -> Tensor | None:
        """The sum of squares [1] of the gradients of the rows owned here; None: nothing is clipped."""
        if not self.plan.clips:
            return None
        pooled = self._pooled_of(shard)
        if pooled is None:
            return torch.zeros(1, dtype=self.dtype, device=self.peers.device)
        return pooled.row_squares(self._by_row(shard, pooled, segments), control)

    def _clipped(self, shard: Shard, gradients: Tensor, squares: Tensor) -> None:
        """Scale all gradients down to ``max_grad_norm``; see ``Worker``."""
        norm = torch.sqrt(squares.sum() + gradients.square().sum())
        scale = (self.run.config.train.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        gradients.mul_(scale)
        pooled = self._pooled_of(shard)
        if pooled is not None:
            pooled.scale = scale

    def _by_row(self, shard: Shard, pooled: Pooled, segments: Segments) -> Segments:
        return segments_of(pooled.slots_L) if isinstance(shard, RowsShard) else segments

    def _summed_gradients(self, loss: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """All dense gradients, flat, completed in one sum over workers; the batch's mean loss, and ``squares`` of all.

        Where what follows the totals is replicated, every worker's gradient of it is 1/N of the whole.
        """
        peers, summed, replicated = self.peers, set(self.plan.summed), self.plan.replicated
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if peers.workers == 1:
            return torch.cat([part.reshape(-1) for part in gradients.values()]), loss, squares
        mine = [part.reshape(-1) for name, part in gradients.items() if name in summed]
        numbers = [] if replicated else [loss.reshape(1)]
        numbers += [] if squares is None else [squares]
        sums = {"dense gradients": torch.cat(mine)} if mine else {}
        sums |= {"metrics": torch.cat(numbers)} if numbers else {}
        total = peers.all_reduce(sums, "backward") if sums else {}
        if mine:
            mine = list(total["dense gradients"].split([len(part) for part in mine]))
        alike = {name: part.reshape(-1) * peers.workers for name, part in gradients.items() if name not in summed}
        flat = torch.cat([alike[name] if name in alike else mine.pop(0) for name in gradients])
        mean = loss * peers.workers if replicated else total["metrics"][0]
        return flat, mean, None if squares is None else total["metrics"][-1:]

    def _shard_of(self, inputs: Inputs, home: Home, control: Tensor) -> tuple[Shard, Segments, DeviceRouting | None]:
        """What operators read, new rows being there; and the lookups by row."""
        ids_L, mine_L = self._hashed(inputs, home.samples)
        table, keys = self.table, self.table.keys
        slots_L = table.look_up(ids_L, mine_L, inputs.piece_L, self._table_O, control, home.samples)
        segments = segments_of(slots_L)
        pooled = self._pooled_at(slots_L, inputs, home.samples)
        pooled.meet(segments, keys.counts, keys.last, control, self._decay_P2)
        self.profile.count(lambda: pooled.least_bytes(segments))
        shard, routing = self._made(pooled, inputs, home, None)
        return shard, segments, routing

    def _made(
        self, pooled: Pooled, inputs: Inputs, home: Home, missed: Callable[[Tensor], Tensor] | None
    ) -> tuple[Shard, DeviceRouting | None]:
        """The shard of pooled lookups, whose rows stay here or are sent as the routing says."""
        kind = RowsShard if self.plan.rows else DeviceShard
        inputs_GM = self._inputs(home.samples, home)
        shard = bare(kind, home.samples, self.model.row_width, self.dtype, self._fields_O, inputs_GM)
        shard = replace(self.plan.with_pooling(shard), total=self.exchange.sum_over_workers)
        if isinstance(shard, DeviceShard):
            return replace(shard, pooled=pooled, trains=home.training), None
        assert isinstance(shard, RowsShard)
        edges = home_edges(home.samples, self.peers.workers)
        lookups = self._told(pooled, inputs, home.samples)
        routing = route(lookups, edges, self.exchange.is_plain(self.peers.rank))
        return replace(shard, sent=SentRows(self.table, routing.slots, home.training, missed)), routing

    def _told(self, pooled: Pooled, inputs: Inputs, samples: int) -> Lookups:
        """The lookups with what is left unsaid of plain ones."""
        device, fields, x_L = self.peers.device, len(self.ownership.fields), inputs.x_L
        lookup_L = torch.arange(len(pooled.slots_L), device=device)
        ones = torch.ones(len(lookup_L), device=device) if x_L is None else x_L
        if inputs.sample_L is None or inputs.piece_L is None or inputs.offsets_OB is None:
            offsets = torch.arange(fields * samples + 1, device=device)
            return Lookups(pooled.slots_L, lookup_L % samples, lookup_L // samples, ones, offsets)
        return Lookups(pooled.slots_L, inputs.sample_L, inputs.piece_L, ones, inputs.offsets_OB)

    def _read_only(self, batch: pa.Table, home: Home) -> tuple[Shard, Any]:
        inputs = self._arrived(self._send(batch, False))
        ids_L, mine_L = self._hashed(inputs, home.samples)
        keys = self.table.keys
        pooled = self._pooled_at(keys.find(ids_L, mine_L), inputs, home.samples)
        if not self.decay.pieces:
            return self._made(pooled, inputs, home, None)

        def missed(slots: Tensor) -> Tensor:
            last = keys.last[slots.long().clamp(min=0)].long() & 0xFFFFFFFF
            return self.decay.missed_on(last, self.steps + 1)

        if not self.plan.rows:
            # Rows are only read: what they have missed goes to the numbers that they are multiplied by.
            x_L = missed(pooled.slots_L)
            pooled.places = replace(pooled.places, x_L=x_L if inputs.x_L is None else x_L * inputs.x_L)
        return self._made(pooled, inputs, home, missed)

    def _hashed(self, inputs: Inputs, samples: int) -> tuple[Tensor, Tensor]:
        """Ids, and whether they are owned here."""
        keys_L, piece_L = inputs.keys_L, inputs.piece_L
        ids_L, mine_L = torch.empty_like(keys_L), torch.empty(len(keys_L), dtype=torch.int8, device=keys_L.device)
        id_kernels.ids_of_keys[grid(len(keys_L))](
            keys_L, keys_L if piece_L is None else piece_L, self._salts_O, self._owned_OH, ids_L, mine_L, len(keys_L),
            samples, BUCKETS=BUCKETS, PLAIN=piece_L is None, BLOCK=BLOCK,
        )  # fmt: skip
        return ids_L, mine_L

    def _pooled_at(self, slots_L: Tensor, inputs: Inputs, samples: int) -> Pooled:
        fields = len(self.ownership.fields)
        places = Places(samples, fields, inputs.sample_L, inputs.piece_L, inputs.x_L, inputs.offsets_OB)
        return Pooled(self.table.rows, self.table.keys.ids, slots_L, places, False, False)

    def _inputs(self, samples: int, home: Home) -> Tensor:
        return home.inputs_BM if self.peers.workers == 1 else super()._inputs(samples, home)

    def _home_with(self, inputs: Inputs, samples: int, step: int) -> Home:
        """The slice that what follows the totals runs on, with its dense inputs."""
        start, stop = self._home_of(samples, True)
        everywhere = self.plan.replicated
        return Home(
            start=start,
            stop=stop,
            samples=samples,
            step=step,
            seed=self.run.config.run.seed,
            lanes=self.run.config.train.lanes,
            training=True,
            total=(lambda part: part) if everywhere else partial(self.exchange.sum_over_workers, "batch norm"),
            inputs_BM=inputs.inputs_bM,
        )

    def _follow_decay(self) -> None:
        """Keep on the device what kernels are told of decay."""
        if self._decays != self.decay.pieces:
            self._decays = list(self.decay.pieces)
            pieces = [[first - 1, math.log1p(-share)] for first, share in self._decays]
            self._decay_P2 = sent(torch.tensor(pieces, dtype=torch.float64), self.peers.device)

    def _accept(self, mean: Tensor, loss_b: Tensor, ready: DeviceReady, home: Home) -> float:  # type: ignore[override]
        on_gpu = self.peers.device.type == "cuda"
        host = torch.empty((), dtype=mean.dtype, pin_memory=on_gpu).copy_(mean, non_blocking=True)
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record()
        # The next replay writes over it.
        pending = Pending(host, copied, loss_b.clone(), ready, home)
        before, self._pending = self._pending, pending
        return self._read_loss(before or pending)

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


def _pinned(size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    array: np.ndarray[Any, np.dtype[np.int64]] = torch.empty(size, dtype=torch.int64, pin_memory=True).numpy()
    return array


def _plain(size: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.empty(size, np.int64)
