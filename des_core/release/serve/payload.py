"""A request's body -> a table of the columns that the model reads, by MLflow's scoring protocol.

    application/json   {"dataframe_split": {"columns": [...], "data": [[...]]}}
                       {"dataframe_records": [{...}]}, and so "instances"
                       {"inputs": {column: [...]}}, or one record {column: value}, or as dataframe_records
    text/csv           a header line, then records

Other columns are left out, values keep their types; a field brings them to its form (data/forms.py).
null, NaN and an absent key of a record are missing values. No message repeats anything but names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv

from des_core.errors import DataError

Columns = dict[str, Sequence[Any]]

MAX_VALUES = 1_000_000
"""Commas and ends of lines in a body: at least as many as it has values, nearly."""


class TooManyError(DataError):
    """More records than are read at once."""


def read(body: bytes, kind: str, wanted: Collection[str]) -> pa.Table:
    """The wanted columns, as far as the body has them.

    Args:
        kind: the content type, one of ``READERS``.

    Raises:
        DataError: the body is not of this kind or form.
    """
    if not body.strip():
        raise DataError("the body is empty")
    # Each value takes many times its bytes while it is read: their number is bounded before any is.
    if body.count(b",") + body.count(b"\n") > MAX_VALUES:
        raise TooManyError(f"the body holds more than {MAX_VALUES:,} values; send fewer records at once")
    return READERS[kind](body, wanted)


def _csv(body: bytes, wanted: Collection[str]) -> pa.Table:
    options = pcsv.ConvertOptions(column_types=dict.fromkeys(wanted, pa.string()))
    lines = pcsv.ParseOptions(newlines_in_values=True)
    try:
        table = pcsv.read_csv(pa.BufferReader(body), parse_options=lines, convert_options=options)
    except pa.ArrowException:
        # Arrow's own words quote the line.
        raise DataError("the body is not CSV in UTF-8: a header line, and as many values in every line") from None
    places = {name: place for place, name in enumerate(table.column_names) if name in wanted}
    for name in places:
        if table.column_names.count(name) > 1:
            raise DataError(f"two columns are named {name!r}")
    return table.select(list(places.values()))


def _json(body: bytes, wanted: Collection[str]) -> pa.Table:
    try:
        document = json.loads(body)
    except json.JSONDecodeError as error:
        raise DataError(f"the body is not JSON: {error.msg} at byte {error.pos}") from None
    except (ValueError, RecursionError):
        raise DataError("the body is not JSON in UTF-8, or nested too deeply") from None
    forms = [form for form in FORMS if isinstance(document, dict) and form in document]
    if len(forms) != 1:
        raise DataError(f"the body must be a JSON object with one of {', '.join(FORMS)}")
    try:
        columns = FORMS[forms[0]](document[forms[0]], wanted)
    except DataError as error:
        raise DataError(f"{forms[0]}: {error}") from None
    return pa.table({name: column(name, values) for name, values in columns.items()})


def _split(data: Any, wanted: Collection[str]) -> Columns:
    names, rows = (data.get("columns"), data.get("data")) if isinstance(data, dict) else (None, None)
    if not isinstance(names, list) or not isinstance(rows, list):
        raise DataError("write it as an object with the lists columns and data")
    if not all(isinstance(name, str) for name in names):
        raise DataError("columns: every name must be text")
    for row, values in enumerate(rows):
        if not isinstance(values, list) or len(values) != len(names):
            raise DataError(f"record {row + 1} is no list of {len(names)} values, one for each column")
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    found: Columns = {}
    for name, values in zip(names, columns, strict=True):
        if name in found:
            raise DataError(f"two columns are named {name!r}")
        if name in wanted:
            found[name] = values
    return found


def _records(data: Any, wanted: Collection[str]) -> Columns:
    if not isinstance(data, list) or not all(isinstance(record, dict) for record in data):
        raise DataError("write it as a list of objects, one for each record")
    if not data:
        return {name: [] for name in wanted}
    return {name: [record.get(name) for record in data] for name in wanted if any(name in record for record in data)}


def _inputs(data: Any, wanted: Collection[str]) -> Columns:
    if not isinstance(data, dict):
        return _records(data, wanted)
    if not any(isinstance(values, list) for values in data.values()):
        return _records([data], wanted)
    found: Columns = {name: data[name] for name in wanted if name in data}
    length = next((len(values) for values in found.values() if isinstance(values, list)), 0)
    for name, values in found.items():
        if not isinstance(values, list) or len(values) != length:
            raise DataError(f"column {name!r} is no list of {length} values, as the first column is")
    return found


def column(name: str, values: Sequence[Any]) -> pa.Array:
    """One column; values of several types become texts.

    Raises:
        DataError: they are of no type that a field reads.
    """
    try:
        try:
            return pa.array(values)
        except (pa.ArrowException, OverflowError):
            if not any(isinstance(value, list) for value in values):
                return pa.array([_text(name, value) for value in values], pa.string())
        if not all(value is None or isinstance(value, list) for value in values):
            raise DataError(f"column {name!r} holds lists in some records only")
        listed = [value and [_text(name, item) for item in value] for value in values]
        return pa.array(listed, pa.list_(pa.string()))
    except UnicodeEncodeError:
        raise DataError(f"column {name!r} holds text that is not valid Unicode") from None


def _text(name: str, value: Any) -> str | None:
    """A value as a log in text would write it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value != value:
            return None
        return repr(value)
    if isinstance(value, int):
        return str(value)
    raise DataError(f"column {name!r} holds an object or a list where a value must be")


FORMS: dict[str, Callable[[Any, Collection[str]], Columns]] = {
    "dataframe_split": _split,
    "dataframe_records": _records,
    "instances": _records,
    "inputs": _inputs,
}

READERS: dict[str, Callable[[bytes, Collection[str]], pa.Table]] = {"application/json": _json, "text/csv": _csv}
"""By content type."""
