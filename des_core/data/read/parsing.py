"""Numbers and times as logs write them: columns of text or of typed values -> numpy, and which are bad.

A time is unix seconds or ISO 8601; one that names no zone is in the source's. Times are int64
microseconds since 1970 UTC. The fast road converts a whole column at once; only a column that holds
something odd is looked at value by value.

Dims: R records.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit, uint64

from des_core.data.read.hashing import I64, Array, as_text, spans_of
from des_core.errors import ConfigError

F64 = np.ndarray[Any, np.dtype[np.float64]]
Bool = np.ndarray[Any, np.dtype[np.bool_]]

_MICROS = 1_000_000
_LAST_SECOND = 253_402_300_800
_FIRST_MILLIS = 631_152_000_000
"""1990 in milliseconds; 8 times as many are the year 2130."""
UNIX_UNITS = {"unix": 1_000_000, "unix_ms": 1000, "unix_us": 1}
"""Microseconds of a unit of ``source.time_format``."""
"""End of the year 9999. What is later is no date: most likely it counts milliseconds."""

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^[nN][aA][nN]$"


def is_text(array: pa.Array) -> bool:
    """Whether an array holds texts, plain or in a dictionary."""
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    )


def without_missing(array: pa.Array, missing: Sequence[str]) -> pa.Array:
    """``array`` with null for what means: no value, also where it is written as a number (-1 for "-1")."""
    if not missing:
        return array
    if not is_text(array):
        return _numbers_without_missing(array, missing)
    array = as_text(array)
    absent = pc.is_in(array, value_set=pa.array(missing, array.type))
    return pc.if_else(absent, pa.scalar(None, array.type), array)


def _numbers_without_missing(array: pa.Array, missing: Sequence[str]) -> pa.Array:
    numbers = [float(text) for text in missing if _is_number(text)]
    kind = array.type
    if not numbers or not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return array
    absent = pc.is_in(pc.cast(array, pa.float64(), safe=False), value_set=pa.array(numbers))
    return pc.if_else(absent, pa.scalar(None, kind), array)


def column_without_missing(column: pa.ChunkedArray, missing: Sequence[str]) -> pa.ChunkedArray:
    """As ``without_missing``, chunk by chunk."""
    chunks = [without_missing(chunk, missing) for chunk in column.chunks]
    return pa.chunked_array(chunks) if chunks else column


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece, copied only if it is in several."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def to_numbers(array: pa.Array, missing: Sequence[str] = ()) -> tuple[F64, Bool]:
    """Numbers [R], NaN where missing, and whether each is bad: no number, or too large for float32."""
    if is_text(array):
        values_R, bad_R = _text_numbers(array, missing)
    else:
        try:
            plain = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
            plain = without_missing(plain, missing)
            values_R, bad_R = _as_floats(pc.cast(plain, pa.float64(), safe=False)), np.zeros(len(array), np.bool_)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return np.full(len(array), np.nan), np.asarray(array.is_valid())
    huge_R = np.abs(values_R) > np.finfo(np.float32).max
    return (np.where(huge_R, np.nan, values_R), bad_R | huge_R) if huge_R.any() else (values_R, bad_R)


def _as_floats(numbers: pa.Array) -> F64:
    """Numbers [R], NaN for null."""
    values_R: F64 = numbers.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return values_R


def _text_numbers(array: pa.Array, missing: Sequence[str]) -> tuple[F64, Bool]:
    if any(_is_number(text) for text in missing):
        array = without_missing(array, missing)
    texts = as_text(array)
    values_R, bad_R = np.empty(len(texts)), np.zeros(len(texts), np.bool_)
    data, offsets, valid = spans_of(texts)
    other_R = _plain_numbers(data, offsets, valid, texts.offset, values_R)
    if other_R.any():
        values_R[other_R], bad_R[other_R] = _other_numbers(texts.filter(pa.array(other_R)), missing)
    return values_R, bad_R


def _other_numbers(texts: pa.Array, missing: Sequence[str]) -> tuple[F64, Bool]:
    try:
        return _as_floats(pc.cast(texts, pa.float64())), np.zeros(len(texts), np.bool_)
    except pa.ArrowInvalid:
        plain = pc.utf8_trim_whitespace(without_missing(texts, missing))
        right = pc.match_substring_regex(plain, _NUMBER)
        numbers = pc.cast(pc.if_else(right, plain, pa.scalar(None, plain.type)), pa.float64())
        return _as_floats(numbers), ~np.asarray(right.fill_null(True))


_POWERS = 10.0 ** np.arange(16)


@njit(nogil=True, cache=True)
def _plain_numbers(data: Array, offsets: Array, valid: Array, first: int, out_R: Array) -> Array:
    """Parse decimals of at most 15 digits, whose nearest float64 is one division away; mark all others."""
    other_R = np.zeros(len(out_R), np.bool_)
    for r in range(len(out_R)):
        out_R[r] = np.nan
        if len(valid) and not (valid[(first + r) >> 3] >> ((first + r) & 7)) & 1:
            continue
        at, stop = uint64(offsets[r]), uint64(offsets[r + 1])
        negative = at < stop and data[at] == 45
        at += uint64(negative)
        number, digits, point = 0, 0, -1
        while at < stop:
            c = data[at]
            if 48 <= c <= 57:
                number = number * 10 + (c - 48)
                digits += 1
            elif c == 46 and point < 0:
                point = digits
            else:
                digits = 99
            at += uint64(1)
        if digits == 0 or digits > 15:
            other_R[r] = True
            continue
        value = float(number)
        if point >= 0:
            value /= _POWERS[digits - point]
        out_R[r] = -value if negative else value
    return other_R


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_timezone(timezone: str) -> None:
    """Raises ``ConfigError`` for a name that the system's time zones do not hold."""
    try:
        ZoneInfo(timezone)
    except (ValueError, OSError, KeyError):
        raise ConfigError(f"source.timezone: no time zone {timezone!r}; write it as in Europe/Berlin") from None


def to_micros(array: pa.Array, timezone: str, missing: Sequence[str] = (), form: str = "") -> tuple[I64, Bool, Bool]:
    """Times [R] in microseconds (0 where there is none), whether each is missing, and whether it is bad.

    Args:
        form: ``source.time_format``.
    """
    array = without_missing(array, missing)
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    absent_R = ~np.asarray(array.is_valid())
    if "%" in form:
        times = _pattern_times(array, form, timezone)
    elif form in UNIX_UNITS:
        numbers_R, _ = to_numbers(array)
        right_R = np.abs(numbers_R) * UNIX_UNITS[form] < _LAST_SECOND * _MICROS
        times = pa.array(np.round(np.where(right_R, numbers_R, 0) * UNIX_UNITS[form]).astype(np.int64), mask=~right_R)
    elif is_text(array):
        times = _text_times(as_text(array), timezone, numbers=form != "iso")
    elif form == "iso" and not pa.types.is_temporal(array.type):
        times = pa.nulls(len(array), pa.int64())
    else:
        times = _typed_times(array, timezone)
    bad_R = ~np.asarray(times.is_valid()) & ~absent_R
    return times.fill_null(0).to_numpy(zero_copy_only=False), absent_R, bad_R


def _pattern_times(array: pa.Array, pattern: str, timezone: str) -> pa.Array:
    """Times by a strptime pattern, such as %y%m%d%H; null where one does not match."""
    texts = as_text(array)
    times = pc.strptime(texts, format=pattern, unit="us", error_is_null=True)
    return _since_1970(times, timezone)


def _typed_times(array: pa.Array, timezone: str) -> pa.Array:
    """int64 microseconds, null where there are none."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        return _typed_times(array.dictionary_decode(), timezone)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        if kind == pa.date64():
            array = array.cast(pa.date32())
        return _since_1970(array.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False), timezone)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _seconds(array)
    return pa.nulls(len(array), pa.int64())


def _seconds(array: pa.Array) -> pa.Array:
    """Unix seconds -> microseconds; null where they are no date."""
    whole = pa.types.is_integer(array.type)
    seconds = array.cast(pa.int64() if whole else pa.float64(), safe=False)
    right = pc.and_(pc.less(seconds, _LAST_SECOND), pc.greater(seconds, -_LAST_SECOND))
    micros = pc.multiply(pc.if_else(right, seconds, pa.scalar(None, seconds.type)), _MICROS)
    # Milliseconds and microseconds of our time are no seconds that anybody means.
    for least, unit in ((_FIRST_MILLIS, 1000), (_FIRST_MILLIS * 1000, 1)):
        meant = pc.and_(pc.greater_equal(seconds, least), pc.less(seconds, 8 * least))
        micros = pc.if_else(meant, pc.multiply(pc.if_else(meant, seconds, 0), unit), micros)
    return micros if whole else pc.round(micros).cast(pa.int64())


def _since_1970(times: pa.Array, timezone: str) -> pa.Array:
    """Timestamps in microseconds -> int64; naive ones are local times of ``timezone``."""
    if times.type.tz is None and timezone != "UTC":
        times = pc.assume_timezone(times, timezone, ambiguous="earliest", nonexistent="latest")
    return times.cast(pa.timestamp("us", times.type.tz)).cast(pa.int64())


def _text_times(texts: pa.Array, timezone: str, numbers: bool) -> pa.Array:
    """int64 microseconds, null where missing or bad: the whole column as one form, or else value by value."""
    for form in (*[pa.int64(), pa.float64()] * numbers, pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return _typed_times(pc.cast(texts, form), timezone)
        except pa.ArrowInvalid:
            continue
    zone = ZoneInfo(timezone)
    return pa.array([text and _one_time(text, zone, numbers) for text in texts.to_pylist()], pa.int64())


def _one_time(text: str, zone: ZoneInfo, numbers: bool) -> int | None:
    try:
        seconds = float(text if numbers else "")
    except ValueError:
        try:
            time = datetime.fromisoformat(text.strip())
            time = time if time.tzinfo else time.replace(tzinfo=zone)
            since = time - datetime(1970, 1, 1, tzinfo=UTC)
        except (ValueError, OverflowError):
            return None
        return (since.days * 86_400 + since.seconds) * _MICROS + since.microseconds
    for least, unit in ((_FIRST_MILLIS, 1000), (_FIRST_MILLIS * 1000, 1)):
        if least <= seconds < 8 * least:
            return round(seconds * unit)
    return round(seconds * _MICROS) if abs(seconds) < _LAST_SECOND else None


def local_times(micros: pa.Array, timezone: str) -> pa.Array:
    """Clock times in ``timezone``, timestamps without a zone, of int64 microseconds."""
    if timezone == "UTC":
        return micros.cast(pa.timestamp("us"))
    return pc.local_timestamp(micros.cast(pa.timestamp("us", timezone)))


def days_of(micros_R: I64, timezone: str) -> pa.Array:
    """Dates in ``timezone``, as texts like 2026-01-31."""
    return local_times(pa.array(micros_R), timezone).cast(pa.date32()).cast(pa.string())


def day_bounds(day: str, timezone: str) -> tuple[int, int] | None:
    """First microsecond of a date in ``timezone`` and of the next one; None for what is no date."""
    try:
        first = date.fromisoformat(day)
    except ValueError:
        return None
    zone = UTC if timezone == "UTC" else ZoneInfo(timezone)
    start, stop = (datetime.combine(first + timedelta(days=more), time(), zone) for more in (0, 1))
    return round(start.timestamp()) * _MICROS, round(stop.timestamp()) * _MICROS
