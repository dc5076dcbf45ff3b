"""Side tables: small tables, held in memory, whose columns are added to each record of the log.

Records and rows meet by the key of the value that both name. What these values are is settled by the side table
(forms.py), so that 7 in a Parquet file and "7.0" in a CSV are one. A record without a row gets missing values.

Dims: S rows of the side table, R records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from des_core import remote, storage
from des_core.config import JoinConfig, SourceConfig
from des_core.contracts import Form
from des_core.data.read.blocks import one_line
from des_core.data.read.delimited import read_delimited
from des_core.data.read.forms import form_of_values, in_form
from des_core.data.read.hashing import I64, as_text, hash_values
from des_core.data.read.parsing import column_without_missing, one_chunk
from des_core.errors import DataError, UnusableLogsError


@dataclass(frozen=True)
class Side:
    """A side table: the keys of its column ``on``, ascending, and its other columns in that order."""

    on: str
    form: Form
    keys_S: I64
    table: pa.Table

    @property
    def names(self) -> list[str]:
        """Columns that it gives."""
        return list(self.table.column_names)

    def look_up(self, values: pa.ChunkedArray, names: Sequence[str]) -> pa.Table:
        """Columns ``names`` for each of ``values`` [R], null where no row has the value."""
        try:
            keys_R = hash_values(in_form(one_chunk(values), self.form))
        except DataError as error:
            raise DataError(f"source.join.on = {self.on!r}, by its side table: {error}") from None
        if not len(self.keys_S):
            return self.table.select(list(names)).take(pa.nulls(len(keys_R), pa.int64()))
        places_R = np.minimum(np.searchsorted(self.keys_S, keys_R), len(self.keys_S) - 1)
        found_R = np.asarray(values.is_valid()) & (self.keys_S[places_R] == keys_R)
        return self.table.select(list(names)).take(pa.array(places_R, mask=~found_R))


def load_sides(source: SourceConfig) -> tuple[Side, ...]:
    """Every side table of a source.

    Raises:
        DataError: missing, not readable, without a column that it should have, or with a value of ``on`` twice.
    """
    return tuple(_load(join, source) for join in source.join)


def _load(join: JoinConfig, source: SourceConfig) -> Side:
    table = _read(join, source)
    for name in (join.on, *join.columns):
        if name not in table.column_names:
            has = ", ".join(table.column_names)
            raise DataError(f"{join.path}: no column {name!r} to join with; it has {has}; correct source.join")
    on = table.column(join.on)
    table = table.filter(on.is_valid())
    keys = one_chunk(table.column(join.on))
    form = form_of_values(keys)
    keys_S = hash_values(in_form(keys, form))
    order_S = np.argsort(keys_S, kind="stable")
    sorted_S = keys_S[order_S]
    twice = np.flatnonzero(sorted_S[1:] == sorted_S[:-1])
    if len(twice):
        value = as_text(table.column(join.on).take(pa.array(order_S[twice[:1]])).combine_chunks())[0].as_py()
        raise DataError(f"{join.path}: {join.on} {value!r} has more than one row; keep one row for each {join.on}")
    names = list(join.columns) or [name for name in table.column_names if name != join.on]
    return Side(join.on, form, sorted_S, table.select(names).take(pa.array(order_S)))


def _read(join: JoinConfig, source: SourceConfig) -> pa.Table:
    """The side table, null where a value is missing."""
    if not storage.exists(join.path):
        raise DataError(f"{join.path}: no such file; correct path in [[source.join]]")
    if join.path.lower().endswith((".parquet", ".parq", ".pq")):
        filesystem, path = storage.resolve(join.path)
        try:
            table = pq.read_table(path, filesystem=filesystem)
        except (OSError, pa.ArrowException) as error:
            remote.raise_passing(join.path, error)
            raise DataError(f"{join.path}: not a whole Parquet file ({one_line(error)})") from None
        return pa.table(
            {name: column_without_missing(table.column(name), source.missing) for name in table.column_names}
        )
    tables = []
    delimiter = source.delimiter if source.format == "csv" else ","
    quoting = source.quoting == "minimal"
    try:
        for raw in read_delimited(join.path, delimiter, quoting, True, source.missing, lambda names: names):
            if raw.bad:
                line, reason = raw.bad[0]
                raise DataError(f"{join.path}: line {line}: {reason}; a side table must be right as a whole")
            tables.append(raw.table)
    except UnusableLogsError as error:
        # Of the side table, not of the log that is joined to it.
        raise DataError(str(error)) from None
    if not tables:
        raise DataError(f"{join.path}: holds no rows; correct path in [[source.join]]")
    return pa.concat_tables(tables)
