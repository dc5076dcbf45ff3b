"""The same model as plain torch trains it: one table with every row, one process, torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from des_core.config import Config
from des_core.contracts import LABEL, Dataset, Reference, deep_names
from des_core.data.feed.batches import Stream, dense_values, everything
from des_core.engine.dense_layers import Home
from des_core.engine.models import Model, build
from des_core.engine.operators import Shard, totals_alone
from des_core.engine.weights.table import first_values


class DenseModel(nn.Module):
    """A model whose rows are one parameter [R + 1, K]; the last one, which no value owns, is never read."""

    def __init__(self, config: Config, dataset: Dataset, batches: Iterable[pa.Table]) -> None:
        super().__init__()
        self.model: Model = build(config.model, deep_names(dataset.fields), len(dataset.dense_fields), config.run.seed)
        self.model.double()
        self._dataset, self._all = dataset, everything(dataset.row_fields)
        seen = [self._all.lookups(batch) for batch in batches]
        self._ids = np.unique(np.concatenate([lookups.ids for lookups in seen]))
        is_wide = np.array([field.wide for field in dataset.row_fields])
        wide = np.concatenate([lookups.ids[is_wide[lookups.piece]] for lookups in seen])
        rows = torch.zeros(len(self._ids) + 1, self.model.row_width, dtype=torch.float64)
        factors = first_values(self._ids, self.model.factors, config.run.seed, config.model.init)
        rows[:-1, 1:] = torch.from_numpy(factors)
        # A wide field's rows have a linear weight alone: their factors are zero, and get no gradient.
        self._wide = len(dataset.row_fields) - len(deep_names(dataset.fields))
        keep_R1 = torch.ones(len(rows), 1, dtype=torch.float64)
        keep_R1[:-1][np.isin(self._ids, wide)] = 0
        self._mask_RK = torch.cat([torch.ones_like(keep_R1), keep_R1.expand(-1, rows.shape[1] - 1)], 1)
        self.rows_RK = nn.Parameter(rows * self._mask_RK)

    def forward(self, batch: pa.Table) -> Tensor:
        lookups = self._all.lookups(batch)
        place = np.searchsorted(self._ids, lookups.ids)
        known = self._ids[np.minimum(place, len(self._ids) - 1)] == lookups.ids
        inputs_BM = torch.from_numpy(dense_values(batch, self._dataset.dense_fields)).double()
        shard = Shard(
            self.rows_RK * self._mask_RK,
            torch.from_numpy(np.where(known, place, len(self._ids))),
            torch.from_numpy(lookups.sample),
            torch.from_numpy(lookups.piece),
            torch.from_numpy(np.where(known, lookups.x, 0)).double(),
            batch.num_rows,
            torch.arange(len(deep_names(self._dataset.fields))),
            inputs_BM,
            wide=self._wide,
        )
        home = Home(0, batch.num_rows, batch.num_rows, training=self.training, inputs_BM=inputs_BM)
        logits_B: Tensor = self.model(totals_alone(self.model.by_name, shard), home)
        return logits_B


def dense_logits(
    config: Config,
    reference: Reference,
    steps: int,
    rules: Callable[[list[Tensor], list[Tensor]], list[torch.optim.Optimizer]],
    max_norm: float = 0.0,
) -> list[float]:
    """The test part's logits after ``steps`` steps of one epoch.

    Args:
        rules: optimizers of the rows and of the dense weights.
        max_norm: of all gradients together, 0: any.
    """
    dataset = Dataset.load(reference)
    columns = [*everything(dataset.row_fields).columns, *(field.name for field in dataset.dense_fields), LABEL]

    def batches(split: str, seed: int | None) -> Iterable[pa.Table]:
        return Stream(reference, split, columns, seed).batches(config.train.batch)

    seed = config.run.seed if config.train.shuffle else None
    model = DenseModel(config, dataset, islice(batches("train", seed), steps))
    labels: Any = np.concatenate([batch.column(LABEL).to_numpy() for batch in batches("train", None)], dtype=np.float64)
    with torch.no_grad():
        model.model.bias.fill_(float(np.log(labels.mean() / (1 - labels.mean()))))
    optimizers = rules([model.rows_RK], list(model.model.parameters()))
    for batch in islice(batches("train", seed), steps):
        target_B = torch.tensor(batch.column(LABEL).to_numpy(), dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        binary_cross_entropy_with_logits(model(batch), target_B).backward()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for optimizer in optimizers:
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return [logit for batch in batches("test", None) for logit in model(batch).tolist()]
