"""Buckets are shared out evenly."""

from __future__ import annotations

import numpy as np
import pytest

from des_core.contracts import Dataset, FieldSpec, FieldStats, Segment
from des_core.engine.exchange.placement import LOOKUP_SHARE, placements


def dataset(cardinalities: list[int], lookups: list[float]) -> Dataset:
    names = [f"f{number:02d}" for number in range(len(cardinalities))]
    return Dataset(
        spec="",
        task="click",
        fields=tuple(FieldSpec(name=name, column=name, kind="categorical", table=name) for name in names),
        has_group=False,
        has_time=False,
        parts={},
        splits={"train": (Segment(part="all", start=0, stop=1000),), "valid": (), "test": ()},
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
    placement = next(placements(data, workers))
    owned = np.array([[placement.owned(worker)[table] for table in placement.tables] for worker in range(workers)])
    assert (owned.sum(0) == 1).all()
    lookups, rows = (share / share.sum() for share in (placement.lookups_N, placement.rows_N))
    weight = LOOKUP_SHARE * lookups + (1 - LOOKUP_SHARE) * rows
    assert weight.max() <= 1 / workers * 1.05
    tables = [field.table for field in data.fields]
    pieces = sum(len(placement.fields(worker, tables)) for worker in range(workers))
    assert pieces <= 26 + workers - 1


def test_one_giant_table_is_cut_for_many_workers() -> None:
    placement = next(placements(dataset([10_000_000, 5], [1.0, 1.0]), 7))
    assert (placement.lookups_N > 0).all()
    assert sum(placement.owned(worker)["f00"].any() for worker in range(7)) >= 4
