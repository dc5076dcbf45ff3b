"""One worker: its rows, its replica of the dense part, and the synchronous step.

    batch -> lookups -> slots -> rows -> partials -> exchange -> finish, head, loss at home
          <- row update <- gradients of rows <- exchange <- dense gradients in one sum

Dims: G samples of the batch, b of the home slice, L lookups, U unique rows, K numbers per row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from des_core import storage
from des_core.config import Config, parse_config
from des_core.contracts import LABEL, Dataset, Reference
from des_core.data.batches import Lookups, Ownership, Stream
from des_core.engine import checkpoint, index
from des_core.engine.collectives import Collectives, heartbeat
from des_core.engine.dense import Home
from des_core.engine.exchange import Exchange
from des_core.engine.operators import Shard
from des_core.engine.optimizer import dense_optimizer, state_width, update_rows
from des_core.engine.plan import home_edges, layout
from des_core.engine.table import Table
from des_core.errors import ConfigError, DesError, UserError
from des_core.run import Run, pin


class Worker:
    """The engine of one process, for training and for scoring.

    Args:
        run: the pinned run.
        peers: the other workers.
    """

    def __init__(self, run: Run, peers: Collectives) -> None:
        config = run.config
        self.run, self.peers = run, peers
        self.dataset = Dataset.load(run.dataset)
        self.model, self.placement, self.plan = layout(config, self.dataset, peers.workers)
        self.dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
        self.model.to(peers.device, self.dtype)
        self.dense = dense_optimizer(config.optimizer.dense, self.model.parameters())
        width = self.model.row_width
        zeros = state_width(config.optimizer.rows.name, width)
        self.table = Table(width, zeros, config.run.seed, config.model.init, peers.device, self.dtype)
        self.ownership = Ownership(self.dataset.fields, self.placement.owned(peers.rank))
        self.exchange = Exchange(
            self.model.operators, self.plan.choice, self.plan.owned, len(self.dataset.fields), peers
        )
        self._fields_O = torch.tensor(self.ownership.indices, dtype=torch.int64, device=peers.device)

    @property
    def shape(self) -> checkpoint.Shape:
        """What a checkpoint must have been written for."""
        config = self.run.config
        rows, dense = config.optimizer.rows.name, config.optimizer.dense.name
        return checkpoint.Shape(
            model=config.model.model_dump(mode="json", exclude={"init", "dropout"}),
            optimizer={"rows.name": rows, "dense.name": dense},
            fields=tuple(field.name for field in self.dataset.fields),
            tables=tuple(self.placement.tables),
            precision=config.train.precision,
        )

    def load(self, reference: Reference) -> checkpoint.Manifest:
        """Take over a checkpoint's weights and optimizer state."""
        manifest = checkpoint.read_manifest(reference, self.shape)
        checkpoint.load_rows(reference, manifest, self.table, self.placement.owner_TH, self.peers.rank)
        checkpoint.load_dense(reference, manifest, self.model, self.dense)
        return manifest

    def stream(self, split: str, extra: tuple[str, ...] = (), shuffle: bool = False) -> Stream:
        """A split's batches, with the columns this worker needs."""
        seed = self.run.config.run.seed if shuffle else None
        return Stream(self.run.dataset, split, [*self.ownership.columns, LABEL, *extra], seed)

    def step(self, batch: pa.Table, step: int, rate_scale: float) -> float:
        """Train on one global batch; its mean loss, known to every worker before any weight moves.

        Args:
            step: this step's number, from 1.
            rate_scale: factor of both learning rates.

        Raises:
            UserError: the loss is not finite.
        """
        config = self.run.config
        home = self._home(batch.num_rows, step)
        shard, slots_U = self._shard(batch, training=True)
        shard.rows_UK.requires_grad_()
        logits_b = self.model(self.exchange.totals(shard), home)
        loss = self._loss(logits_b, batch, home)
        self.dense.zero_grad(set_to_none=False)
        loss.backward()
        mean = self._sum_dense_gradients(loss.detach())
        if not math.isfinite(mean):
            raise UserError(f"loss is {mean} at step {step}; lower optimizer.*.learning_rate or check numeric fields")
        for group, settings in zip(self.dense.param_groups, [config.optimizer.dense], strict=True):
            group["lr"] = settings.learning_rate * rate_scale
        self.dense.step()
        self._update_rows(shard, slots_U, step, rate_scale)
        return mean

    @torch.no_grad()
    def score(self, batch: pa.Table) -> Tensor:
        """Probabilities (rating: predictions) [b] of the home slice; inserts nothing."""
        home = self._home(batch.num_rows, None)
        shard, _ = self._shard(batch, training=False)
        self.model.eval()
        logits_b = self.model(self.exchange.totals(shard), home)
        self.model.train()
        return torch.sigmoid(logits_b) if self.dataset.task == "click" else logits_b

    def _home(self, samples: int, step: int | None) -> Home:
        edges = home_edges(samples, self.peers.workers)
        return Home(
            start=edges[self.peers.rank],
            stop=edges[self.peers.rank + 1],
            samples=samples,
            step=step or 0,
            seed=self.run.config.run.seed,
            lanes=self.run.config.train.lanes,
            training=step is not None,
            total=self.exchange.sum_over_workers,
        )

    def _shard(self, batch: pa.Table, training: bool) -> tuple[Shard, Tensor]:
        """The owned lookups of a batch with their rows, and the rows' slots [U]."""
        lookups = self.ownership.lookups(batch)
        ids_U, inverse_L, first_U = index.dedupe(lookups.ids)
        if training:
            tables_U = self.ownership.table_of_piece[lookups.piece[first_U]].astype(np.uint16)
            slots_U = self.table.find_or_insert(ids_U, tables_U)
        else:
            slots_U = self.table.find(ids_U)
        return make_shard(lookups, inverse_L, slots_U, self.table.rows_SK, batch.num_rows, self._fields_O)

    def _loss(self, logits_b: Tensor, batch: pa.Table, home: Home) -> Tensor:
        """This home's share of the batch's mean loss."""
        labels = batch.column(LABEL).to_numpy()[home.start : home.stop]
        labels_b = torch.from_numpy(np.array(labels)).to(logits_b)
        rule = binary_cross_entropy_with_logits if self.dataset.task == "click" else mse_loss
        return rule(logits_b, labels_b, reduction="sum") / home.samples

    def _sum_dense_gradients(self, loss: Tensor) -> float:
        """Complete all dense gradients in one sum over workers; the batch's mean loss."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        total = self.peers.all_reduce({"dense gradients": flat, "metrics": loss.reshape(1)})
        pieces = total["dense gradients"].split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
        return float(total["metrics"])

    @torch.no_grad()
    def _update_rows(self, shard: Shard, slots_U: Tensor, step: int, rate_scale: float) -> None:
        settings = self.run.config.optimizer.rows
        if shard.rows_UK.grad is None:
            return
        state_UZ = self.table.state_SZ.index_select(0, slots_U)
        rate = settings.learning_rate * rate_scale
        rows_UK, state_UZ = update_rows(settings, shard.rows_UK.detach(), shard.rows_UK.grad, state_UZ, step, rate)
        self.table.rows_SK.index_copy_(0, slots_U, rows_UK)
        self.table.state_SZ.index_copy_(0, slots_U, state_UZ)


def make_shard(
    lookups: Lookups,
    inverse_L: np.ndarray,
    slots_U: np.ndarray,
    rows_SK: Tensor,
    samples: int,
    fields_O: Tensor,
) -> tuple[Shard, Tensor]:
    """A shard of rows read from a store, and their slots; unseen ids (slot -1) contribute zero."""
    x_L = lookups.x
    unseen_U = slots_U < 0
    if unseen_U.any():
        x_L = np.where(unseen_U[inverse_L], np.float32(0), x_L)
        slots_U = np.where(unseen_U, 0, slots_U)
    device, dtype = rows_SK.device, rows_SK.dtype
    slots = torch.from_numpy(slots_U).to(device)
    shard = Shard(
        rows_UK=rows_SK.index_select(0, slots),
        inverse_L=torch.from_numpy(inverse_L).to(device),
        sample_L=torch.from_numpy(lookups.sample).to(device),
        piece_L=torch.from_numpy(lookups.piece).to(device),
        x_L=torch.from_numpy(x_L).to(device, dtype),
        samples=samples,
        fields_O=fields_O,
    )
    return shard, slots


def device_of(config: Config) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    wanted = config.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device = 'cuda', but torch sees no GPU here; set it to 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def main(role: Callable[[Run, Collectives, bool], None]) -> None:
    """Entry of a worker process under torchrun: do a role, or leave one line saying why not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="inputs.json of the run")
    parser.add_argument("--dataset", required=True, help="reference of the data manifest")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    try:
        inputs = storage.read_json(arguments.config)
        config = parse_config(json.dumps(inputs["config"]), arguments.config)
        run = pin(config, Reference.parse(arguments.dataset))
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        with heartbeat(partial(_lost, rank)):
            peers = Collectives(device_of(config))
            role(run, peers, arguments.resume)
            peers.close()
    except DesError as error:
        _report(error.exit_code, str(error), rank)
        sys.exit(error.exit_code)


def _lost(rank: int, peer: int, silent_s: float) -> None:
    """A peer's heart stopped: say which, and leave at once, for this process waits in a collective."""
    _report(1, f"worker {peer} has not answered for {silent_s:.0f} s (killed, frozen or cut off)", rank)
    os._exit(1)


def _report(code: int, message: str, rank: int) -> None:
    """Leave the failure for the launcher; the first worker to fail knows the cause best."""
    print(f"worker {rank}: {message}", file=sys.stderr, flush=True)
    path = os.environ.get("DES_ERROR_FILE")
    if path:
        partial_path = f"{path}.{rank}"
        with open(partial_path, "w", encoding="utf-8") as file:
            json.dump({"code": code, "message": message, "worker": rank}, file)
        with contextlib.suppress(FileExistsError):
            os.link(partial_path, path)
        os.remove(partial_path)
