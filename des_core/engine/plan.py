"""Which exchange each operator takes, and what every line of the ledger will cost.

All combinations over a model's operators are priced jointly, because pooled field vectors that one
operator brings home are free to the others; the one with the fewest bytes wins, ``sum`` where they tie.
Bytes are those that a worker sends to others in one step, both ways, the mean over workers, exact for
the batch's actual size: home w has b_w samples, worker w owns O_w fields, i is bytes per number, then

    sum      i 2/N (N - 1) G P                       (sum over w of (G - b_w) P = (N - 1) G P)
    gather   i 2/N sum over w of (G - b_w) k O_w
    an all-reduce of n numbers   i 2 (N - 1)/N n

Dims: G samples of the batch, N workers, P numbers of a partial, k numbers per pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from des_core.config import Config
from des_core.contracts import Dataset
from des_core.engine.dense import GlobalBatchNorm
from des_core.engine.models import Model, build
from des_core.engine.operators import Operator
from des_core.engine.optimizer import state_width
from des_core.engine.placement import Placement, place

KINDS = ("sum", "gather")
METRICS = 1
"""Numbers per step on the metrics line: the sum of losses."""


def home_edges(samples: int, workers: int) -> list[int]:
    """Where homes begin in a batch, and the batch's end."""
    return [worker * samples // workers for worker in range(workers + 1)]


def line_of(operator: Operator) -> str:
    """The ledger line of the pooled columns an operator reads with ``gather``."""
    return "scalars" if operator.reads.start == 0 else "vectors"


def lines(operators: Mapping[str, Operator], choice: Mapping[str, str], owned: int) -> dict[str, int]:
    """Numbers per sample that a worker with ``owned`` fields sends to its home, by ledger line."""
    numbers = {name: op.width if choice[name] == "sum" else op.rest for name, op in operators.items()}
    for name, operator in operators.items():
        if choice[name] == "gather":
            numbers[line_of(operator)] = owned * (operator.reads.stop - operator.reads.start)
    return numbers


@dataclass(frozen=True)
class Plan:
    """An exchange per operator, and the bytes it predicts."""

    model: Model
    choice: dict[str, str]
    owned: list[list[int]]
    """Fields each worker owns pieces of."""
    number_bytes: int

    def kinds(self) -> dict[str, str]:
        """The kind of exchange of every ledger line."""
        shared = {line: "gather" for line in lines(self.model.operators, self.choice, 1) if line not in self.choice}
        norms = {"batch norm": "all_reduce"} if self._norms() else {}
        return {**self.choice, **shared, **norms, "dense gradients": "all_reduce", "metrics": "all_reduce"}

    def predict(self, samples: int) -> dict[str, float]:
        """Bytes per worker of one step of ``samples`` samples, by ledger line."""
        workers = len(self.owned)
        edges = home_edges(samples, workers)
        predicted: dict[str, float] = {}
        for worker, pieces in enumerate(self.owned):
            others = samples - (edges[worker + 1] - edges[worker])
            for line, numbers in lines(self.model.operators, self.choice, len(pieces)).items():
                predicted[line] = predicted.get(line, 0.0) + 2 * others * numbers * self.number_bytes / workers
        around = 2 * (workers - 1) / workers * self.number_bytes
        if self._norms():
            # A step of one sample uses running statistics and sums nothing.
            predicted["batch norm"] = around * sum(4 * units for units in self._norms()) if samples > 1 else 0.0
        predicted["dense gradients"] = around * sum(p.numel() for p in self.model.parameters())
        predicted["metrics"] = around * METRICS
        return predicted

    def _norms(self) -> list[int]:
        return [len(m.gamma_h) for m in self.model.modules() if isinstance(m, GlobalBatchNorm)]


def choose(model: Model, owned: Sequence[Sequence[int]], batch: int, number_bytes: int, wanted: str = "auto") -> Plan:
    """The plan with the fewest predicted bytes, or with one kind for all operators if ``wanted`` names it."""
    return combinations(model, owned, batch, number_bytes, wanted)[0]


def combinations(
    model: Model, owned: Sequence[Sequence[int]], batch: int, number_bytes: int, wanted: str = "auto"
) -> list[Plan]:
    """All plans, the cheapest first."""
    kinds = KINDS if wanted == "auto" else (wanted,)
    pieces = [list(fields) for fields in owned]
    plans = [
        Plan(model, dict(zip(model.operators, combination, strict=True)), pieces, number_bytes)
        for combination in product(kinds, repeat=len(model.operators))
    ]
    return sorted(plans, key=lambda plan: sum(plan.predict(batch).values()))


def layout(config: Config, dataset: Dataset, workers: int) -> tuple[Model, Placement, Plan]:
    """Model, placement and plan of a run on ``workers`` workers."""
    model = build(config.model, len(dataset.fields), config.run.seed)
    placement = place(dataset, workers, row_bytes(config, model), config.train.worker_memory_mb << 20)
    tables = [field.table for field in dataset.fields]
    owned = [placement.fields(worker, tables) for worker in range(workers)]
    plan = choose(model, owned, config.train.batch, number_bytes(config), config.train.exchange)
    return model, placement, plan


def number_bytes(config: Config) -> int:
    """Bytes per number of rows, activations and payloads."""
    return 8 if config.train.precision == "fp64" else 4


def row_bytes(config: Config, model: Model) -> int:
    """Bytes a row takes: weights, optimizer state, id, table number and its share of the index."""
    numbers = model.row_width + state_width(config.optimizer.rows.name, model.row_width)
    return numbers * number_bytes(config) + 8 + 2 + 16


def explain(config: Config, dataset: Dataset, workers: int) -> dict[str, Any]:
    """What ``des plan`` prints: alternatives, the joint winner, and both balances."""
    model, placement, plan = layout(config, dataset, workers)
    batch, size = config.train.batch, number_bytes(config)
    plans = combinations(model, plan.owned, batch, size, config.train.exchange)
    operators = []
    for name, operator in model.operators.items():
        alone = {}
        for kind in KINDS:
            others = dict.fromkeys(model.operators, "sum") | {name: kind}
            predicted = Plan(model, others, plan.owned, size).predict(batch)
            alone[kind] = predicted[name] + (predicted[line_of(operator)] if kind == "gather" else 0.0)
        operators.append({"name": name, "width": operator.width, "alternatives": alone, "chosen": plan.choice[name]})
    kinds, predicted = plan.kinds(), plan.predict(batch)
    return {
        "workers": workers,
        "batch": batch,
        "operators": operators,
        "joint": [{"choice": p.choice, "bytes_per_step": sum(p.predict(batch).values())} for p in plans],
        "lines": {line: {"kind": kinds[line], "bytes_per_step": count} for line, count in predicted.items()},
        "dense_bytes_per_step": predicted["dense gradients"],
        "placement": balances(dataset, placement, plan),
    }


def balances(dataset: Dataset, placement: Placement, plan: Plan) -> list[dict[str, Any]]:
    """Per worker its fields, and its shares of lookups and of row bytes."""
    return [
        {
            "worker": worker,
            "fields": [dataset.fields[number].name for number in pieces],
            "lookups_share": float(placement.lookups_N[worker]),
            "bytes_share": float(placement.rows_N[worker] / placement.rows_N.sum()),
            "rows": round(float(placement.rows_N[worker])),
        }
        for worker, pieces in enumerate(plan.owned)
    ]
