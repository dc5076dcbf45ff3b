"""Sorting in bounded memory equals sorting at once, ties and all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from des_core.data.store import sorting


@pytest.mark.parametrize(
    ("run", "fan_in", "merge_rows", "keys"),
    [
        (1 << 30, 64, 4096, 50),
        (1 << 30, 64, 4096, 1 << 62),
        (50_000, 64, 64, 50),
        (8000, 3, 16, 1 << 62),
        (8000, 2, 7, 1),
        (1, 5, 1000, 3),
    ],
)
def test_sorted_stream_equals_a_stable_sort(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: int, fan_in: int, merge_rows: int, keys: int
) -> None:
    for name, value in (("RUN_BYTES", run), ("SLICE_ROWS", 333), ("FAN_IN", fan_in), ("MERGE_ROWS", merge_rows)):
        monkeypatch.setattr(sorting, name, value)
    draw = np.random.default_rng(0)
    key = draw.integers(0, keys, 4000).astype(np.uint64)
    rows = np.arange(len(key))
    lists = pa.array([[row] * (row % 3) for row in rows.tolist()], pa.list_(pa.int64()))
    numbers = pa.array(rows.astype(np.float32), mask=rows % 5 == 0)
    table = pa.table({"row": rows, "list": lists, "number": numbers})
    sorter = sorting.Sorter(str(tmp_path))
    at = 0
    while at < len(rows):
        size = int(draw.integers(0, 300))
        sorter.add(table.slice(at, size), key[at : at + size])
        at += size
    spilled = len(os.listdir(tmp_path))
    got = pa.concat_tables(sorter.sorted())
    expected = table.take(pa.array(np.argsort(key, kind="stable")))
    assert got.to_pydict() == expected.to_pydict()
    assert got.schema == table.schema
    assert bool(spilled) == (run < 1 << 30)


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    assert list(sorting.Sorter(str(tmp_path)).sorted()) == []
