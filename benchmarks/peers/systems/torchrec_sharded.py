"""TorchRec's sharded EmbeddingBagCollection under DistributedDataParallel's dense part, over gloo.

``table_wise``: a field's tables live on one worker; ids travel there, pooled vectors come back. ``row_wise``: every
table is cut into N runs of rows; pooled parts meet in a reduce-scatter. TorchRec's planner offers no row_wise on CPU,
so the sharding of each table is stated here; on gloo its reduce-scatter is an all-reduce inside. Tables are dealt out
to workers in runs of fields, as DES cuts them.

Dims: F fields, R rows per table, L lookups of a home's field, b samples at home, K numbers per row.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder, ShardedEmbeddingBagCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim import Adagrad, RowWiseAdagrad

from benchmarks.peers.case import EPS, ROWS_RATE, Case, Part
from benchmarks.peers.head import Head, dense_rule
from benchmarks.peers.store import dense_file, names, read_home, write_first

RULES = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": Adagrad}


class Torchrec:
    """One worker's shards and its replica of the head."""

    def __init__(self, case: Case, folder: Path, rank: int, workers: int, sharding: str) -> None:
        self._case = case
        dist.init_process_group("gloo")
        rows_TFL, self._labels_Tb = read_home(case, folder, rank, workers)
        # A batch as TorchRec wants it: ids field by field, and how many each sample has.
        lengths = torch.full((case.fields * case.home,), case.bag, dtype=torch.int32)
        self._batches = [KeyedJaggedTensor(names(case), rows_FL.flatten(), lengths=lengths) for rows_FL in rows_TFL]
        self._bags = _sharded(case, workers, sharding)
        self._load(folder)
        self._head = Head(case)
        self._head.load_state_dict(torch.load(dense_file(case, folder)))
        self._dense = dense_rule(self._head)
        self._forward: nn.Module = DistributedDataParallel(self._head) if workers > 1 else self._head

    def train(self, first: int, count: int) -> None:
        for step in range(first, first + count):
            logits_b = self._forward(self._rows(step))
            loss = binary_cross_entropy_with_logits(logits_b, self._labels_Tb[step])
            self._dense.zero_grad()
            loss.backward()
            self._dense.step()

    @torch.no_grad()
    def score(self) -> Tensor:
        return self._head(self._rows(0))

    def _rows(self, step: int) -> Tensor:
        """Pooled rows [b, F, K] of a home slice."""
        case, pooled = self._case, self._bags(self._batches[step]).wait()
        # Columns come worker by worker: runs of one part's fields each.
        blocks, at = defaultdict(list), 0
        for part, run in itertools.groupby(pooled.keys(), self._part_of):
            length = len(list(run))
            block_bP = pooled.values()[:, at : at + length * part.padded]
            blocks[part].append(block_bP.view(-1, length, part.padded)[:, :, : part.width])
            at += length * part.padded
        joined = [torch.cat(blocks[part], 1) for part in case.parts]
        return torch.cat(joined, 2) if len(joined) > 1 else joined[0]

    def _part_of(self, key: str) -> Part:
        """The part of a pooled vector's name: field@field_part, or field alone where there is one part."""
        parts = {part.name: part for part in self._case.parts}
        return parts[key.rpartition("_")[2]] if "@" in key else self._case.parts[0]

    def _load(self, folder: Path) -> None:
        """First values of the shards that are here."""
        state = self._bags.state_dict()
        for part, (field, name) in itertools.product(self._case.parts, enumerate(names(self._case))):
            for shard in state[f"embedding_bags.{name}_{part.name}.weight"].local_shards():
                first = shard.metadata.shard_offsets[0]
                write_first(self._case, folder, part, field, shard.tensor.detach(), first)

    def facts(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()


def _sharded(case: Case, workers: int, sharding: str) -> ShardedEmbeddingBagCollection:
    """The sharded tables, part by part, each part's fields in order."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(workers))
    bags = EmbeddingBagCollection(
        device=torch.device("meta"),
        tables=[
            EmbeddingBagConfig(
                name=f"{name}_{part.name}",
                embedding_dim=part.padded,
                num_embeddings=case.table_rows,
                feature_names=[name],
                pooling=PoolingType.SUM,
            )
            for part in case.parts
            for name in names(case)
        ],
    )
    shares = {}
    for part in case.parts:
        factor = part.scale if case.rule == "rowwise_adagrad" else 1
        for field, name in enumerate(names(case)):
            table = f"{name}_{part.name}"
            rule = {"lr": ROWS_RATE * factor, "eps": EPS * factor}
            apply_optimizer_in_backward(RULES[case.rule], [bags.embedding_bags[table].weight], rule)
            shares[table] = row_wise() if sharding == "row_wise" else table_wise(field * workers // case.fields)
    sharder = EmbeddingBagCollectionSharder()
    plan = construct_module_sharding_plan(bags, shares, sharder, workers, workers, "cpu")
    return sharder.shard(bags, plan, ShardingEnv.from_process_group(dist.group.WORLD), torch.device("cpu"))


def build(case: Case, folder: Path, rank: int, workers: int, sharding: str) -> Torchrec:
    """One worker."""
    return Torchrec(case, folder, rank, workers, sharding)
