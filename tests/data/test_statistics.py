"""Sketches: exact where they fit, close where they do not, and the same by parts as at once."""

from __future__ import annotations

from collections import Counter as Count

import numpy as np
import pyarrow as pa
import pytest

from des_core.contracts import FieldSpec
from des_core.data.read.hashing import MISSING, hash_text
from des_core.data.store import statistics
from des_core.data.store.statistics import (
    Counter,
    Sketch,
    Sketcher,
    ValueTexts,
    distinct,
    merged,
    stats_of,
    with_statistics,
)

CATEGORY = FieldSpec(name="c", column="c", table="c", kind="categorical")
TAGS = FieldSpec(name="t", column="t", table="t", kind="multi")
BUCKET = FieldSpec(name="n", column="n", table="n", kind="numeric", transform="bucket")


def sketch(spec: FieldSpec, column: pa.Array, start: int = 0) -> Sketch:
    sketcher = Sketcher(spec)
    draws = np.random.default_rng(0).integers(0, 1 << 63, start + len(column)).astype(np.uint64)
    sketcher.add(column, draws[start:])
    return sketcher.result()


def same(one: Sketch, other: Sketch) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "sampled")
        for name in ("rows", "missing", "lookups", "keys", "counts", "registers", "draws", "sampled")
    )


def test_categories_are_counted_exactly() -> None:
    keys = np.random.default_rng(1).zipf(1.3, 20_000) % 5000
    keys[::10] = MISSING
    found = sketch(CATEGORY, pa.array(keys))
    count = Count(keys.tolist())
    assert dict(zip(found.keys.tolist(), found.counts.tolist(), strict=True)) == dict(count)
    stats = stats_of(CATEGORY, found, {1: "one"})
    assert stats.cardinality == len(count)
    assert stats.missing_share == count[MISSING] / len(keys)
    assert stats.lookups_per_sample == 1
    expected = sorted(count.items(), key=lambda item: (-item[1], item[0]))[:20]
    assert [(key, times) for key, times, _ in stats.top] == expected
    assert {key: text for key, _, text in stats.top}.items() >= {1: "one", MISSING: "(missing)"}.items()


def test_lists_are_counted_by_value() -> None:
    found = stats_of(TAGS, sketch(TAGS, pa.array([[1, 2], [1], [MISSING], [1, 3, 3]])), {})
    assert (found.lookups_per_sample, found.missing_share, found.cardinality) == (7 / 4, 1 / 4, 4)
    assert found.top[0][:2] == (1, 3)


@pytest.mark.parametrize("size", [200_000, 1_000_000])
def test_many_keys_are_estimated(size: int) -> None:
    draw = np.random.default_rng(2)
    keys = draw.integers(0, 1 << 62, size)
    hot = np.repeat(np.arange(30), np.arange(30) * 200)
    column = np.concatenate([keys, hot])
    draw.shuffle(column)
    found = sketch(CATEGORY, pa.array(column))
    assert distinct(found) == pytest.approx(size + 29, rel=0.03)
    assert len(found.keys) <= statistics.MOST_KEYS
    top = stats_of(CATEGORY, found, {}).top
    assert [key for key, _, _ in top] == list(range(29, 9, -1))
    for key, count, _ in top:
        assert 0.9 * key * 200 <= count <= key * 200, "never above the truth"


def test_parts_add_up_to_the_whole() -> None:
    draw = np.random.default_rng(3)
    cases = [
        (CATEGORY, pa.array(draw.integers(0, 40_000, 60_000))),
        (TAGS, pa.array([[int(x)] * (x % 3 + 1) for x in draw.integers(0, 99, 5000)])),
        (BUCKET, pa.array(draw.normal(3, 2, 90_000).astype(np.float32), mask=draw.random(90_000) < 0.1)),
    ]
    for spec, column in cases:
        cut = len(column) // 3
        whole = sketch(spec, column)
        parts = [sketch(spec, column[:cut]), sketch(spec, column[cut:], cut)]
        added = merged(spec, parts)
        assert same(whole, added)
        assert same(added, merged(spec, [added]))
        assert added.mean == pytest.approx(whole.mean, rel=1e-12)
        assert added.squares == pytest.approx(whole.squares, rel=1e-9)


def test_many_keys_add_up_too() -> None:
    keys = np.random.default_rng(4).integers(0, 1 << 62, 300_000)
    whole = Counter()
    whole.add(keys)
    parts = Counter()
    for piece in np.array_split(keys, 3):
        counter = Counter()
        counter.add(piece)
        found, counts, registers = counter.result()
        parts.merge(Sketch(keys=found, counts=counts, registers=registers))
    assert np.array_equal(whole.result()[2], parts.result()[2])


def test_numbers_have_mean_deviation_and_quantiles() -> None:
    draw = np.random.default_rng(5)
    values = draw.exponential(5, 200_000).astype(np.float32)
    column = pa.array(values, mask=draw.random(len(values)) < 0.2)
    present = np.asarray(column.drop_null())
    found = sketch(BUCKET, column)
    spec = with_statistics(BUCKET, found)
    assert spec.mean == pytest.approx(present.mean(dtype=np.float64), rel=1e-9)
    assert spec.std == pytest.approx(present.std(dtype=np.float64), rel=1e-9)
    assert len(spec.edges) == 31
    shares = np.searchsorted(np.sort(present), spec.edges) / len(present)
    assert np.abs(shares - np.arange(1, 32) / 32).max() < 0.01
    stats = stats_of(spec, found, {})
    assert (stats.cardinality, stats.lookups_per_sample, stats.top) == (33, 1, ())
    assert stats.missing_share == pytest.approx(0.2, abs=0.01)


def test_numbers_that_never_vary_or_never_are() -> None:
    constant = with_statistics(BUCKET, sketch(BUCKET, pa.array([2.0, 2.0], pa.float32())))
    assert (constant.mean, constant.std, set(constant.edges)) == (2.0, 1.0, {2.0})
    empty = with_statistics(BUCKET, sketch(BUCKET, pa.nulls(3, pa.float32())))
    assert (empty.mean, empty.std, empty.edges) == (0.0, 1.0, ())


def test_texts_of_frequent_values_add_up_over_samples() -> None:
    texts, whole = ValueTexts(), ValueTexts()
    for chunk in range(8):
        values = pa.array([f"rare{chunk}-{i}" for i in range(300)] + ["hot"] * 6 + ["warm"] * 4 + [None])
        whole.add(hash_text(values), values)
        one = ValueTexts()
        one.add(hash_text(values), values)
        texts.merge(list(one.counts), list(one.counts.values()), [one.texts[key] for key in one.counts])
    found = texts.result()
    assert found == whole.result()
    assert [text for _, text in found[:2]] == ["hot", "warm"]
    assert found[0][0] == hash_text(pa.array(["hot"]))[0]
    assert len(found) <= 128
