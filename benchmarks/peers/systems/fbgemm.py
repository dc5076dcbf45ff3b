"""FBGEMM's table-batched embeddings under a plain torch head: the fastest single process that we know of.

Rows are updated inside the backward pass. Dims: F fields, L lookups of a field, k factors, K numbers per row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.peers.case import EPS, ROWS_RATE, Case
from benchmarks.peers.head import Head, dense_rule
from benchmarks.peers.store import dense_file, read_home, write_first

RULES = {"rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "adagrad": EmbOptimType.EXACT_ADAGRAD}


class Fbgemm:
    """One process."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case = case
        rows_TFL, self._labels_TG = read_home(case, folder, 0, 1)
        self._rows_TL = [rows_FL.flatten() for rows_FL in rows_TFL]
        self._offsets = torch.arange(0, case.fields * case.batch * case.bag + 1, case.bag)
        self._tables = [
            SplitTableBatchedEmbeddingBagsCodegen(
                [(case.table_rows, part.padded, EmbeddingLocation.HOST, ComputeDevice.CPU)] * case.fields,
                optimizer=RULES[case.rule],
                learning_rate=ROWS_RATE * (part.scale if case.rule == "rowwise_adagrad" else 1),
                eps=EPS * (part.scale if case.rule == "rowwise_adagrad" else 1),
                pooling_mode=PoolingMode.SUM,
                bounds_check_mode=BoundsCheckMode.NONE,
            )
            for part in case.parts
        ]
        for part, tables in zip(case.parts, self._tables, strict=True):
            for field, weights in enumerate(tables.split_embedding_weights()):
                write_first(case, folder, part, field, weights.detach())
        self._head = Head(case)
        self._head.load_state_dict(torch.load(dense_file(case, folder)))
        self._dense = dense_rule(self._head)

    def train(self, first: int, count: int) -> None:
        for step in range(first, first + count):
            loss = binary_cross_entropy_with_logits(self._logits(step), self._labels_TG[step])
            self._dense.zero_grad()
            loss.backward()
            self._dense.step()

    @torch.no_grad()
    def score(self) -> Tensor:
        return self._logits(0)

    def _logits(self, step: int) -> Tensor:
        pooled = [
            tables(self._rows_TL[step], self._offsets).view(-1, self._case.fields, part.padded)[:, :, : part.width]
            for part, tables in zip(self._case.parts, self._tables, strict=True)
        ]
        return self._head(torch.cat(pooled, 2) if len(pooled) > 1 else pooled[0])

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def build(case: Case, folder: Path, rank: int, workers: int) -> Fbgemm:
    """The only process."""
    return Fbgemm(case, folder)
