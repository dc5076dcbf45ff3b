"""Keys: the documented hash, bit for bit, whatever array holds the value."""

from __future__ import annotations

import datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_core.data.read.hashing import MISSING, as_text, hash_text, hash_values, splitmix64
from des_core.errors import DataError

WORD = (1 << 64) - 1


def mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & WORD
    return z ^ z >> 31


def signed(z: int) -> int:
    return z - (1 << 64) if z >> 63 else z


def reference(value: bytes | None) -> int:
    """The definition in the module's head, word by word."""
    if value is None:
        return signed(mix(0x6D697373696E6700))
    if not value:
        return signed(mix(0))
    h = len(value) * 0x9E3779B97F4A7C15 & WORD
    for at in range(0, len(value), 8):
        h = mix(h ^ int.from_bytes(value[at : at + 8], "little"))
    return signed(h)


@given(st.lists(st.none() | st.text(max_size=40)), st.data())
def test_texts_hash_as_documented_in_every_layout(values: list[str | None], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(values)))
    expected = [reference(None if value is None else value.encode()) for value in values]
    for kind in (pa.string(), pa.large_string()):
        array = pa.array(values, kind)
        assert hash_text(array).tolist() == expected
        assert hash_text(array[start:]).tolist() == expected[start:]
        assert hash_values(array.dictionary_encode()).tolist() == expected
        chunked = pa.chunked_array([array[:start], array[start:]], kind)
        assert hash_text(chunked).tolist() == expected
    raw = pa.array([None if value is None else value.encode() for value in values], pa.binary())
    assert hash_values(raw).tolist() == expected


def test_known_keys_never_change() -> None:
    # Stores and models on disk hold these.
    assert MISSING == -6561649948076160823 == reference(None)
    assert hash_text(pa.array(["", "7", "007", "12345678", "123456789"])).tolist() == [
        reference(text.encode()) for text in ("", "7", "007", "12345678", "123456789")
    ]
    assert reference(b"7") == 6063221543909367921
    assert int(splitmix64(np.uint64(0))) == 0xE220A8397B1DCDAF


def test_a_value_has_one_key_in_text_and_in_every_type() -> None:
    seven = reference(b"7")
    for kind in (pa.int8(), pa.uint64(), pa.int64(), pa.float32(), pa.float64(), pa.decimal128(25, 3)):
        array = pa.array([7, None]).cast(kind)
        assert hash_values(array).tolist() == [seven, MISSING], kind
        assert hash_values(array.dictionary_encode()).tolist() == [seven, MISSING], kind
    assert reference(b"007") != seven
    assert hash_values(pa.array([True, False, None])).tolist() == [reference(b"true"), reference(b"false"), MISSING]
    assert hash_values(pa.nulls(2)).tolist() == [MISSING, MISSING]


@given(st.integers(-(2**63), 2**63 - 1))
def test_integers_hash_in_decimal(value: int) -> None:
    assert hash_values(pa.array([value])).tolist() == [reference(str(value).encode())]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_hash_as_integers_or_shortest_decimals(value: float) -> None:
    text = str(int(value)) if value == int(value) else repr(value)
    assert hash_values(pa.array([value])).tolist() == [reference(text.encode())]


def test_odd_values_have_texts() -> None:
    floats = pa.array([0.1, -0.0, 1e-7, float("nan"), float("inf")])
    assert as_text(floats).to_pylist() == ["0.1", "0", "1e-07", None, "inf"]
    assert as_text(pa.array([0.1], pa.float32())).to_pylist() == ["0.1"]
    decimals = pa.array([Decimal("4.50"), Decimal("100.00"), None])
    assert as_text(decimals).to_pylist() == ["4.5", "100", None]
    moment = datetime.datetime(2026, 1, 31, 12)
    seconds, nanos = pa.array([moment], pa.timestamp("s")), pa.array([moment], pa.timestamp("ns"))
    assert as_text(seconds) == as_text(nanos)


def test_lists_are_no_values() -> None:
    with pytest.raises(DataError, match="multi"):
        hash_values(pa.array([[1, 2]]))
    with pytest.raises(DataError, match="UTF-8"):
        as_text(pa.array([b"\xff"]))
