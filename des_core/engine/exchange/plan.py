"""Which exchange each operator takes, and what every line of the ledger will cost.

All combinations over a model's operators are priced jointly, because what one operator brings home is free
to the others; the cheapest wins, the first listed where they tie. A step of a plan costs

    bytes / bandwidth + collectives x latency

and without a known link its bytes. Bytes are those that a worker sends to others in one step, both ways, the
mean over workers, exact for the batch's actual size: home w has b_w samples, worker w owns O_w fields, i is
bytes per number on the wire, then

    sum          i 2/N (N - 1) G P                       (sum over w of (G - b_w) P = (N - 1) G P)
    gather       i 2/N sum over w of (G - b_w) k O_w
    rows         i 2 U k' + 4 I + 16 (N - 1)             U unique rows, I integers to other homes: ``row_routing``
    an all-reduce of n numbers   2 (N - 1)/N n x bytes per number
    replicated   an all-reduce of G P numbers, forward only; dense weights above the operators send nothing

Dims: G samples of the batch, N workers, P numbers of a partial, k numbers per pooled vector, k' per row sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from des_core.config import Config, worker_limit
from des_core.contracts import Dataset, Reference, deep_names
from des_core.data.feed.batches import BUCKET_BITS, Stream, everything
from des_core.engine.dense_layers import GlobalBatchNorm
from des_core.engine.exchange.collectives import WAYS, entry
from des_core.engine.exchange.placement import Placement
from des_core.engine.exchange.row_routing import route_rows
from des_core.engine.footprint import fit, need, number_bytes, step_bytes
from des_core.engine.models import Model, build
from des_core.engine.operators import Operator, Shard
from des_core.engine.weights import index
from des_core.errors import ConfigError

KINDS = ("sum", "gather", "rows")
METRICS = 1
"""Numbers per step on the metrics line: the sum of losses."""
SAMPLED = 4
"""Batches over which the unique rows of ``rows`` are measured."""


@dataclass(frozen=True)
class Traffic:
    """What ``rows`` sends to other homes in one step, the mean over workers."""

    rows: float
    integers: float


@dataclass(frozen=True)
class Link:
    """Between workers."""

    bandwidth: float
    """Bytes per second that a worker sends."""
    latency_s: float
    """Of one collective."""


def home_edges(samples: int, workers: int) -> list[int]:
    """Where homes begin in a batch, and the batch's end."""
    return [worker * samples // workers for worker in range(workers + 1)]


def lines(operators: Mapping[str, Operator], choice: Mapping[str, str], owned: int, factors: int) -> dict[str, int]:
    """Numbers per sample that a worker with ``owned`` fields sends home, by ledger line."""
    numbers = {name: {"sum": op.width, "gather": op.rest, "rows": 0}[choice[name]] for name, op in operators.items()}
    if "gather" in choice.values():
        numbers["vectors"] = owned * factors
    return numbers


@dataclass(frozen=True)
class Plan:
    """An exchange per operator, and the bytes it predicts."""

    model: Model
    choice: dict[str, str]
    replicated: bool
    """What follows the totals runs for all samples on every worker."""
    fields: int
    """Fields with rows, F."""
    owned: list[list[int]]
    """Numbers of the fields each worker owns pieces of, without wide ones."""
    number_bytes: int
    payload_bytes: int
    """Of a number of partials, vectors and rows on the wire."""
    traffic: Traffic = Traffic(0, 0)
    clips: bool = False
    """Whether gradients are clipped by their norm: the squares of rows' gradients are one more number to sum."""

    wide: tuple[tuple[int, ...], ...] = ()
    """Numbers of the wide fields, from F on, each worker owns pieces of; empty: there are none."""

    @property
    def pieces(self) -> list[list[int]]:
        """Numbers of all fields each worker owns pieces of."""
        return [[*deep, *wide] for deep, wide in zip(self.owned, self.wide or ((),) * len(self.owned), strict=True)]

    @property
    def chosen(self) -> dict[str, Any]:
        """The choices that distinguish this plan from others."""
        return {"choice": self.choice, "upper": "replicated" if self.replicated else "home"}

    @property
    def rows(self) -> bool:
        """Whether unique rows travel instead of results."""
        return "rows" in self.choice.values()

    @property
    def reads(self) -> slice:
        """Columns of a row that ``rows`` sends."""
        linear = any(op.linear for op in self.model.by_name.values())
        return slice(0 if linear else 1, self.model.row_width)

    def with_pooling(self, shard: Shard) -> Shard:
        """The shard, set to form field vectors and squares only if an operator reads them."""
        operators = self.model.by_name.values()
        by_field = "gather" in self.choice.values() or any(op.by_field for op in operators)
        return replace(shard, by_field=by_field, squares=any(op.squares for op in operators))

    @property
    def summed(self) -> list[str]:
        """Names of the dense weights whose gradients are summed over workers."""
        names = [name for name, _ in self.model.named_parameters()]
        return [name for name in names if name.startswith("operators.")] if self.replicated else names

    def kinds(self) -> dict[str, str]:
        """The kind of exchange of every ledger line."""
        shared = {"vectors": "gather"} if "gather" in self.choice.values() else {}
        shared |= {"rows": "rows"} if self.rows else {}
        norms = {"batch norm": "all_reduce"} if self._norms() and not self.replicated else {}
        own = {name: "replicated" if self.replicated else kind for name, kind in self.choice.items()}
        return {**own, **shared, **norms, "dense gradients": "all_reduce", "metrics": "all_reduce"}

    def predict(self, samples: int, traffic: Traffic | None = None) -> dict[str, float]:
        """Bytes per worker of one step of ``samples`` samples, by ledger line; arguments as ``by_way``."""
        ways = self.by_way(samples, traffic)
        return {line: sum(ways[entry(line, way)] for way in WAYS) for line in self.kinds()}

    def by_way(self, samples: int, traffic: Traffic | None = None) -> dict[str, float]:
        """Bytes per worker of one step of ``samples`` samples, by ledger line and direction.

        Args:
            traffic: of ``rows``; otherwise what sampled batches promised.
        """
        workers, operators = len(self.owned), self.model.by_name
        edges = home_edges(samples, workers)
        around = 2 * (workers - 1) / workers * self.number_bytes
        forward = dict.fromkeys(self.kinds(), 0.0)
        if self.replicated:
            for name, operator in operators.items():
                forward[name] = around * samples * operator.width
        else:
            for worker, pieces in enumerate(self.owned):
                others = samples - (edges[worker + 1] - edges[worker])
                for line, numbers in lines(operators, self.choice, len(pieces), self.model.factors).items():
                    forward[line] += others * numbers * self.payload_bytes / workers
        backward = dict.fromkeys(forward, 0.0) if self.replicated else dict(forward)
        for name, operator in operators.items():
            if self.choice[name] == "sum":
                forward[name] += around * samples * sum(operator.inner)
                backward[name] += around * samples * sum(operator.inner)
        if self.rows:
            sent = traffic or self.traffic
            backward["rows"] = sent.rows * (self.reads.stop - self.reads.start) * self.payload_bytes
            forward["rows"] = backward["rows"] + 4 * sent.integers + 16 * (workers - 1)
        if "batch norm" in forward and samples > 1:
            # A step of one sample uses running statistics and sums nothing.
            forward["batch norm"] = backward["batch norm"] = around * sum(2 * units for units in self._norms())
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        backward["dense gradients"] = around * sum(sizes[name] for name in self.summed)
        backward["metrics"] = around * ((0 if self.replicated else METRICS) + self.clips)
        ways = zip(WAYS, (forward, backward), strict=True)
        return {entry(line, way): count for way, sums in ways for line, count in sums.items()}

    def collectives(self) -> int:
        """Collectives of one step."""
        inner: int = sum(len(op.inner) for name, op in self.model.by_name.items() if self.choice[name] == "sum")
        if self.replicated:
            return 1 + 2 * inner + bool(self.summed or self.clips)
        return 2 * inner + 2 * len(self._norms()) + (5 if self.rows else 3)

    def cost(self, samples: int, link: Link | None) -> float:
        """Seconds that a step spends on the wire; without a link its bytes."""
        sent: float = sum(self.predict(samples).values())
        return sent / link.bandwidth + self.collectives() * link.latency_s if link else sent

    def _norms(self) -> list[int]:
        return [len(m.gamma_h) for m in self.model.modules() if isinstance(m, GlobalBatchNorm)]


def combinations(
    base: Plan, batch: int, exchange: str = "auto", upper: str = "auto", link: Link | None = None
) -> list[Plan]:
    """All plans that ``train.exchange`` and ``train.upper`` allow, the cheapest first.

    A replicated upper part computes N times as much, so ``auto`` offers it only where nothing follows the
    operators but their sum.

    Raises:
        ConfigError: they allow none.
    """
    operators = base.model.by_name
    wanted = [exchange if exchange in op.kinds else op.kinds[0] for op in operators.values()]
    choices = {
        "auto": [*product(*(op.kinds for op in operators.values())), ("rows",) * len(operators)],
        "rows": [("rows",) * len(operators)],
    }.get(exchange, [tuple(wanted)])
    plans = [replace(base, choice=dict(zip(operators, choice, strict=True)), replicated=False) for choice in choices]
    if upper == "replicated" or (upper == "auto" and not base.model.towers):
        everywhere = [replace(plan, replicated=True) for plan in plans if set(plan.choice.values()) == {"sum"}]
        plans = everywhere if upper == "replicated" else plans + everywhere
    if not plans:
        raise ConfigError(
            "train.upper = 'replicated' needs operators whose partials add up (train.exchange 'sum'); set it to 'home'"
        )
    return sorted(plans, key=lambda plan: plan.cost(batch, link))


def layout(
    config: Config, dataset: Dataset, reference: Reference, workers: int, measured: bool, known_rows: float = 0.0
) -> tuple[Placement, Plan]:
    """Placement of a run on ``workers`` workers, and the base of its plans: no choice made yet.

    Args:
        measured: find out what ``rows`` would send.
        known_rows: rows of the champion that training goes on from.

    Raises:
        ConfigError: a worker would need more memory than the config lets it have.
    """
    rows, inputs, names = dataset.row_fields, dataset.dense_fields, deep_names(dataset.fields)
    model = build(config.model, names, len(inputs), config.run.seed)
    placement = fit(
        config,
        dataset,
        workers,
        model,
        lambda _: worker_limit(config.train.worker_memory_mb, config.cluster),
        known_rows,
    )
    pieces = [placement.fields(worker, [field.table for field in rows]) for worker in range(workers)]
    owned = [[number for number in own if number < len(names)] for own in pieces]
    wide = tuple(tuple(number for number in own if number >= len(names)) for own in pieces)
    if len(names) < len(rows) and not any(op.linear for op in model.by_name.values()):
        raise ConfigError(
            f"fields.{rows[-1].name}: wide = true needs a model with a linear part, which {config.model.name} has not; "
            "take fm, fwfm, wide_deep, deepfm or fibinet, or set it to false"
        )
    size = number_bytes(config)
    payload = 2 if config.train.payload == "bf16" else size
    nothing = Traffic(0, 0)
    traffic = sampled_traffic(dataset, reference, placement, config.train.batch, workers) if measured else nothing
    clips = bool(config.train.max_grad_norm)
    base = Plan(model, {}, False, len(names), owned, size, payload, traffic, clips, wide)
    return placement, base


def sampled_traffic(dataset: Dataset, reference: Reference, placement: Placement, batch: int, workers: int) -> Traffic:
    """What ``rows`` would send, measured on the first batches of the training part."""
    whole = everything(dataset.row_fields)
    rows, integers, batches = 0, 0, 0
    for table in Stream(reference, "train", whole.columns).batches(batch):
        edges = home_edges(table.num_rows, workers)
        lookups = whole.lookups(table)
        buckets = (lookups.ids.view(np.uint64) >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
        owner_L = placement.owner_TH[whole.table_of_piece[lookups.piece], buckets]
        for worker in range(workers):
            mine = owner_L == worker
            inverse_L = index.dedupe(lookups.ids[mine])[1]
            fields, piece_L = np.unique(lookups.piece[mine], return_inverse=True)
            sent = route_rows(inverse_L, lookups.sample[mine], piece_L, lookups.x[mine], edges, len(fields))
            rows += int(sent.rows_N.sum() - sent.rows_N[worker])
            integers += int(sent.message_N.sum() - sent.message_N[worker])
        batches += 1
        if batches == SAMPLED:
            break
    return Traffic(rows / max(batches, 1) / workers, integers / max(batches, 1) / workers)


def link_of(config: Config) -> Link | None:
    """The link that a config states, or None."""
    settings = config.train
    return Link(settings.bandwidth_mbps * 125_000, settings.latency_us * 1e-6) if settings.bandwidth_mbps else None


def plan_summary(config: Config, dataset: Dataset, reference: Reference, workers: int) -> dict[str, Any]:
    """What ``des plan`` prints: alternatives, the joint winner, and both balances."""
    placement, base = layout(config, dataset, reference, workers, measured=True)
    batch, settings, link = config.train.batch, config.train, link_of(config)
    plans = combinations(base, batch, settings.exchange, settings.upper, link)
    best = plans[0]
    operators = []
    for name, operator in base.model.by_name.items():
        alone = {kind: _alone(base, name, kind, batch) for kind in (*operator.kinds, "rows")}
        operators.append({"name": name, "width": operator.width, "alternatives": alone, "chosen": best.choice[name]})
    kinds, predicted = best.kinds(), best.predict(batch)
    return {
        "workers": workers,
        "batch": batch,
        "operators": operators,
        "joint": [
            plan.chosen
            | {
                "bytes_per_step": sum(plan.predict(batch).values()),
                "collectives": plan.collectives(),
            }
            | ({"ms_per_step": 1000 * plan.cost(batch, link)} if link else {})
            for plan in plans
        ],
        "lines": {line: {"kind": kinds[line], "bytes_per_step": count} for line, count in predicted.items()},
        "dense_bytes_per_step": predicted["dense gradients"],
        "placement": balances(dataset, placement, best),
        "memory": memory_summary(config, dataset, placement, base.model),
    }


def memory_summary(config: Config, dataset: Dataset, placement: Placement, model: Model) -> dict[str, Any]:
    """Predicted bytes of each worker, by what holds them in training and in all for each role; and of other steps."""
    needed = need(config, dataset, placement, model)
    roles = {"train": needed.train, "evaluate": needed.evaluate}
    roles |= {"gpu": needed.device} if needed.on_device else {}
    each = {"rows_owned": needed.owned, **needed.parts, **roles}
    workers = [
        {"worker": worker, **{name: round(float(held_N[worker])) for name, held_N in each.items()}}
        for worker in range(len(needed.owned))
    ]
    return {"workers": workers, "most": round(needed.most), "steps": step_bytes(config, dataset)}


def _alone(base: Plan, name: str, kind: str, batch: int) -> float:
    """Bytes of one operator as if it were the model's only one."""
    operators = base.model.by_name
    others = {other: "rows" if kind == "rows" else op.kinds[0] for other, op in operators.items()}
    predicted = replace(base, choice=others | {name: kind}).predict(batch)
    shared = {"gather": "vectors", "rows": "rows"}.get(kind)
    return predicted[name] + (predicted[shared] if shared else 0.0)


def balances(dataset: Dataset, placement: Placement, plan: Plan) -> list[dict[str, Any]]:
    """Per worker its fields, and its shares of lookups and of row bytes."""
    return [
        {
            "worker": worker,
            "fields": [dataset.row_fields[number].name for number in pieces],
            "lookups_share": float(placement.lookups_N[worker]),
            "bytes_share": float(placement.rows_N[worker] / placement.rows_N.sum()),
            "rows": round(float(placement.rows_N[worker])),
        }
        for worker, pieces in enumerate(plan.pieces)
    ]
