"""One nn.Embedding with sparse gradients; with several workers each holds all rows, under DistributedDataParallel.

gloo sums sparse gradients by gathering everybody's ids and values.
Dims: F fields, R rows per table, L lookups, b samples at home, J lookups per field and sample, K numbers per row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers.case import Case
from benchmarks.peers.head import Head, dense_rule, states, update_rows
from benchmarks.peers.store import dense_file, first_factors, read_home


class _Model(nn.Module):
    """Logits ``[b]`` from places in the merged table [F, b * J]."""

    def __init__(self, case: Case, folder: Path) -> None:
        super().__init__()
        self._case = case
        self.rows_RK = nn.Embedding.from_pretrained(_first_rows(case, folder), freeze=False, sparse=True)
        self.head = Head(case)
        self.head.load_state_dict(torch.load(dense_file(case, folder)))

    def forward(self, places_FL: Tensor) -> Tensor:
        case = self._case
        looked_up = self.rows_RK(places_FL).view(case.fields, -1, case.bag, case.width)
        pooled_FbK = looked_up[:, :, 0] if case.bag == 1 else looked_up.sum(2)
        return self.head(pooled_FbK.transpose(0, 1))


class SparseEmbedding:
    """One process of one or of many."""

    def __init__(self, case: Case, folder: Path, rank: int, workers: int) -> None:
        self._case, self._workers = case, workers
        rows_TFL, self._labels_Tb = read_home(case, folder, rank, workers)
        starts_F1 = torch.arange(case.fields)[:, None] * case.table_rows
        self._places_TFL = [rows_FL + starts_F1 for rows_FL in rows_TFL]
        self._model = _Model(case, folder)
        self._state_RZ = torch.zeros(case.fields * case.table_rows, states(case))
        self._dense = dense_rule(self._model.head)
        self._forward: nn.Module = self._model
        if workers > 1:
            dist.init_process_group("gloo")
            # All start from the same weights, so none of the gigabytes must be sent around.
            self._forward = DistributedDataParallel(self._model, init_sync=False, gradient_as_bucket_view=False)

    def train(self, first: int, count: int) -> None:
        weight_RK = self._model.rows_RK.weight
        for step in range(first, first + count):
            loss = binary_cross_entropy_with_logits(self._forward(self._places_TFL[step]), self._labels_Tb[step])
            self._dense.zero_grad()
            weight_RK.grad = None
            loss.backward()
            gradient = weight_RK.grad.coalesce()
            update_rows(self._case, weight_RK.detach(), self._state_RZ, gradient.indices()[0], gradient.values())
            self._dense.step()

    @torch.no_grad()
    def score(self) -> Tensor:
        return self._model(self._places_TFL[0])

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        if self._workers > 1:
            dist.barrier()
            dist.destroy_process_group()


def _first_rows(case: Case, folder: Path) -> Tensor:
    rows_RK = torch.zeros(case.fields * case.table_rows, case.width)
    if case.vector:
        for field in range(case.fields):
            place = slice(field * case.table_rows, (field + 1) * case.table_rows)
            rows_RK[place, case.linear :] = first_factors(case, folder, field)
    return rows_RK


def build(case: Case, folder: Path, rank: int, workers: int) -> SparseEmbedding:
    """One process."""
    return SparseEmbedding(case, folder, rank, workers)
