"""Buckets are shared out evenly, within memory; the plan is the cheapest of all combinations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from des_core.config import ModelConfig
from des_core.contracts import Dataset, FieldSpec, FieldStats, Segment
from des_core.engine.models import build
from des_core.engine.placement import LOOKUP_SHARE, place
from des_core.engine.plan import choose, combinations, explain, home_edges
from des_core.errors import ConfigError
from tests.engine import tiny


def dataset(cardinalities: list[int], lookups: list[float]) -> Dataset:
    names = [f"f{number:02d}" for number in range(len(cardinalities))]
    return Dataset(
        spec="",
        task="click",
        fields=tuple(FieldSpec(name=name, column=name, kind="categorical", table=name) for name in names),
        has_group=False,
        has_time=False,
        parts={},
        splits={"train": (Segment(part="all", start=0, stop=1000),)},
        files=(),
        stats={
            name: FieldStats(lookups_per_sample=each, missing_share=0, cardinality=count)
            for name, count, each in zip(names, cardinalities, lookups, strict=True)
        },
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 16])
def test_every_bucket_has_one_owner_and_loads_are_even(workers: int) -> None:
    rng = np.random.default_rng(1)
    data = dataset((10 ** rng.uniform(1, 6, 26)).astype(int).tolist(), [1.0] * 24 + [8.0, 20.0])
    placement = place(data, workers, row_bytes=100)
    owned = np.array([[placement.owned(worker)[table] for table in placement.tables] for worker in range(workers)])
    assert (owned.sum(0) == 1).all()
    lookups, rows = (share / share.sum() for share in (placement.lookups_N, placement.rows_N))
    weight = LOOKUP_SHARE * lookups + (1 - LOOKUP_SHARE) * rows
    assert weight.max() <= 1 / workers * 1.05
    tables = [field.table for field in data.fields]
    pieces = sum(len(placement.fields(worker, tables)) for worker in range(workers))
    assert pieces <= 26 + workers - 1


def test_one_giant_table_is_cut_for_many_workers() -> None:
    placement = place(dataset([10_000_000, 5], [1.0, 1.0]), 7, row_bytes=80)
    assert (placement.lookups_N > 0).all()
    assert sum(placement.owned(worker)["f00"].any() for worker in range(7)) >= 4


def test_memory_is_a_hard_limit() -> None:
    data = dataset([1_000_000] * 2 + [10] * 6, [1.0, 1.0, *[30.0] * 6])
    free = place(data, 4, row_bytes=100)
    limit = int(2_000_060 / 4 * 1.03 * 100)
    assert free.rows_N.max() * 100 > limit
    assert place(data, 4, row_bytes=100, limit_bytes=limit).rows_N.max() * 100 <= limit
    with pytest.raises(ConfigError, match=r"do not fit 4 workers; set train\.workers to 5"):
        place(data, 4, row_bytes=100, limit_bytes=int(2_000_060 / 4 * 0.9 * 100))


def test_the_plan_is_the_cheapest_combination() -> None:
    """Random shapes: no combination costs less, and equations of method.md hold."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        fields, factors, units = (int(rng.integers(low, high)) for low, high in ((2, 40), (2, 40), (4, 300)))
        workers, batch = int(rng.choice([2, 3, 4, 8])), int(rng.integers(50, 5000))
        model = build(ModelConfig(name="deepfm", factors=factors, hidden=(units,)), fields, 0)
        owned = [list(range(fields))[worker::workers] for worker in range(workers)]
        plan = choose(model, owned, batch, 4)
        costs = [sum(p.predict(batch).values()) for p in combinations(model, owned, batch, 4)]
        assert len(costs) == 4 and sum(plan.predict(batch).values()) == min(costs)
        seen.add(tuple(plan.choice.items()))
        if plan.choice["fc"] == "sum":
            assert units < fields * factors / workers * 1.2
    assert (("fm", "gather"), ("fc", "gather")) in seen and (("fm", "sum"), ("fc", "sum")) in seen


def test_worked_bytes_of_the_method() -> None:
    """26 fields, k = 16, h = 256, N = 2, b = 4096, fp32: FM by sum 0.56 MB per worker, FC by gather 6.82."""
    model = build(ModelConfig(name="deepfm", factors=16, hidden=(256,)), 26, 0)
    owned = [list(range(13)), list(range(13, 26))]
    (by_sum,) = combinations(model, owned, 8192, 4, "sum")
    predicted = by_sum.predict(8192)
    assert predicted["fm"] == 2 * 4096 * 17 * 4
    assert round((predicted["fm"] + predicted["fc"]) / 1e6, 2) == 8.95
    best = choose(model, owned, 8192, 4).predict(8192)
    assert best["vectors"] == pytest.approx(6.82e6, rel=1e-3) and best["fm"] == 2 * 4096 * 4 and best["fc"] == 0
    assert home_edges(10, 3) == [0, 3, 6, 10]


def test_explain_shows_alternatives_winner_and_balances(tmp_path: Path) -> None:
    run = tiny.run(tmp_path)
    explained = explain(run.config, Dataset.load(run.dataset), 3)
    assert [operator["name"] for operator in explained["operators"]] == ["fm", "fc"]
    best = explained["joint"][0]
    assert best["bytes_per_step"] == min(entry["bytes_per_step"] for entry in explained["joint"])
    assert {o["name"]: o["chosen"] for o in explained["operators"]} == best["choice"]
    assert sum(worker["lookups_share"] for worker in explained["placement"]) == pytest.approx(1)
    assert sum(worker["bytes_share"] for worker in explained["placement"]) == pytest.approx(1)
