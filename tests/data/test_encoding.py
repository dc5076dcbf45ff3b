"""Raw values to features: by hand, and the same from text and from typed values."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_core.config import FieldConfig, parse_config
from des_core.contracts import FieldSpec
from des_core.data.read.hashing import MISSING, hash_text
from des_core.data.store.encoding import encode, encode_checked, fields_of, specs_of
from des_core.errors import DataError

NO_VALUE = ("", "NA")


def spec(name: str = "f", **options: Any) -> FieldSpec:
    return specs_of([FieldConfig(name=name, **options)])[0]


def features(*fields: FieldSpec, timezone: str = "UTC", **columns: Any) -> dict[str, list[Any]]:
    arrays = {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    found: dict[str, list[Any]] = encode(pa.table(arrays), fields, timezone, NO_VALUE).to_pydict()
    return found


def keys(*texts: str | None) -> list[int]:
    found: list[int] = hash_text(pa.array(texts, pa.string())).tolist()
    return found


def test_categories() -> None:
    assert features(spec(), f=["a", "007", "", "NA", None]) == {"f": keys("a", "007", None, None, None)}
    assert features(spec(column="x"), x=[7, None]) == {"f": keys("7", None)}
    assert features(spec(), f=pa.array(["a", "NA", None]).dictionary_encode()) == {"f": keys("a", None, None)}
    assert features(spec(weight="w"), f=["a", "b"], w=["2.5", ""]) == {"f": keys("a", "b"), "weight:f": [2.5, 1.0]}


def test_lists() -> None:
    expected = [keys("a", "b"), keys(None), keys("b"), keys(None), keys("a")]
    field = spec(kind="multi")
    assert features(field, f=["a|b", "", "|b|NA", None, "a"]) == {"f": expected}
    typed = pa.array([["a", "b"], [], ["", "b", None], None, ["a"]])
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        assert features(field, f=typed.cast(kind)) == {"f": expected}
    assert features(spec(kind="multi", separator=", "), f=["x, y"]) == {"f": [keys("x", "y")]}
    assert features(field, f=pa.array([[1, 2], [3]])) == {"f": [keys("1", "2"), keys("3")]}
    assert features(field, f=[5, None]) == {"f": [keys("5"), keys(None)]}
    fixed = pa.array([[1, 2]], pa.list_(pa.int64(), 2))
    assert features(field, f=fixed) == {"f": [keys("1", "2")]}


def test_weights_of_lists() -> None:
    field = spec(kind="multi", weight="w")
    expected = {"f": [keys("a", "b"), keys("b"), keys(None), keys("c")], "weight:f": [[0.5, 2], [3], [1], [1]]}
    assert features(field, f=["a|b", "|b", "", "c"], w=["0.5|2", "9|3", "", ""]) == expected
    lists = {"f": [["a", "b"], ["NA", "b"], [], ["c"]], "w": [[0.5, 2], [9, 3], [], None]}
    assert features(field, **lists) == expected
    found = encode_checked(pa.table({"f": ["a|b", "a", "a"], "w": ["1", "x", "1"]}), [field], "UTC", NO_VALUE)
    assert found.faults == {0: "column w: 1 weights for 2 values of f", 1: "column w: 'x' is not a number"}


def test_a_cross_is_the_hash_of_its_parts_keys() -> None:
    """As of a text of their bytes, in order; declared before them or after, of typed values or texts."""
    parts = [FieldConfig(name="user"), FieldConfig(name="shop", column="s")]
    cross, back = (FieldConfig(name=name, cross=of) for name, of in (("c", ("user", "shop")), ("b", ("shop", "user"))))
    columns = {"user": [7, 7, None, None], "s": ["x", None, "x", None]}

    def key(*parts: str | None) -> int:
        texts = [np.array(keys(part), "<i8").tobytes() for part in parts]
        return hash_text(pa.array([b"".join(texts)])).tolist()[0]

    expected = [key("7", "x"), key("7", None), key(None, "x"), MISSING]
    for fields in ([cross, *parts, back], [*parts, back, cross]):
        found = features(*specs_of(fields), **columns)
        assert found["c"] == expected
        assert found["b"] == [key("x", "7"), key(None, "7"), key("x", None), MISSING]
    assert len({*expected, *found["b"]}) == 7
    encoded = encode_checked(pa.table(columns), specs_of([*parts, cross]), "UTC", NO_VALUE)
    assert encoded.values["c"][1].to_pylist()[:2] == ["7 x x", "7 x (missing)"]


def test_numbers_stay_raw() -> None:
    for transform in ("", "log1p", "standard", "bucket"):
        field = spec(kind="numeric", transform=transform)
        assert features(field, f=["1.5", "NA", "", "nan", "-3"]) == {"f": [1.5, None, None, None, -3]}
    assert features(spec(kind="numeric"), f=[1, None]) == {"f": [1, None]}
    assert features(spec(kind="numeric"), f=[0.1, float("nan")]) == {"f": [pytest.approx(0.1, rel=1e-7), None]}


@pytest.mark.parametrize(
    "times",
    [
        pa.array(["2026-01-04T23:30:00Z", "NA", None]),
        pa.array(["1767569400", "", None]),
        pa.array([1767569400, None, None]),
        pa.array([dt.datetime(2026, 1, 4, 23, 30, tzinfo=dt.UTC), None, None]),
    ],
)
def test_parts_of_a_time(times: pa.Array) -> None:
    for timezone, expected in (("UTC", ("23", "6", "2026")), ("Europe/Berlin", ("0", "0", "2026"))):
        for derive, text in zip(("hour", "weekday", "year"), expected, strict=True):
            assert features(spec(column="t", derive=derive), timezone=timezone, t=times) == {
                "f": keys(text, None, None)
            }
    assert features(spec(column="t", derive="hour", kind="numeric"), t=times) == {"f": [23, None, None]}


def test_the_first_group_of_a_pattern() -> None:
    titles = ["Alien (1979)", "Alien", None, "(1979) (1980)"]
    assert features(spec(derive=r"regex:\((\d{4})\)$"), f=titles) == {"f": keys("1979", None, None, "1980")}
    assert features(spec(derive=r"regex:\d+"), f=titles) == {"f": keys("1979", None, None, "1979")}
    assert features(spec(derive=r"regex:\((\d+)\)", kind="numeric"), f=titles) == {"f": [1979, None, None, 1979]}
    assert features(spec(derive=r"regex:^(\w+)", kind="multi", separator="l"), f=["Alien"]) == {"f": [keys("A", "ien")]}
    # A list takes all that is found, another field the first.
    assert features(spec(derive=r"regex:#(\w+)", kind="multi"), f=["#a b #c", "none"]) == {
        "f": [keys("a", "c"), keys(None)]
    }
    assert features(spec(derive=r"regex:#(\w+)"), f=["#a b #c"]) == {"f": keys("a")}
    assert features(spec(derive=r"regex:(?<=0)7"), f=["007"]) == {"f": keys("7")}
    assert features(spec(derive=r"regex:(\d)$"), f=[17, 23]) == {"f": keys("7", "3")}


@given(st.lists(st.none() | st.integers(-(2**53), 2**53), min_size=1))
def test_text_and_typed_records_give_the_same_features(values: list[int | None]) -> None:
    fields = specs_of(
        [
            FieldConfig(name="c", column="x"),
            FieldConfig(name="n", column="x", kind="numeric"),
            FieldConfig(name="m", column="x", kind="multi"),
        ]
    )
    texts = ["" if value is None else str(value) for value in values]
    floats = pa.array(values, pa.int64()).cast(pa.float64())
    expected = encode(pa.table({"x": texts}), fields, "UTC", NO_VALUE)
    for column in (pa.array(values, pa.int64()), floats, pa.array(texts).dictionary_encode()):
        assert encode(pa.table({"x": column}), fields, "UTC", NO_VALUE) == expected
    pieces = pa.chunked_array([pa.array(texts[:1]), pa.array(texts[1:], pa.string())])
    assert encode(pa.table({"x": pieces}), fields, "UTC", NO_VALUE) == expected


def test_no_records() -> None:
    fields = specs_of(
        [
            FieldConfig(name="c"),
            FieldConfig(name="m", kind="multi", weight="w"),
            FieldConfig(name="n", kind="numeric"),
            FieldConfig(name="h", column="c", derive="hour"),
            FieldConfig(name="r", column="c", derive="regex:(a)"),
        ]
    )
    empty = pa.table({name: pa.array([], pa.string()) for name in ("c", "m", "w", "n")})
    found = encode(empty, fields, "UTC", NO_VALUE)
    assert found.num_rows == 0
    assert found.schema == encode(pa.table({key: ["1"] for key in "cmwn"}), fields, "UTC", NO_VALUE).schema


@pytest.mark.parametrize(
    ("options", "values", "message"),
    [
        ({"kind": "numeric"}, ["1", "x"], "record 2: column f: 'x' is not a number"),
        ({"kind": "numeric"}, [[1.0]], "field f: column f holds list"),
        ({}, [["a"]], "field f: column f holds list.*multi"),
        ({"derive": "hour"}, ["soon"], "record 1: column f: 'soon' is neither unix seconds nor ISO 8601"),
        ({"column": "g"}, ["x"], "field f: no column 'g'; the records have f"),
        ({"kind": "numeric"}, ["9" * 99], "record 1: column f: '9{36}\\.\\.\\. is not a number"),
    ],
)
def test_values_that_do_not_fit(options: dict[str, Any], values: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        features(spec(**options), f=values)


def test_fields_follow_from_the_format() -> None:
    def of(form: str, **more: Any) -> tuple[FieldConfig, ...]:
        path = {} if form == "synthetic" else {"path": "/x"}
        return fields_of(parse_config({"run": {"name": "r"}, "source": {"format": form, **path}, **more}))

    criteo = of("criteo")
    assert [field.name for field in criteo] == [*(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
    assert {field.transform for field in criteo[:13]} == {"log1p"}
    assert [(field.kind, field.weight, field.pooling) for field in of("libsvm")] == [("multi", "values", "sum")]
    assert {"user", "item", "tags", "price"} <= {field.name for field in of("synthetic")}
    assert [field.name for field in of("criteo", fields=[{"name": "C1"}])] == ["C1"]
    assert keys(None)[0] == MISSING


def test_blanks_around_listed_values_are_none_of_theirs() -> None:
    assert features(spec(kind="multi"), f=["Comedy| Drama |", " | "]) == {"f": [keys("Comedy", "Drama"), keys(None)]}
    assert features(spec(kind="multi"), f=[[" Drama"]]) == {"f": [keys(" Drama")]}, "typed values stay as they are"


@pytest.mark.parametrize("make", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view])
def test_lists_of_every_type(make: Any) -> None:
    values = pa.array([["a", "b"], [], None, ["c"]], make(pa.string()))
    assert features(spec(kind="multi"), f=values) == {"f": [keys("a", "b"), keys(None), keys(None), keys("c")]}


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.list_(pa.int64())),
        pa.list_(pa.struct([("x", pa.int64())])),
        pa.struct([("x", pa.int64())]),
        pa.map_(pa.string(), pa.int64()),
    ],
)
def test_nested_values_are_no_list(kind: pa.DataType) -> None:
    with pytest.raises(DataError, match=r"field f: (objects|lists of lists) are no list of plain values; flatten them"):
        features(spec(kind="multi"), f=pa.nulls(2, kind))
