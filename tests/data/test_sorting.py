"""Sorting in memory equals a stable sort, ties and all; so does the common order of runs on storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from des_core.data.store import runs, sorting
from des_core.data.store.runs import Order, read_run, write_run


def rows_and_keys(keys: int, size: int = 4000) -> tuple[pa.Table, np.ndarray]:
    key = np.random.default_rng(0).integers(0, keys, size).astype(np.uint64)
    rows = np.arange(size)
    lists = pa.array([[row] * (row % 3) for row in rows.tolist()], pa.list_(pa.int64()))
    numbers = pa.array(rows.astype(np.float32), mask=rows % 5 == 0)
    return pa.table({"row": rows, "list": lists, "number": numbers}), key


@pytest.mark.parametrize("keys", [1, 3, 50, 1 << 62])
def test_sorted_tables_equal_a_stable_sort(monkeypatch: pytest.MonkeyPatch, keys: int) -> None:
    monkeypatch.setattr(sorting, "SLICE_ROWS", 333)
    table, key = rows_and_keys(keys)
    sorter = sorting.Sorter(1 << 30)
    for _ in range(2):
        for at in range(0, len(key), 300):
            sorter.add(table.slice(at, 300), key[at : at + 300])
        got = pa.concat_tables(sorter.sorted()).drop_columns(sorting.KEY)
        expected = table.take(pa.array(np.argsort(key, kind="stable")))
        assert got.to_pydict() == expected.to_pydict()
        assert got.schema == table.schema


def test_nothing_in_nothing_out() -> None:
    assert list(sorting.Sorter(1 << 20).sorted()) == []


@pytest.mark.parametrize("keys", [1, 2, 9, 700, 1 << 62])
@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
def test_any_rank_of_the_runs_order_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: int, batch: int
) -> None:
    monkeypatch.setattr(runs, "RUN_ROWS", batch)
    table, key = rows_and_keys(keys, 900 if batch > 1 else 90)
    made, at = [], 0
    for number, size in enumerate((1, 40, 300, 7, len(key))):
        sorter = sorting.Sorter(1 << 20)
        sorter.add(table.slice(at, size), key[at : at + size])
        if sorter.rows:
            made.append(write_run(f"{tmp_path}/{number}.arrow", sorter.sorted()))
        at += size
    order = Order(made)
    assert order.rows == len(key)
    expected = np.argsort(key, kind="stable")
    run_of = np.repeat(np.arange(len(made)), [run.rows for run in made])[expected]
    for rank in [0, 1, 5, len(key) // 3, len(key) // 2, len(key) - 1, len(key)]:
        places = order.split(rank)
        assert places.tolist() == np.bincount(run_of[:rank], minlength=len(made)).tolist()
        before = [piece for run, stop in zip(made, places.tolist(), strict=True) for piece in read_run(run, 0, stop)]
        got = sorted(pa.concat_tables(before)["row"].to_pylist()) if before else []
        assert got == sorted(expected[:rank].tolist())
