"""What a group of test workers can be asked to do."""

from __future__ import annotations

from typing import Any

import torch

from des_core.config import parse_config
from des_core.contracts import Reference
from des_core.engine.collectives import Collectives
from des_core.engine.evaluator import evaluate, predict
from des_core.engine.exchange import Exchange
from des_core.engine.operators import Operator, Shard
from des_core.engine.operators.fc import FullyConnected
from des_core.engine.operators.fm import FactorizationMachine
from des_core.engine.operators.lr import Linear
from des_core.engine.plan import home_edges
from des_core.engine.trainer import Trainer
from des_core.run import Run, pin


def _run(config: str, dataset: str) -> Run:
    return pin(parse_config(config), Reference.parse(dataset))


def train(peers: Collectives, config: str, dataset: str, resume: bool = False) -> dict[str, Any]:
    """Train to the end; on worker 0 the last weights' test logits."""
    peers.ledger.clear()
    trainer = Trainer(_run(config, dataset), peers)
    if resume:
        trainer.resume()
    trainer.train()
    scores = torch.from_numpy(predict(trainer.worker, "test"))
    return {"logits": torch.logit(scores).tolist(), "rows": trainer.worker.table.used, "step": trainer.at.step}


def report(peers: Collectives, config: str, dataset: str) -> None:
    """Write the report of a trained run."""
    evaluate(_run(config, dataset), peers, False)


def operator(peers: Collectives, name: str, kind: str, samples: int, owners: list[int]) -> dict[str, Any]:
    """One operator over random dense features, one feature per field, split by ``owners[field]``.

    Home outputs, and the gradient of all rows and of dense weights when each output is weighted by a fixed number.
    """
    fields, factors = len(owners), 3
    generator = torch.Generator().manual_seed(samples * 100 + fields)
    rows_FK = torch.randn(fields, 1 + factors, generator=generator, dtype=torch.float64)
    x_BF = torch.randn(samples, fields, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layer = FullyConnected(fields, factors, 5, bias=True).double()
    operators: dict[str, Operator] = {"lr": Linear(), "fm": FactorizationMachine(factors), "fc": layer}
    chosen = operators[name]
    owned = [[f for f in range(fields) if owners[f] % peers.workers == worker] for worker in range(peers.workers)]
    mine = owned[peers.rank]
    shard = Shard(
        rows_UK=rows_FK[mine].clone().requires_grad_(),
        inverse_L=torch.arange(len(mine)).repeat_interleave(samples),
        sample_L=torch.arange(samples).repeat(len(mine)),
        piece_L=torch.arange(len(mine)).repeat_interleave(samples),
        x_L=x_BF[:, mine].T.reshape(-1),
        samples=samples,
        fields_O=torch.tensor(mine, dtype=torch.int64),
    )
    exchange = Exchange({name: chosen}, {name: kind}, owned, fields, peers)
    output = chosen.finish(exchange.totals(shard)[name])
    edges = home_edges(samples, peers.workers)
    weights = torch.cos(torch.arange(samples, dtype=torch.float64))[edges[peers.rank] : edges[peers.rank + 1]]
    per_sample = output if output.dim() == 1 else output.sum(1)
    (per_sample * weights).sum().backward()
    dense = {key: p.grad.tolist() for key, p in layer.named_parameters() if p.grad is not None}
    gradient = shard.rows_UK.grad.tolist() if shard.rows_UK.grad is not None else []
    return {"output": output.tolist(), "rows": dict(zip(map(str, mine), gradient, strict=True)), "dense": dense}


CASES = {"train": train, "report": report, "operator": operator}
