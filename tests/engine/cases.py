"""What a group of test workers can be asked to do."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import BlockWriter
from des_core.config import parse_config
from des_core.contracts import LABEL, Dataset, Reference
from des_core.data.read.hashing import MISSING
from des_core.engine.evaluator import evaluate
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.exchange import Exchange
from des_core.engine.exchange.plan import Plan, home_edges
from des_core.engine.exchange.row_routing import route_rows
from des_core.engine.judging import clusters, homes, joins, ranks, slices, swap
from des_core.engine.judging.clusters import group_ids
from des_core.engine.judging.measure import Judge, Rows
from des_core.engine.judging.quantiles import histogram
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
from des_core.engine.progressive import score
from des_core.engine.trainer import Trainer
from des_core.engine.weights import saving
from des_core.run import Day, Run, pin


def _run(config: str, dataset: str, day: dict[str, Any] | None = None) -> Run:
    return pin(parse_config(config), Reference.parse(dataset), None if day is None else Day.model_validate(day))


def train(
    peers: Collectives,
    config: str,
    dataset: str,
    resume: bool = False,
    dump: bool = False,
    unpruned: bool = False,
    deltas: bool = False,
    full_disk_at: int = 0,
    day: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train to the end; on worker 0 the last weights' test logits; dumped, the rows owned here by id.

    Args:
        unpruned: keep all checkpoints.
        deltas: every checkpoint that can be a delta is one.
        full_disk_at: the last worker cannot write its rows at this step's checkpoint.
    """
    peers.ledger.clear()
    trainer = Trainer(_run(config, dataset, day), peers)
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
    rows, mine = homes.score(trainer.worker, "test")
    scores = torch.zeros(trainer.worker.dataset.rows("test"), dtype=torch.float64)
    scores[torch.from_numpy(rows.positions)] = torch.from_numpy(mine)
    scores = peers.all_reduce({"test": scores})["test"]
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


def report(peers: Collectives, config: str, dataset: str, day: dict[str, Any] | None = None) -> None:
    """Write the report of a trained run, and what it is asked to compare with."""
    evaluate(_run(config, dataset, day), peers, False)


def new_rows(peers: Collectives, config: str, dataset: str, day: dict[str, Any]) -> None:
    """Score the new rows of a day's run."""
    score(_run(config, dataset, day), peers, False)


def finite(peers: Collectives, config: str, dataset: str, bad: list[int]) -> None:
    """Check scores of the test rows, of which some are not finite."""
    run = _run(config, dataset)
    places = homes.places(Dataset.load(run.dataset).rows("test"), peers)
    scores = np.where(np.isin(places, bad), np.nan, 0.5)
    homes.check_finite(peers, run.dataset, "test", Rows(np.zeros(len(places), np.float32), places), scores)


def look_up(peers: Collectives, seed: int, here: int, there: int, round_: int) -> float:
    """How far values that were looked up in other workers' are from those under their keys, found or not."""
    random = np.random.default_rng(seed)
    keys = random.permutation(np.arange(2 * there)) - there
    values = dict(zip(group_ids(keys[:there]).tolist(), random.random(there).tolist(), strict=True))
    asked = group_ids(keys[np.random.default_rng(seed + peers.rank).integers(0, len(keys), here * (peers.rank + 1))])
    mine = np.array(list(values))[peers.rank :: peers.workers]
    kept, swap.ROUND = swap.ROUND, round_
    found, known = joins.look_up(peers, np.append(asked, -1), mine, np.array([values[key] for key in mine.tolist()]))
    swap.ROUND = kept
    assert not known[-1], "a row of no file is nobody's"
    assert known[:-1].tolist() == [key in values for key in asked.tolist()]
    return max(abs(each - values.get(key, 0.0)) for each, key in zip(found.tolist(), asked.tolist(), strict=False))


def sliced(peers: Collectives, config: str, dataset: str, field: str, seed: int) -> list[dict[str, Any]]:
    """The slices of a field of the test rows, of which one in seven is not compared, with drawn scores."""
    run = _run(config, dataset)
    rows = Dataset.load(run.dataset).rows("test")
    at = homes.places(rows, peers)
    random = np.random.default_rng(seed)
    ours, theirs = random.random((2, rows)).round(2)
    labels = homes.column(peers, run.dataset, "test", LABEL)
    here = at % 7 != 0
    found = slices.compare(
        Judge(peers, "click"),
        run.dataset,
        field,
        here,
        Rows(labels[here], at[here], group_ids(at[here] % 11)),
        ours[at][here],
        theirs[at][here],
    )
    return [each.model_dump() for each in found]


def judged_rows(seed: int, samples: int, digits: int, skew: bool) -> dict[str, np.ndarray]:
    """Columns of all rows: labels, two models' scores, groups of which one is large, and some rows of nobody."""
    random = np.random.default_rng(seed)
    groups = random.zipf(1.3, samples) % 40
    logits = random.normal(0, 1, samples) + random.normal(0, 1, 40)[groups]
    labels = (random.random(samples) < 1 / (1 + np.exp(1 - logits))).astype(np.float32)
    scores = [1 / (1 + np.exp(1 - logits + random.normal(0, noise, samples))) for noise in (0.5, 0.8)]
    if skew:
        # Rows of one worker's neighbourhood score alike, and all scores lie close together.
        scores = [0.5 + (each + np.arange(samples) // 50) * 1e-7 for each in scores]
    keys = np.where(random.random(samples) < 0.1, MISSING, groups)
    return {
        "label": labels if digits != 7 else random.integers(1, 6, samples).astype(np.float32),
        "ours": scores[0].round(digits) if not skew else scores[0],
        "theirs": scores[1].round(digits) if not skew else scores[1],
        "group": keys,
    }


def judge(peers: Collectives, task: str, rows: dict[str, Any], batch: int, round_: int) -> dict[str, Any]:
    """All that judging finds of rows that lie at their homes, batch by batch."""
    columns = judged_rows(**rows)
    samples = rows["samples"]
    homes = [
        start + np.arange(*home_edges(min(batch, samples - start), peers.workers)[peers.rank :][:2])
        for start in range(0, samples, batch)
    ]
    at = np.concatenate([np.zeros(0, np.int64), *homes])
    kept, swap.ROUND, swap.PIECE = (swap.ROUND, swap.PIECE), round_, 64
    most, received = [0], swap.swap

    def counted(*arguments: Any) -> tuple[np.ndarray, np.ndarray]:
        rows, came = received(*arguments)
        most[0] = max(most[0], len(rows))
        return rows, came

    ranks.swap = clusters.swap = counted
    try:
        here = Rows(columns["label"][at], at, group_ids(columns["group"][at]))
        ours, theirs = columns["ours"][at], columns["theirs"][at]
        judging = Judge(peers, task)
        model = judging.model(here, ours, 200)
        found: dict[str, Any] = {
            "metrics": judging.metrics(here, model, grouped=True),
            "alone": judging.intervals(replace(here, groups=None), model),
            "grouped": judging.intervals(here, model),
            "bins": judging.calibration_bins(here, model),
            "compared": judging.compared(here, ours, theirs, 200).model_dump(mode="json"),
            "compared_alone": judging.compared(replace(here, groups=None), ours, theirs).model_dump(mode="json"),
        }
        if model.wins is not None:
            found |= {"wins": model.wins.wins, "roc": model.wins.roc}
            if model.wins.auc is not None:
                found["histogram"] = histogram(peers, ours, model.wins.order_B, here.labels > 0.5)
        return found | {"most": most[0]}
    finally:
        swap.ROUND, swap.PIECE = kept
        ranks.swap = clusters.swap = received


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


CASES = {
    "judge": judge,
    "train": train,
    "slow_save": slow_save,
    "report": report,
    "new_rows": new_rows,
    "look_up": look_up,
    "finite": finite,
    "sliced": sliced,
    "operator": operator,
    "imported": imported,
}
