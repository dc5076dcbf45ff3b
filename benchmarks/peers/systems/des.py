"""DES: the engine's own worker, step by step, on batches of its own columns.

Its clock holds what other systems are spared: hashing keys, de-duplicating them, looking them up, making new rows.
As in training, a thread does that for the next batch while the present one trains; it begins anew with each block.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.case import CROSS_LAYERS, Case
from benchmarks.peers.head import Head
from benchmarks.peers.store import config_of, dense_file, names, reference
from des_core.data.feed.batches import BUCKET_BITS, ids_of
from des_core.data.feed.prefetch import ahead
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.plan import Link
from des_core.engine.worker import Ready, Worker
from des_core.run import pin

FILL = 1 << 16
"""Rows made live at once."""


class Des:
    """One worker."""

    def __init__(self, case: Case, folder: Path, rank: int) -> None:
        self._case = case
        self._peers = Collectives(torch.device("cpu"))
        self._worker = Worker(pin(config_of(case, folder), reference(folder)), self._peers)
        self._worker.choose_plan(Link(*self._peers.link()))
        self._batches = list(itertools.islice(self._worker.stream("train").batches(case.batch), case.batches))
        if rank == 0:
            _export(case, self._worker.model.state_dict(), dense_file(case, folder))

    def fill(self) -> None:
        """Make all owned rows live, as if each had been met once before the first step."""
        owner_TH = self._worker.placement.owner_TH
        keys = np.arange(self._case.table_rows)
        for number, name in enumerate(names(self._case)):
            ids = ids_of(keys, name)
            mine = owner_TH[number, ids.view(np.uint64) >> np.uint64(64 - BUCKET_BITS)] == self._peers.rank
            for piece in np.split(ids[mine], range(FILL, int(mine.sum()), FILL)):
                tables = np.full(len(piece), number, np.uint16)
                self._worker.table.commit(self._worker.table.stage(piece, tables, np.ones(len(piece), np.int64), 0))

    def train(self, first: int, count: int) -> None:
        batches = iter(self._batches[first : first + count])
        for item in ahead(self._worker.ready(batches, first, None, lambda step: False)):
            assert isinstance(item, Ready)
            self._worker.step(item, 1.0)

    def score(self) -> Tensor:
        return torch.logit(self._worker.score(self._batches[0]).double())

    def facts(self) -> dict[str, Any]:
        worker = self._worker
        return {
            "sent_bytes": dict(self._peers.ledger.sent_bytes),
            "planned_bytes": worker.plan.predict(self._case.batch),
            "plan": worker.plan.chosen,
            "rows": worker.table.used,
            "ms_per_step": worker.profile.ms_per_step(),
        }

    def close(self) -> None:
        self._peers.close()


def _export(case: Case, weights: dict[str, Tensor], path: Path) -> None:
    """Leave the first dense weights for the others, under the plain head's names."""
    head = Head(case).state_dict()
    for name, weight in weights.items():
        kind, _, rest = name.partition(".")
        if name == "operators.cross.first.weight_FkP":
            flat_DP = weight.flatten(0, 1)
            head["cross_weights"].copy_(flat_DP[:, :CROSS_LAYERS].T)
            head["cross_out"].copy_(flat_DP[:, CROSS_LAYERS])
        elif name == "operators.cross.bias_LD":
            head["cross_biases"].copy_(weight)
        elif name == "operators.fc.first.weight_FkP":
            head["layers.0.weight"].copy_(weight.flatten(0, 1).T)
        elif name == "operators.fc.bias_h":
            head["layers.0.bias"].copy_(weight)
        elif kind == "towers":
            head[_tower(rest.partition(".")[2])].copy_(weight)
        else:
            head[name].copy_(weight)
    torch.save(head, path)


def _tower(name: str) -> str:
    """The plain head's name of a tower's weight: the tower's layers follow a first one."""
    place, _, rest = name.partition(".")
    if place == "first":
        return f"layers.0.{rest}"
    number, _, kind = rest.partition(".")
    return f"layers.{int(number) + 1}.{kind}" if place == "layers" else name


def build(case: Case, folder: Path, rank: int, workers: int) -> Des:
    """One worker."""
    return Des(case, folder, rank)
