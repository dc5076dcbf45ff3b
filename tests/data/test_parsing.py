"""Numbers and times: what is read, what is missing, what is bad."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_core.data.read.parsing import check_timezone, days_of, to_micros, to_numbers
from des_core.errors import ConfigError

UTC = dt.UTC


def numbers(values: list[Any], *missing: str) -> tuple[list[float | None], list[bool]]:
    found, bad = to_numbers(pa.array(values), missing)
    return [None if np.isnan(value) else float(value) for value in found], bad.tolist()


def times(values: list[Any] | pa.Array, timezone: str = "UTC") -> tuple[list[int | None], list[bool]]:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    micros, absent, bad = to_micros(array, timezone, ["NA"])
    unknown = absent | bad
    return [None if gone else int(value) for value, gone in zip(micros, unknown, strict=True)], bad.tolist()


def test_numbers_of_text() -> None:
    texts = ["1", " 2.5 ", "+3", "-1e3", "", "NA", "nan", None, "x", "1_0", "inf", "1e39", "0x1"]
    values, bad = numbers(texts, "", "NA")
    assert values == [1, 2.5, 3, -1000, *[None] * 9]
    assert bad == [False] * 8 + [True] * 5


def test_a_number_can_mean_no_value() -> None:
    assert numbers(["1", "-1"], "-1") == ([1, None], [False, False])


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_text_and_typed_numbers_agree(values: list[float]) -> None:
    texts = [repr(value) for value in values]
    assert (
        to_numbers(pa.array(texts, pa.string()))[0].tolist() == to_numbers(pa.array(values, pa.float64()))[0].tolist()
    )


@given(st.lists(st.none() | st.from_regex(r"-?([0-9]{1,18}\.?|[0-9]{0,9}\.[0-9]{1,12})", fullmatch=True)), st.data())
def test_decimals_are_the_nearest_floats(texts: list[str | None], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(texts)))
    array = pa.array(["x" if text is None else text for text in texts] + [None], pa.string())
    found, bad = to_numbers(array[start:])
    assert bad.tolist() == [text is None for text in texts[start:]] + [False]
    expected = [float("nan") if text is None else float(text) for text in [*texts[start:], None]]
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.signbit(found[~np.isnan(found)]).tolist() == [text.startswith("-") for text in texts[start:] if text]


def test_typed_numbers() -> None:
    assert numbers([1, None]) == ([1, None], [False, False])
    assert numbers([True, False]) == ([1, 0], [False, False])
    assert numbers([1.5, float("nan"), float("inf")]) == ([1.5, None, None], [False, False, True])
    assert numbers([[1], None])[1] == [True, False]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0", "1767225600"], [0, 1_767_225_600_000_000]),
        (["1767225600.25"], [1_767_225_600_250_000]),
        (["2026-01-01", "2026-01-01 00:00:01.5"], [1_767_225_600_000_000, 1_767_225_601_500_000]),
        (["2026-01-01T00:00:00Z", "2026-01-01T02:00:00+02:00"], [1_767_225_600_000_000] * 2),
        (["2026-01-01T00:00:00Z", "2026-01-01", "1767225600", " 1767225600 "], [1_767_225_600_000_000] * 4),
        ([1_767_225_600, None], [1_767_225_600_000_000, None]),
        ([1_767_225_600.5, float("nan")], [1_767_225_600_500_000, None]),
        ([dt.date(2026, 1, 1)], [1_767_225_600_000_000]),
        ([dt.datetime(2026, 1, 1), None], [1_767_225_600_000_000, None]),
        ([dt.datetime(2026, 1, 1, tzinfo=UTC)], [1_767_225_600_000_000]),
        (["NA", "1"], [None, 1_000_000]),
    ],
)
def test_times(values: list[Any], expected: list[int | None]) -> None:
    assert times(values) == (expected, [False] * len(expected))


def test_times_that_are_none() -> None:
    values, bad = times(["2026-01-01", "soon", "2026-13-01", None, "1767225600000", "2026-01-01T25:00:00"])
    assert values == [1_767_225_600_000_000, None, None, None, 1_767_225_600_000_000, None]
    assert bad == [False, True, True, False, False, True]
    assert times([1_767_225_600_000]) == ([1_767_225_600_000_000], [False]), "milliseconds are no seconds"
    assert times([400_000_000_000]) == ([None], [True]), "neither seconds nor milliseconds of our time"
    assert times([True]) == ([None], [True])


def test_a_time_without_a_zone_is_local() -> None:
    midnight = dt.datetime(2026, 7, 1, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    expected = [int(midnight.timestamp()) * 1_000_000]
    naive = [
        pa.array(["2026-07-01"]),
        pa.array([dt.datetime(2026, 7, 1)], pa.timestamp("ns")),
        pa.array([dt.date(2026, 7, 1)]),
        pa.array(["2026-07-01", "2026-06-30T22:00:00Z", "2026-07-01T00"])[2:],
    ]
    for array in naive:
        assert times(array, "Europe/Berlin")[0] == expected
    assert times(pa.array(["2026-06-30T22:00:00Z"]), "Europe/Berlin")[0] == expected


@given(st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2200, 1, 1)))
def test_all_forms_of_a_time_agree(moment: dt.datetime) -> None:
    moment = moment.replace(tzinfo=UTC)
    expected = (moment - dt.datetime(1970, 1, 1, tzinfo=UTC)) // dt.timedelta(microseconds=1)
    naive = moment.replace(tzinfo=None)
    for array in (pa.array([moment.isoformat()]), pa.array([naive]), pa.array([naive.isoformat(), "bad"])[:1]):
        assert times(array)[0] == [expected]
    odd, _, _ = to_micros(pa.array([naive.isoformat(), "bad"]), "UTC")
    assert odd[0] == expected, "value by value as a whole column"


def test_days_are_local() -> None:
    late = np.array([1_767_225_600_000_000 - 1, 1_767_225_600_000_000])
    assert days_of(late, "UTC").to_pylist() == ["2025-12-31", "2026-01-01"]
    assert days_of(late, "Asia/Tokyo").to_pylist() == ["2026-01-01", "2026-01-01"]


def test_unknown_zone() -> None:
    with pytest.raises(ConfigError, match="Mars/Base"):
        check_timezone("Mars/Base")


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.float32(), pa.decimal128(25, 1)])
def test_a_typed_number_can_mean_no_value_too(kind: pa.DataType) -> None:
    found, bad = to_numbers(pa.array([3, -1, None, 0]).cast(kind), ["", "-1", "NA"])
    assert np.isnan(found).tolist() == [False, True, True, False] and not bad.any()
    _, absent, bad = to_micros(pa.array([1_767_225_600, -1]), "UTC", ["-1"])
    assert (absent.tolist(), bad.tolist()) == ([False, True], [False, False])
