"""One worker: its rows, its replica of the dense part, and the synchronous step.

    batch -> lookups -> slots            (prefetch thread)
          -> rows -> partials -> exchange -> finish, towers, loss at home
          <- row update <- gradients of rows <- exchange <- dense gradients in one sum

Dims: G samples of the batch, b of the home slice, L lookups, U unique rows, K numbers per row, M dense inputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from des_core import log
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.manifest import Manifest, Shape
from des_core.config import Config
from des_core.contracts import LABEL, TIME, Dataset, Reference
from des_core.data.feed.batches import Lookups, Ownership, Stream, dense_values
from des_core.data.feed.prefetch import Pause
from des_core.engine.dense_layers import Home
from des_core.engine.device.support import sent, why_not
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.exchange import Exchange
from des_core.engine.exchange.plan import Link, Traffic, combinations, home_edges, layout, link_of
from des_core.engine.exchange.row_routing import RowRouting, route_rows
from des_core.engine.footprint import Need, champion_rows, need
from des_core.engine.lookup import known_only, shard_of
from des_core.engine.operators import Shard
from des_core.engine.profile import Profile
from des_core.engine.weights import index, saving
from des_core.engine.weights.optimizer import Decay, DenseRule, apply, state_width
from des_core.engine.weights.table import StagedBatch, Table
from des_core.errors import ConfigError, NotFiniteError
from des_core.run import Run

Array = np.ndarray[Any, np.dtype[Any]]
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

NAMED = 5
"""Samples that a refusal names."""
DENSE = "dense layers"
"""What a warm start calls all weights that are no rows."""


class NotFinite(NotFiniteError):
    """A batch's loss is no number; ``positions`` are its culprits' places in the batch."""

    def __init__(self, loss: float, step: int, positions: Sequence[int]) -> None:
        self.step = step
        self.what = f"loss is {loss} at step {step}"
        self.fix = "lower optimizer.*.learning_rate or check numeric fields"
        super().__init__(f"{self.what}; {self.fix}")
        self.positions = positions


@dataclass(frozen=True)
class Ready:
    """A batch whose id side is done."""

    batch: pa.Table
    step: int
    lookups: Lookups
    inverse_L: Array
    staged: StagedBatch
    routing: RowRouting | None
    tables_U: Array
    """Numbers of the tables of the batch's unique ids."""


@dataclass(frozen=True)
class StepPause(Pause):
    """A pause before a step, and the day that begins there."""

    day: int | None = None


class Worker:
    """The engine of one process, for training and for scoring.

    Args:
        run: the pinned run.
        peers: the other workers.
    """

    lookahead = 1
    """Batches that are made ready in advance, and threads that read them."""

    def __init__(self, run: Run, peers: Collectives) -> None:
        config = run.config
        self.run, self.peers = run, peers
        self.dataset = Dataset.load(run.dataset)
        open_to_rows = config.train.exchange in ("auto", "rows")
        self.placement, base = layout(
            config, self.dataset, run.dataset, peers.workers, open_to_rows, champion_rows(run)
        )
        self.model, self._base = base.model, base
        self.dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
        self.model.to(peers.device, self.dtype)
        if peers.device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = config.train.precision == "tf32"
        self.dense = DenseRule(config.optimizer.dense, self.model.parameters())
        self.table = self._make_table(config, state_width(config.optimizer.rows.name, self.model.row_width))
        self.decay = Decay()
        self.ownership = Ownership(self.dataset.row_fields, self.placement.owned(peers.rank))
        self.profile = Profile(peers.device, lambda: peers.spent_s)
        peers.inside = self.profile.exchange
        deep = [number for number in self.ownership.indices if number < base.fields]
        self._wide = len(self.ownership.indices) - len(deep)
        self._fields_O = torch.tensor(deep, dtype=torch.int64, device=peers.device)
        self._sent = np.zeros(2)
        self.steps = 0
        """Steps that the weights have seen."""
        self.read_bytes = 0
        """Bytes of rows that were read from a checkpoint."""
        self.choose_plan()

    def _make_table(self, config: Config, zeros: int) -> Table:
        settings, device = config.table, self.peers.device
        bare = self._tables_without_factors
        return Table(
            self.model.row_width, zeros, config.run.seed, config.model.init, settings, device, self.dtype, bare
        )

    @property
    def _tables_without_factors(self) -> Array:
        """Numbers of the tables whose rows only the linear part reads."""
        wide = {field.table for field in self.dataset.row_fields if field.wide}
        return np.array([number for number, table in enumerate(self.placement.tables) if table in wide], np.int64)

    def choose_plan(self, link: Link | None = None, chosen: dict[str, Any] | None = None) -> None:
        """Choose the plan: the cheapest over a link, or one that was chosen before."""
        settings = self.run.config.train
        plans = combinations(
            self._base, settings.batch, settings.exchange, settings.upper, link_of(self.run.config) or link
        )
        self.plan = next((plan for plan in plans if plan.chosen == chosen), plans[0])
        self.exchange = Exchange(self.plan, self.peers)

    def need(self) -> Need:
        """Memory that each worker is predicted to need."""
        known_rows = champion_rows(self.run)
        return need(self.run.config, self.dataset, self.placement, self.model, known_rows)

    @property
    def shape(self) -> Shape:
        """What a checkpoint must have been written for."""
        return Shape(
            **self.run.config.weights_form,
            fields=tuple(field.name for field in self.dataset.fields),
            tables=tuple(self.placement.tables),
        )

    def load(self, reference: Reference) -> Manifest:
        """Take over a checkpoint's weights and optimizer state."""
        manifest = manifests.read(reference, self.shape)
        owner_TH, rank = self.placement.owner_TH, self.peers.rank
        self.read_bytes = saving.load_rows(reference, manifest, self.table, owner_TH, rank)
        saving.load_dense(reference, manifest, self.model, self.dense)
        self.decay = Decay(manifest.trainer["decays"])
        self.steps = manifest.trainer["step"]
        return manifest

    def warm_start(self, reference: Reference, kept: set[str]) -> tuple[Manifest, list[str]]:
        """Take over a champion's weights and state, as far as they fit: its manifest, and what starts fresh instead.

        Args:
            kept: fields that mean the same to both.
        """
        manifest = manifests.read(reference)
        its, rank = manifest.shape, self.peers.rank
        changed = {field.table for field in self.dataset.row_fields if field.name not in kept}
        fresh = [f"rows of {table}" for table in self.placement.tables if table in changed or table not in its.tables]
        names = {table: number for number, table in enumerate(self.placement.tables) if table not in changed}
        taken = np.array([names.get(table, -1) for table in its.tables], np.int64)
        owner_TH = self.placement.owner_TH
        self.read_bytes = saving.load_rows(reference, manifest, self.table, owner_TH, rank, taken)
        self.decay, self.steps = Decay(manifest.trainer["decays"]), manifest.trainer["step"]
        if its.fields == self.shape.fields and not fresh and kept >= set(its.fields):
            saving.load_dense(reference, manifest, self.model, self.dense)
        else:
            fresh.append(DENSE)
        return manifest, fresh

    def stream(self, split: str, extra: tuple[str, ...] = (), shuffle: bool = False) -> Stream:
        """A split's batches, with the columns this worker needs."""
        seed = self.run.config.run.seed if shuffle else None
        inputs = [field.name for field in self.dataset.dense_fields]
        columns = [*self.ownership.columns, *inputs, LABEL, *extra]
        return Stream(self.run.dataset, split, columns, seed, self.lookahead)

    def ready(
        self, batches: Iterator[pa.Table], step: int, day: int | None, due: Callable[[int], bool]
    ) -> Iterator[Ready | StepPause]:
        """Batches with their id side done, and pauses, for the prefetch thread.

        Args:
            step: steps done before.
            day: the newest day of these, None where days do not matter or none has begun.
            due: whether something is to be done in a pause after a step.
        """
        days = bool(self.run.config.table.idle_days)
        zone = ZoneInfo(self.run.config.source.timezone)
        while True:
            with self.profile.phase("read"):
                batch = next(batches, None)
            if batch is None:
                return
            # A batch belongs to the day of its newest sample.
            newest = day_of(pc.max(batch.column(TIME)).as_py(), zone) if days else None
            new_day = newest if newest is not None and (day is None or newest > day) else None
            if due(step) or new_day is not None:
                yield StepPause(day=new_day)
            day = new_day if new_day is not None else day
            step += 1
            yield self._make_ready(batch, step)

    def _make_ready(self, batch: pa.Table, step: int) -> Ready:
        with self.profile.phase("decode"):
            lookups = self.ownership.lookups(batch)
        with self.profile.phase("index"):
            ids_U, inverse_L, first_U, counts_U = index.dedupe(lookups.ids)
            tables_U = self.ownership.table_of_piece[lookups.piece[first_U]].astype(np.uint16)
            staged = self.table.stage(ids_U, tables_U, counts_U, step)
            lookups = known_only(lookups, inverse_L, staged.slots_U)
            sent = self._route_rows(lookups, inverse_L, batch.num_rows)
        return Ready(batch, step, lookups, inverse_L, staged, sent, tables_U)

    def _route_rows(self, lookups: Lookups, inverse_L: Array, samples: int) -> RowRouting | None:
        if not self.plan.rows:
            return None
        edges = home_edges(samples, self.peers.workers)
        return route_rows(inverse_L, lookups.sample, lookups.piece, lookups.x, edges, len(self.ownership.fields))

    def step(self, ready: Ready, rate_scale: float) -> float:
        """Train on one global batch; its mean loss, known to every worker before any weight moves.

        Args:
            rate_scale: factor of both learning rates.

        Raises:
            UserError: the loss is not finite.
        """
        profile, settings = self.profile, self.run.config.optimizer
        home = self._home(ready.batch, ready.step)
        rate = settings.rows.learning_rate * rate_scale
        self.decay.record(ready.step, rate * settings.rows.weight_decay)
        with profile.phase("gather"):
            shard = self._read(ready, home)
        with profile.phase("partial"), self._half():
            totals = self._totals(shard, home, ready.routing)
        with profile.phase("head"):
            with self._half():
                logits_b = self.model(totals, home)
            loss_b = self._losses(logits_b.to(self.dtype), ready.batch, home)
            loss = loss_b.sum() / home.samples / (self.peers.workers if self.plan.replicated else 1)
        with profile.phase("backward"):
            self.dense.zero_gradients()
            loss.backward()
            self._without_factors(shard, ready)
            summed, squares = self._sum_dense_gradients(loss.detach(), self._row_squares(shard))
            mean = self._accept(summed, loss_b.detach(), ready, home)
        with profile.phase("update"), torch.no_grad():
            if squares is not None:
                self._clip(shard, squares)
            self._update_dense(settings.dense.learning_rate * rate_scale)
            self._update_rows(shard, ready, rate)
        if ready.routing is not None:
            self._sent += [
                sizes.sum() - sizes[self.peers.rank] for sizes in (ready.routing.rows_N, ready.routing.message_N)
            ]
        profile.end_step()
        self.steps = ready.step
        return mean

    def take_traffic(self) -> Traffic:
        """The total that ``rows`` sent to other homes in the steps since the last call."""
        rows, integers = self._sent.tolist()
        self._sent = np.zeros(2)
        return Traffic(rows, integers)

    @torch.no_grad()
    def score(self, batch: pa.Table) -> Tensor:
        """Probabilities (rating: predictions) [b] of the home slice; inserts nothing."""
        home = self._home(batch, None)
        shard, routing = self._read_only(batch, home)
        self.model.eval()
        with self._half():
            logits_b = self.model(self._totals(shard, home, routing), home).to(self.dtype)
        self.model.train()
        return torch.sigmoid(logits_b) if self.dataset.task == "click" else logits_b

    def _read(self, ready: Ready, home: Home) -> Shard:
        """The shard of a batch, whose rows are a leaf that gathers gradients; new rows are in the table by now."""
        self.table.commit(ready.staged)
        rows_UK = self._gather(ready.staged.slots_U)
        self._catch_up(rows_UK, ready.staged.previous_U, ready.step)
        return self._shard(ready.lookups, ready.inverse_L, rows_UK.requires_grad_(), ready.batch.num_rows, home)

    def _read_only(self, batch: pa.Table, home: Home) -> tuple[Shard, RowRouting | None]:
        """The shard of a batch that is scored, and what ``rows`` sends of it."""
        lookups = self.ownership.lookups(batch)
        ids_U, inverse_L, _, _ = index.dedupe(lookups.ids)
        found_U = self.table.find(ids_U)
        lookups = known_only(lookups, inverse_L, found_U)
        rows_UK = self._gather(found_U)
        if self.decay.pieces:
            self._catch_up(rows_UK, self.table.last[np.maximum(found_U, 0)], self.steps + 1)
        shard = self._shard(lookups, inverse_L, rows_UK, batch.num_rows, home)
        return shard, self._route_rows(lookups, inverse_L, batch.num_rows)

    def _home(self, batch: pa.Table, step: int | None) -> Home:
        """The slice that what follows the totals runs on; all samples where that is replicated."""
        samples = batch.num_rows
        everywhere = self.plan.replicated and step is not None
        start, stop = (0, samples) if everywhere else self._slice(samples)
        inputs = dense_values(batch.slice(start, stop - start), self.dataset.dense_fields)
        return Home(
            start=start,
            stop=stop,
            samples=samples,
            step=step or 0,
            seed=self.run.config.run.seed,
            lanes=self.run.config.train.lanes,
            training=step is not None,
            total=(lambda part: part) if everywhere else partial(self.exchange.sum_over_workers, "batch norm"),
            inputs_BM=sent(torch.from_numpy(inputs), self.peers.device).to(self.dtype),
        )

    def _slice(self, samples: int) -> tuple[int, int]:
        edges = home_edges(samples, self.peers.workers)
        return edges[self.peers.rank], edges[self.peers.rank + 1]

    def _gather(self, slots_U: Array) -> Tensor:
        """A copy of the rows [U, K] of slots; of an unseen id any row."""
        rows_SK = self.table.rows_SK
        if not len(rows_SK):
            return rows_SK.new_zeros(len(slots_U), rows_SK.shape[1])
        return rows_SK.index_select(0, torch.from_numpy(np.maximum(slots_U, 0)).to(self.peers.device))

    def _catch_up(self, rows_UK: Tensor, previous_U: Array, step: int) -> None:
        """Apply the decay of the steps before ``step`` in which rows were not looked up."""
        if self.decay.pieces:
            # A row born in this step missed nothing.
            factors_U = self.decay.missed(np.minimum(previous_U, step - 1), step)
            rows_UK *= torch.from_numpy(factors_U).to(rows_UK)[:, None]

    def _shard(self, lookups: Lookups, inverse_L: Array, rows_UK: Tensor, samples: int, home: Home) -> Shard:
        shard = shard_of(lookups, inverse_L, rows_UK, samples, self._fields_O, self._inputs(samples, home), self._wide)
        return replace(self.plan.with_pooling(shard), total=self.exchange.sum_over_workers)

    def _inputs(self, samples: int, home: Home) -> Tensor:
        """Dense inputs [G, M] of all samples, zero where their home is elsewhere."""
        start, stop = self._slice(samples)
        own_bM = home.inputs_BM[start - home.start : stop - home.start]
        inputs_GM = own_bM.new_zeros(samples, own_bM.shape[1])
        inputs_GM[start:stop] = own_bM
        return inputs_GM

    def _totals(self, shard: Shard, home: Home, sent: RowRouting | None) -> dict[str, Tensor]:
        if self.plan.replicated and home.training:
            return self.exchange.totals_everywhere(shard)
        return self.exchange.totals(shard, home.inputs_BM, sent)

    def _losses(self, logits_b: Tensor, batch: pa.Table, home: Home) -> Tensor:
        """The loss of each sample [b]."""
        labels = batch.column(LABEL).to_numpy()[home.start : home.stop]
        labels_b = sent(torch.from_numpy(np.array(labels)), logits_b.device).to(logits_b)
        rule = binary_cross_entropy_with_logits if self.dataset.task == "click" else mse_loss
        return rule(logits_b, labels_b, reduction="none")

    def _half(self) -> contextlib.AbstractContextManager[Any]:
        """Under train.precision = "bf16", matrix products of 16-bit numbers; sums, rows and weights keep theirs."""
        if self.run.config.train.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.peers.device.type, torch.bfloat16)

    def _accept(self, mean: Tensor, loss_b: Tensor, ready: Ready, home: Home) -> float:
        """The mean loss, if it is finite: reading it is the step's one wait for the device, before any weight moves."""
        value = float(mean)
        if not math.isfinite(value):
            self._refuse(value, loss_b, ready, home)
        return value

    def settle(self) -> None:
        """Wait until the loss of every step is known to be finite.

        Raises:
            UserError: that of the last step is not.
        """

    def _update_dense(self, rate: float) -> None:
        self.dense.step(rate)

    def _without_factors(self, shard: Shard, ready: Ready) -> None:
        """Leave the factors of rows that only the linear part reads at zero, where they were born."""
        if self._wide and shard.rows_UK.grad is not None:
            bare_U = np.flatnonzero(np.isin(ready.tables_U, self._tables_without_factors))
            shard.rows_UK.grad[torch.from_numpy(bare_U).to(self.peers.device), 1:] = 0

    def _row_squares(self, shard: Shard) -> Tensor | None:
        """The sum of squares [1] of the gradients of the rows owned here, complete by now; None: nothing is clipped."""
        if not self.plan.clips:
            return None
        gradient_UK = shard.rows_UK.grad
        return shard.rows_UK.new_zeros(1) if gradient_UK is None else gradient_UK.square().sum().reshape(1)

    def _clip(self, shard: Shard, squares: Tensor) -> None:
        """Scale all gradients down to ``max_grad_norm``, as torch.nn.utils.clip_grad_norm_ of one dense model would.

        Args:
            squares: those of all rows' gradients, over all workers.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.sqrt(squares.sum() + sum(gradient.square().sum() for gradient in gradients))
        scale = (self.run.config.train.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient.mul_(scale)
        self._scale_rows(shard, scale)

    def _scale_rows(self, shard: Shard, scale: Tensor) -> None:
        if shard.rows_UK.grad is not None:
            shard.rows_UK.grad.mul_(scale)

    def _sum_dense_gradients(self, loss: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Complete all dense gradients in one sum over workers; the batch's mean loss, and ``squares`` of all workers.

        Where what follows the totals is replicated, every worker's gradient of it is 1/N of the whole.
        """
        workers, summed = self.peers.workers, set(self.plan.summed)
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        parts = [gradients[name] for name in gradients if name in summed]
        for name in gradients.keys() - summed:
            gradients[name] *= workers
        sent = {"dense gradients": torch.cat([part.reshape(-1) for part in parts])} if parts else {}
        numbers = [] if self.plan.replicated else [loss.reshape(1)]
        numbers += [] if squares is None else [squares]
        if numbers:
            sent["metrics"] = torch.cat(numbers)
        total = self.peers.all_reduce(sent, "backward") if sent else {}
        mean = loss * workers if self.plan.replicated else total["metrics"][0]
        if parts:
            pieces = total["dense gradients"].split([part.numel() for part in parts])
            for part, piece in zip(parts, pieces, strict=True):
                part.copy_(piece.view_as(part))
        return mean, None if squares is None else total["metrics"][-1:]

    def _update_rows(self, shard: Shard, ready: Ready, rate: float) -> None:
        rows_UK, gradient_UK, found_U = shard.rows_UK, shard.rows_UK.grad, ready.staged.slots_U
        if gradient_UK is None:
            return
        slots_U = torch.from_numpy(found_U).to(self.peers.device)
        if (found_U < 0).any():
            seen = slots_U >= 0
            slots_U, gradient_UK, rows_UK = slots_U[seen], gradient_UK[seen], rows_UK[seen]
        self.table.keep(found_U)
        rule, rows_SK = self.run.config.optimizer.rows, self.table.rows_SK
        if self.decay.pieces:
            rows_SK.index_copy_(0, slots_U, rows_UK.detach())
        apply(rule, rows_SK, self.table.state_SZ, slots_U, gradient_UK, ready.step, rate)

    def _refuse(self, mean: float, loss_b: Tensor, ready: Ready, home: Home) -> None:
        """Raise the error that names the samples whose loss is not finite, the same on every worker."""
        named = torch.zeros(self.peers.workers, NAMED, dtype=torch.float64, device=self.peers.device)
        bad = (~torch.isfinite(loss_b)).nonzero()[:NAMED, 0]
        named[self.peers.rank, : len(bad)] = (bad + home.start + 1).double()
        with self.peers.uncounted():
            found = self.peers.all_reduce({"named": named})["named"].flatten().tolist()
        raise NotFinite(mean, ready.step, sorted({int(place) - 1 for place in found if place})[:NAMED])


def day_of(micros: int, zone: ZoneInfo) -> int:
    """The day of an event time in the logs' time zone, in days since 1970."""
    return (EPOCH + timedelta(microseconds=micros)).astimezone(zone).toordinal() - EPOCH.toordinal()


def worker_of(run: Run, peers: Collectives) -> Worker:
    """The worker that the config asks for, as far as the device allows it."""
    if run.config.train.kernels == "torch":
        return Worker(run, peers)
    reason = why_not(peers.device)
    if reason:
        if run.config.table.rows == "bf16":
            raise ConfigError(f"table.rows = 'bf16' needs the Triton kernels, and {reason}; set it to 'fp32'")
        if peers.rank == 0:
            log.emit("kernels", use="torch", why=reason)
        return Worker(run, peers)
    from des_core.engine.device.worker import DeviceWorker

    return DeviceWorker(run, peers)
