"""What a group of test workers can be asked to do."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import BlockWriter
from des_core.config import parse_config
from des_core.contracts import Reference
from des_core.engine.evaluator import evaluate, predict
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.exchange import Exchange
from des_core.engine.exchange.plan import Plan, home_edges
from des_core.engine.exchange.row_routing import route_rows
from des_core.engine.models import Model
from des_core.engine.operators import Operator, Shard
from des_core.engine.operators.attention import FieldAttention
from des_core.engine.operators.bilinear import BilinearProducts
from des_core.engine.operators.cross import CrossNetwork
from des_core.engine.operators.cross_v2 import CrossNetworkV2
from des_core.engine.operators.fc import FullyConnected
from des_core.engine.operators.fm import FactorizationMachine
from des_core.engine.operators.fwfm import FieldWeightedMachine
from des_core.engine.operators.gated_streams import GatedStreams
from des_core.engine.operators.inner_product import InnerProducts
from des_core.engine.operators.lr import Linear
from des_core.engine.operators.mask_blocks import MaskBlocks
from des_core.engine.trainer import Trainer
from des_core.engine.weights import saving
from des_core.run import Run, pin


def _run(config: str, dataset: str) -> Run:
    return pin(parse_config(config), Reference.parse(dataset))


def train(
    peers: Collectives,
    config: str,
    dataset: str,
    resume: bool = False,
    dump: bool = False,
    unpruned: bool = False,
    deltas: bool = False,
    full_disk_at: int = 0,
) -> dict[str, Any]:
    """Train to the end; on worker 0 the last weights' test logits; dumped, the rows owned here by id.

    Args:
        unpruned: keep all checkpoints.
        deltas: every checkpoint that can be a delta is one.
        full_disk_at: the last worker cannot write its rows at this step's checkpoint.
    """
    peers.ledger.clear()
    trainer = Trainer(_run(config, dataset), peers)
    if resume:
        trainer.resume()
    prune, share, add_rows = manifests.prune, saving.DELTA_SHARE, BlockWriter.add_rows

    def no_room(writer: BlockWriter, *block: Any) -> None:
        if f"{full_disk_at:010d}" in writer._folder and peers.rank == peers.workers - 1:
            raise OSError(errno.ENOSPC, "No space left on device", writer._folder)
        add_rows(writer, *block)

    if unpruned:
        manifests.prune = lambda folder, keep: None
    if deltas:
        saving.DELTA_SHARE = 1e9
    if full_disk_at:
        BlockWriter.add_rows = no_room  # type: ignore[method-assign]
    trainer.train()
    manifests.prune, saving.DELTA_SHARE = prune, share
    BlockWriter.add_rows = add_rows  # type: ignore[method-assign]
    scores = torch.from_numpy(predict(trainer.worker, "test"))
    table = trainer.worker.table
    answer = {"logits": torch.logit(scores).tolist(), "rows": table.used, "step": trainer.at.step}
    if dump:
        answer["bias"] = float(trainer.worker.model.bias)
        answer["table"] = dict(zip(map(str, table.ids.tolist()), table.rows_SK.tolist(), strict=True))
        answer["statistics"] = table.statistics()
    return answer


def slow_save(peers: Collectives, config: str, dataset: str, seconds: float) -> None:
    """Train to the end, worker 1's marker being late, and a stale one in its place."""
    run = _run(config, dataset)
    real = storage.write_json

    def late(uri: str, value: Any) -> str:
        if uri.endswith("saved-00001.json"):
            real(uri, value | {"save": "stale", "written": value["written"] | {"directory": "0" * 64}})
            time.sleep(seconds)
        return real(uri, value)

    storage.write_json = late
    try:
        Trainer(run, peers).train()
    finally:
        storage.write_json = real


def report(peers: Collectives, config: str, dataset: str) -> None:
    """Write the report of a trained run."""
    evaluate(_run(config, dataset), peers, False)


FACTORS, INPUTS = 3, 2


def build_operator(name: str, fields: int) -> Operator:
    """A small operator of each kind, the same wherever it is built."""
    sizes = (fields, FACTORS, INPUTS)
    kinds: dict[str, Callable[[], Operator]] = {
        "lr": Linear,
        "fm": lambda: FactorizationMachine(FACTORS),
        "fc": lambda: FullyConnected(*sizes, 5, bias=True),
        "cross": lambda: CrossNetwork(*sizes, 4, 1),
        "cross stacked": lambda: CrossNetwork(*sizes, 4, 3),
        "cross v2": lambda: CrossNetworkV2(*sizes, 3, 2, 4, bias=True, line="cross v2"),
        "cross v2 full": lambda: CrossNetworkV2(*sizes, 3, 0, 4, bias=True, line="cross v2 full"),
        "gated cross": lambda: CrossNetworkV2(*sizes, 3, 2, 4, bias=True, line="gated cross", gated=True),
        "gated cross full": lambda: CrossNetworkV2(*sizes, 3, 0, 4, bias=True, line="gated cross full", gated=True),
        "streams": lambda: GatedStreams(*sizes, (3, 2), ((), ()), 4, bias=True, line="streams"),
        "streams by fields": lambda: GatedStreams(
            *sizes, (3, 2), ((1,), (6, 2)), 4, bias=True, line="streams by fields"
        ),
        "masks": lambda: MaskBlocks(*sizes, 2, 4, 0.5, stacked=False),
        "masks stacked": lambda: MaskBlocks(*sizes, 2, 4, 0.5, stacked=True),
        "bilinear": lambda: BilinearProducts(*sizes, 3),
        "fwfm": lambda: FieldWeightedMachine(fields),
        "products": lambda: InnerProducts(*sizes, (4,)),
        "attention": lambda: FieldAttention(*sizes, 2, 2, 3),
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = kinds[name]().double()
        for parameter in layer.parameters():
            # First values of zero or one would hide mistakes.
            torch.nn.init.normal_(parameter, std=0.4)
    return layer


def operator_data(samples: int, fields: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [F, K], x [B, F] of one lookup per field, and dense inputs [B, M]."""
    generator = torch.Generator().manual_seed(samples * 100 + fields)
    return (
        torch.randn(fields, 1 + FACTORS, generator=generator, dtype=torch.float64),
        torch.randn(samples, fields, generator=generator, dtype=torch.float64).float().double(),
        torch.randn(samples, INPUTS, generator=generator, dtype=torch.float64),
    )


def operator(peers: Collectives, name: str, kind: str, samples: int, owners: list[int]) -> dict[str, Any]:
    """One operator over random features, one per field, split by ``owners[field]``.

    Outputs of the home slice (replicated: of all samples), and the gradient of all rows and dense weights when
    each output is weighted by a fixed number.
    """
    fields = len(owners)
    rows_FK, x_BF, inputs_BM = operator_data(samples, fields)
    owned = [[f for f in range(fields) if owners[f] % peers.workers == worker] for worker in range(peers.workers)]
    mine, replicated = owned[peers.rank], kind == "replicated"
    model = Model({name: build_operator(name, fields)}, FACTORS)
    plan = Plan(model, {name: "sum" if replicated else kind}, replicated, fields, owned, 8, 8)
    exchange = Exchange(plan, peers)
    edges = home_edges(samples, peers.workers)
    home = slice(edges[peers.rank], edges[peers.rank + 1])
    at_home_BM = torch.zeros_like(inputs_BM)
    at_home_BM[home] = inputs_BM[home]
    shard = Shard(
        rows_UK=rows_FK[mine].clone().requires_grad_(),
        inverse_L=torch.arange(len(mine)).repeat_interleave(samples),
        sample_L=torch.arange(samples).repeat(len(mine)),
        piece_L=torch.arange(len(mine)).repeat_interleave(samples),
        x_L=x_BF[:, mine].T.reshape(-1),
        samples=samples,
        fields_O=torch.tensor(mine, dtype=torch.int64),
        inputs_BM=at_home_BM,
        total=exchange.sum_over_workers,
    )
    if replicated:
        home = slice(0, samples)
        totals = exchange.totals_everywhere(shard)
    else:
        lookups = (shard.inverse_L, shard.sample_L, shard.piece_L, shard.x_L)
        sent = route_rows(*(t.numpy() for t in lookups), edges, len(mine)) if kind == "rows" else None
        totals = exchange.totals(shard, inputs_BM[home], sent)
    output = model.by_name[name].finish(totals[name])
    weights = torch.cos(torch.arange(samples, dtype=torch.float64))[home]
    (output.flatten(1).sum(1) if output.dim() > 1 else output).mul(weights).sum().div(
        peers.workers if replicated else 1
    ).backward()
    dense = {key: p.grad.tolist() for key, p in model.by_name[name].named_parameters() if p.grad is not None}
    gradient = shard.rows_UK.grad.tolist() if shard.rows_UK.grad is not None else []
    return {"output": output.tolist(), "rows": dict(zip(map(str, mine), gradient, strict=True)), "dense": dense}


def imported(peers: Collectives) -> list[str]:
    """The modules that the worker's process has imported."""
    return list(sys.modules)


CASES = {"train": train, "slow_save": slow_save, "report": report, "operator": operator, "imported": imported}
