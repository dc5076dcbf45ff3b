"""Drift of a day: nothing where nothing changed, each kind of change in its own number, ordinary days within bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from des_core.config import GateConfig, parse_config
from des_core.contracts import FieldSpec, Part
from des_core.data.read import synthetic
from des_core.data.read.hashing import MISSING
from des_core.data.store import drift
from des_core.data.store.encoding import fields_of, specs_of
from des_core.data.store.features import ingest
from des_core.data.store.parts import PartManifest, manifest_uri, write_rows

CATEGORY = FieldSpec(name="c", column="c", table="c", kind="categorical")
TAGS = FieldSpec(name="t", column="t", table="t", kind="multi")
NUMBER = FieldSpec(name="n", column="n", table="n", kind="numeric", transform="standard", mean=3.0, std=2.0)


def part(root: Path, name: str, spec: str = "one", **columns: pa.Array) -> None:
    written = write_rows(str(root), name, [pa.table(columns)], lambda _: None)
    manifest = PartManifest(spec=spec, sources=(), files=0, part=Part(files=(written,)), texts={})
    manifest.write(manifest_uri(str(root), name))


def categories(seed: int, rows: int = 5_000, most: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).zipf(1.4, rows) % most


def measured(root: Path, field: FieldSpec, day: str, *earlier: str) -> dict[str, float]:
    return drift.measure(str(root), [field], day, earlier)[field.name]


def test_days_alike_differ_by_chance_alone(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for day in range(4):
        values = np.where(numbers.random(5_000) < 0.1, np.nan, numbers.lognormal(2, 1.5, 5_000)).astype(np.float32)
        part(tmp_path, f"d{day}", c=pa.array(categories(day)), n=pa.array(values))
    found = drift.measure(str(tmp_path), [CATEGORY, NUMBER], "d3", ["d0", "d1", "d2"])
    for field in found.values():
        assert field["psi"] < 0.01
        assert field["new_share"] < 0.01
        assert field["missing_share"] == pytest.approx(field["missing_before"], abs=0.02)
    assert found["n"]["missing_share"] == pytest.approx(0.1, abs=0.02)


def test_chance_alone_is_taken_off_few_rows_too(tmp_path: Path) -> None:
    part(tmp_path, "before", c=pa.array(categories(0, 200)))
    found = []
    for day in range(40):
        part(tmp_path, f"d{day}", c=pa.array(categories(day + 1, 200)))
        found.append(measured(tmp_path, CATEGORY, f"d{day}", "before")["psi"])
    assert np.mean(found) < 0.08, "a day of 200 rows is no drift"


def test_psi_is_the_sum_over_bins(tmp_path: Path) -> None:
    part(tmp_path, "before", c=pa.array(np.repeat([1, 2, 3], [5_000, 3_000, 2_000])))
    part(tmp_path, "day", c=pa.array(np.repeat([1, 2, 3], [2_000, 3_000, 5_000])))
    expected = (0.2 - 0.5) * np.log(0.2 / 0.5) + (0.5 - 0.2) * np.log(0.5 / 0.2) - 2 * 2 / 10_000
    assert measured(tmp_path, CATEGORY, "day", "before")["psi"] == pytest.approx(expected, abs=2e-4)


def test_a_number_that_moves_shows_whatever_its_tail(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    usual = random.lognormal(2, 2, 20_000)
    for name, values in (("before", usual), ("same", random.lognormal(2, 2, 20_000)), ("more", 5 * usual)):
        part(tmp_path, name, n=pa.array(values.astype(np.float32)))
    assert measured(tmp_path, NUMBER, "same", "before")["psi"] < 0.01
    assert measured(tmp_path, NUMBER, "more", "before")["psi"] > 0.5


@pytest.mark.parametrize("many", [500, 300_000], ids=["counted", "estimated"])
def test_new_values_are_those_that_no_day_before_had(tmp_path: Path, many: int) -> None:
    random = np.random.default_rng(5)
    old = random.integers(0, many, 2 * many)
    part(tmp_path, "d0", c=pa.array(old[:many]))
    part(tmp_path, "d1", c=pa.array(old[many:]))
    day = np.concatenate([old[::4], random.integers(1 << 40, 1 << 41, many // 10)])
    part(tmp_path, "day", c=pa.array(day))
    truth = float((~np.isin(day, old)).mean())
    exact = measured(tmp_path, CATEGORY, "day", "d0", "d1")["new_share"]
    assert exact == pytest.approx(truth, abs=0.05 if many > 1_000 else 1e-12)
    half = float((~np.isin(day, old[:many])).mean())
    assert measured(tmp_path, CATEGORY, "day", "d0")["new_share"] == pytest.approx(half, abs=0.05)


def test_missing_values_are_neither_new_nor_moved(tmp_path: Path) -> None:
    keys = categories(1)
    part(tmp_path, "before", c=pa.array(keys), t=pa.array([[1], [2, 3]] * 2_500))
    part(
        tmp_path,
        "day",
        c=pa.array(np.where(np.arange(5_000) % 2, keys, MISSING)),
        t=pa.array([[MISSING], [1], [2, 3], [1], [2, 3]] * 1_000),
    )
    found = drift.measure(str(tmp_path), [CATEGORY, TAGS], "day", ["before"])
    assert found["c"]["missing_share"] == 0.5 and found["t"]["missing_share"] == 0.2
    for field in found.values():
        assert (field["new_share"], field["missing_before"]) == (0, 0)
        assert field["psi"] < 0.01


def test_a_column_that_is_gone_says_so_and_one_that_came_moves_nothing(tmp_path: Path) -> None:
    gone = np.full(5_000, MISSING)
    none = pa.array(np.full(5_000, np.nan, np.float32))
    part(tmp_path, "with", c=pa.array(categories(1)), n=pa.array(np.arange(5_000, dtype=np.float32)))
    part(tmp_path, "without", c=pa.array(gone), n=none)
    for name, other, missing in (("without", "with", (1.0, 0.0)), ("with", "without", (0.0, 1.0))):
        for field in drift.measure(str(tmp_path), [CATEGORY, NUMBER], name, [other]).values():
            assert (field["missing_share"], field["missing_before"]) == missing
            assert field["psi"] == 0.0


def test_days_that_cannot_be_compared_say_nothing(tmp_path: Path) -> None:
    part(tmp_path, "day", c=pa.array(categories(1)))
    part(tmp_path, "few", c=pa.array(categories(2, 50)))
    part(tmp_path, "other", spec="two", x=pa.array(categories(3)))
    for earlier in ([], ["day"], ["nowhere"], ["few"], ["other"]):
        assert drift.measure(str(tmp_path), [CATEGORY], "day", earlier) == {}
    assert drift.measure(str(tmp_path), [CATEGORY], "nowhere", ["day"]) == {}
    assert drift.measure(str(tmp_path), [CATEGORY], "few", ["day"]) == {}


def test_the_calendar_does_not_drift(tmp_path: Path) -> None:
    weekday = CATEGORY.model_copy(update={"derive": "weekday"})
    for name in ("a", "b"):
        part(tmp_path, name, c=pa.array(categories(1)))
    assert drift.measure(str(tmp_path), [weekday], "b", ["a"]) == {}


@pytest.mark.parametrize("rows", [1_000, 5_000])
def test_a_week_of_the_demo_passes_and_a_day_without_a_column_does_not(tmp_path: Path, rows: int) -> None:
    source = {"format": "synthetic", "days": 7, "rows_per_day": rows}
    config = parse_config(
        {"run": {"name": "demo"}, "source": source, "split": {"by": "day"}, "storage": {"root": str(tmp_path)}}
    )
    ingest(config)
    days = [synthetic.day_name(day) for day in range(7)]
    bounds = GateConfig()
    for number in range(1, 7):
        found = drift.measure(config.features_root, specs_of(fields_of(config)), days[number], days[:number])
        assert sorted(found) == sorted(field.name for field in synthetic.FIELDS)
        for name, field in found.items():
            assert field["psi"] < bounds.max_psi / 2, (number, name)
            assert field["missing_share"] - field["missing_before"] < bounds.max_missing_share / 4, (number, name)
        assert 0 < found["user"]["new_share"] < 0.1
