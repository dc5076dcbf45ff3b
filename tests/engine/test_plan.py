"""Plans: the cheapest of all combinations, at bytes that independent formulas give."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from des_core.config import ModelConfig
from des_core.contracts import Dataset
from des_core.engine.exchange.plan import Link, Plan, Traffic, combinations, home_edges, plan_summary
from des_core.engine.models import Model, build
from des_core.errors import ConfigError
from tests.engine import tiny

NAMES = ("lr", "fm", "fwfm", "wide_deep", "deepfm", "dcn", "dcn_v2", "dlrm", "gdcn", "finalmlp", "masknet", "fibinet")


def names(fields: int) -> list[str]:
    return [f"f{number}" for number in range(fields)]


def base(model: Model, owned: list[list[int]], traffic: Traffic) -> Plan:
    fields = 1 + max(field for pieces in owned for field in pieces)
    return Plan(model, {}, False, fields, owned, 4, 4, traffic)


def cheapest_bytes(model: Model, owned: list[list[int]], batch: int, traffic: Traffic) -> float:
    """The fewest bytes of any combination, from the formulas of method.md, operator by operator."""
    workers = len(owned)
    around = 2 * (workers - 1) / workers * 4
    row = model.factors + any(op.linear for op in model.by_name.values())
    everything = around * (sum(p.numel() for p in model.parameters()) + 1)
    edges = home_edges(batch, workers)
    vectors = sum(
        2 * 4 / workers * (batch - edges[w + 1] + edges[w]) * len(pieces) * model.factors
        for w, pieces in enumerate(owned)
    )
    by_sum = 2 * 4 / workers * (workers - 1) * batch
    found = [everything + 2 * 4 * traffic.rows * row + 4 * traffic.integers + 16 * (workers - 1)]
    operators = model.by_name.values()
    for choice in product(*(op.kinds for op in operators)):
        cost = everything + (vectors if "gather" in choice else 0)
        for kind, op in zip(choice, operators, strict=True):
            cost += by_sum * (op.rest if kind == "gather" else op.width)
            cost += 2 * around * batch * sum(op.inner) if kind == "sum" else 0
        found.append(cost)
    if not model.towers and all("sum" in op.kinds for op in operators):
        dense = sum(p.numel() for name, p in model.named_parameters() if name.startswith("operators."))
        found.append(around * (batch * sum(op.width for op in operators) + dense))
    return min(found)


def test_with_latency_zero_no_combination_needs_fewer_bytes() -> None:
    """Random shapes of all models, against formulas written down a second time."""
    rng = np.random.default_rng(0)
    seen = set()
    for number in range(120):
        name = NAMES[number % len(NAMES)]
        fields, units = int(rng.integers(2, 40)), int(rng.integers(4, 300))
        workers, batch = int(rng.choice([2, 3, 4, 8])), int(rng.integers(50, 5000))
        gates = (("f0",), ("f1",)) if number % 2 else ()
        ranks = int(rng.integers(1, 20))
        config = ModelConfig(name=name, factors=16, hidden=(units,), cross_rank=ranks, gate_fields=gates)
        model = build(config, names(fields), 2, 0)
        traffic = Traffic(float(rng.integers(1, 4 * batch)), float(rng.integers(1, 9 * batch)))
        owned = [list(range(fields))[worker::workers] for worker in range(workers)]
        plans = combinations(base(model, owned, traffic), batch, link=Link(1e9, 0.0) if number % 2 else None)
        assert sum(plans[0].predict(batch).values()) == pytest.approx(cheapest_bytes(model, owned, batch, traffic))
        seen |= set(plans[0].kinds().values())
    assert {"sum", "gather", "rows", "replicated"} <= seen


def test_latency_counts_collectives() -> None:
    """A slow link with long distances takes more bytes in fewer collectives."""
    config = ModelConfig(name="dcn_v2", factors=8, cross_rank=2, cross_layers=4, hidden=(8,), structure="stacked")
    model = build(config, names(20), 0, 0)
    owned = [list(range(10)), list(range(10, 20))]
    whole = base(model, owned, Traffic(1e9, 1e9))
    near, far = (combinations(whole, 256, link=Link(1e8, latency))[0] for latency in (0.0, 0.01))
    assert near.choice["cross"] == "sum" and near.collectives() == 3 + 2 * 4
    assert far.choice["cross"] == "gather" and far.collectives() == 3
    assert sum(far.predict(256).values()) > sum(near.predict(256).values())


def test_worked_bytes_of_the_method() -> None:
    """26 fields, k = 16, h = 256, N = 2, b = 4096, fp32: FM by sum 0.56 MB per worker, FC by gather 6.82."""
    model = build(ModelConfig(name="deepfm", factors=16, hidden=(256,)), names(26), 0, 0)
    whole = base(model, [list(range(13)), list(range(13, 26))], Traffic(1e9, 1e9))
    (by_sum,) = combinations(whole, 8192, "sum")
    predicted = by_sum.predict(8192)
    assert predicted["fm"] == 2 * 4096 * 17 * 4
    assert round((predicted["fm"] + predicted["fc"]) / 1e6, 2) == 8.95
    best = combinations(whole, 8192)[0].predict(8192)
    assert best["vectors"] == pytest.approx(6.82e6, rel=1e-3) and best["fm"] == 2 * 4096 * 4 and best["fc"] == 0
    assert home_edges(10, 3) == [0, 3, 6, 10]


def test_what_cannot_be_replicated_says_so() -> None:
    whole = base(build(ModelConfig(name="dlrm"), names(4), 0, 0), [[0, 1], [2, 3]], Traffic(0, 0))
    with pytest.raises(ConfigError, match=r"train\.upper = 'replicated' needs operators whose partials add up"):
        combinations(whole, 100, upper="replicated")


@pytest.mark.parametrize("name", ["lr", "fm", "deepfm"])
def test_rows_are_measured_before_they_are_chosen(tmp_path: Path, name: str) -> None:
    """Two workers on 880 samples of six fields: what rows would send is counted on the samples themselves."""
    run = tiny.run(tmp_path, model={"name": name})
    explained = plan_summary(run.config, Dataset.load(run.dataset), run.dataset, 2)
    by_rows = next(entry for entry in explained["joint"] if "rows" in entry["choice"].values())
    # At least a place of four bytes for each of the 48 samples that are away, and for most fields one of them travels.
    assert by_rows["bytes_per_step"] > 48 * 4 * 3


def test_explain_shows_alternatives_winner_and_balances(tmp_path: Path) -> None:
    run = tiny.run(tmp_path)
    explained = plan_summary(run.config, Dataset.load(run.dataset), run.dataset, 3)
    assert [operator["name"] for operator in explained["operators"]] == ["fm", "fc"]
    best = explained["joint"][0]
    assert best["bytes_per_step"] == min(entry["bytes_per_step"] for entry in explained["joint"])
    assert {o["name"]: o["chosen"] for o in explained["operators"]} == best["choice"]
    assert all(set(o["alternatives"]) == {"sum", "gather", "rows"} for o in explained["operators"])
    assert sum(worker["lookups_share"] for worker in explained["placement"]) == pytest.approx(1)
    assert sum(worker["bytes_share"] for worker in explained["placement"]) == pytest.approx(1)
