"""Records -> features: the one road from raw values to keys and numbers, in ingestion and in serving.

    categorical   int64 key
    multi         list<int64>: the keys of the listed values that are not missing, or else the one key MISSING
    cross         int64 key: the hash of its parts' keys; MISSING where all parts are
    numeric       float32 as it is, null where missing; transforms are applied when it is read
    weights       float32, or list<float32> beside a multi field's keys; a missing weight is 1

Dims: R records, V listed values, K kept ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from des_core.config import Config, FieldConfig
from des_core.contracts import WEIGHT, FieldSpec, Form
from des_core.data.read import libsvm, synthetic
from des_core.data.read.forms import form_of_values, in_form
from des_core.data.read.hashing import I64, MISSING, as_text, combined_keys, hash_text, hash_values
from des_core.data.read.labels import Faults, shown
from des_core.data.read.parsing import Bool, local_times, one_chunk, to_micros, to_numbers, without_missing
from des_core.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """Features, the records whose values are not right, and each field's values: keys [V], their texts, their records.

    Rows of ``features`` at the positions in ``faults`` mean nothing.
    """

    features: pa.Table
    faults: Faults
    values: dict[str, tuple[I64, pa.Array | pa.ChunkedArray, I64]]
    forms: dict[str, Form]
    """Of each field that has keys."""


def fields_of(config: Config) -> tuple[FieldConfig, ...]:
    """The declared fields, or else those that follow from the source's format."""
    if config.fields:
        return config.fields
    if config.source.format == "criteo":
        numbers = [FieldConfig(name=f"I{i}", kind="numeric", transform="log1p") for i in range(1, 14)]
        return (*numbers, *(FieldConfig(name=f"C{i}") for i in range(1, 27)))
    if config.source.format == "libsvm":
        return (FieldConfig(name=libsvm.FEATURES, kind="multi", weight=libsvm.VALUES),)
    return synthetic.FIELDS


def specs_of(fields: Sequence[FieldConfig]) -> tuple[FieldSpec, ...]:
    """Fields with every name filled in and no statistics yet."""
    return tuple(
        FieldSpec.model_validate(
            {
                **field.model_dump(),
                "column": "" if field.cross else field.column or field.name,
                "table": field.table or field.name,
            }
        )
        for field in fields
    )


def encode(
    records: pa.Table,
    fields: Sequence[FieldSpec],
    timezone: str,
    missing: Sequence[str],
    quoted: bool = True,
    time_formats: Mapping[str, str] | None = None,
) -> pa.Table:
    """The feature columns of raw records, text or typed.

    Args:
        quoted: let messages show the value that is not right.
        time_formats: of columns with times, as ``source.time_format``.

    Raises:
        DataError: a column is not there, or a value is no number, time or list where it must be one.
    """
    encoded = encode_checked(records, fields, timezone, missing, quoted, time_formats)
    if encoded.faults:
        index, reason = min(encoded.faults.items())
        raise DataError(f"record {index + 1}: {reason}")
    return encoded.features


def encode_checked(
    records: pa.Table,
    fields: Sequence[FieldSpec],
    timezone: str,
    missing: Sequence[str],
    quoted: bool = True,
    time_formats: Mapping[str, str] | None = None,
) -> Encoded:
    """As ``encode``, but invalid values are reported instead of raised.

    Raises:
        DataError: a column is not there.
    """
    encoder = _Encoder(records, timezone, missing, quoted, time_formats or {})
    # A cross may be declared before its parts.
    for field in sorted(fields, key=lambda field: bool(field.cross)):
        encoder.add(field)
    return Encoded(pa.table(encoder.columns), encoder.faults, encoder.values, encoder.forms)


class _Encoder:
    """Feature columns of one table of records, gathered field by field."""

    def __init__(
        self,
        records: pa.Table,
        timezone: str,
        missing: Sequence[str],
        quoted: bool,
        time_formats: Mapping[str, str],
    ) -> None:
        self.columns: dict[str, pa.Array] = {}
        self.faults: Faults = {}
        self.values: dict[str, tuple[I64, pa.Array, I64]] = {}
        self.forms: dict[str, Form] = {}
        self._records = dict(zip(records.column_names, records.columns, strict=True))
        self._timezone, self._time_formats = timezone, time_formats
        self._shown = shown if quoted else _unsaid
        self._missing = list(missing)
        self._missing_keys = hash_text(pa.array(self._missing, pa.string()))
        self._micros: dict[str, pa.Array] = {}

    def add(self, field: FieldSpec) -> None:
        """Encode one field."""
        if field.cross:
            self._combined(field)
            return
        try:
            values = self._column(field, field.column)
            if field.derive:
                values = self._derived(values, field)
            if field.kind == "numeric":
                self.columns[field.name] = self._numbers(values, field.column)
            elif field.kind == "categorical":
                self._one_value(values, field)
            else:
                self._many_values(values, field)
        except DataError as error:
            raise DataError(f"field {field.name}: {error}") from None

    def _column(self, field: FieldSpec, name: str) -> pa.Array:
        if name not in self._records:
            raise DataError(f"no column {name!r}; the records have {', '.join(self._records)}")
        return one_chunk(self._records[name])

    def _derived(self, values: pa.Array, field: FieldSpec) -> pa.Array:
        """Texts or numbers made of a column."""
        if field.derive.startswith("regex:"):
            several = field.separator if field.kind == "multi" else ""
            return self._matches(values, re.compile(field.derive.removeprefix("regex:")), several)
        if field.column not in self._micros:
            micros_R, absent_R, bad_R = to_micros(
                values, self._timezone, self._missing, self._time_formats.get(field.column, "")
            )
            self._fault(bad_R, field.column, values, "neither unix seconds nor ISO 8601")
            self._micros[field.column] = pa.array(micros_R, mask=absent_R | bad_R)
        times = local_times(self._micros[field.column], self._timezone)
        part = {"hour": pc.hour, "weekday": pc.day_of_week, "year": pc.year}[field.derive]
        return part(times)

    def _matches(self, values: pa.Array, pattern: re.Pattern[str], separator: str) -> pa.Array:
        """A match's first group, or all of it where the pattern has no group; null where there is no match.

        Args:
            separator: of a list, which has every match; empty: the first match alone.
        """
        distinct = without_missing(as_text(values), self._missing).dictionary_encode()
        group = min(pattern.groups, 1)

        def found(text: str) -> str | None:
            if separator:
                return separator.join(filter(None, (match[group] for match in pattern.finditer(text)))) or None
            first = pattern.search(text)
            return first and first[group]

        return pa.array([found(text) for text in distinct.dictionary.to_pylist()], pa.string()).take(distinct.indices)

    def _one_value(self, values: pa.Array, field: FieldSpec) -> None:
        if pa.types.is_nested(values.type):
            raise DataError(
                f"column {field.column} holds {kind_of(values.type)}; declare it with kind = 'multi' if it is a list"
            )
        texts = self._in_form(values, field)
        keys_R = self._without_missing(hash_values(texts))
        self.columns[field.name] = pa.array(keys_R)
        self.values[field.name] = (keys_R, texts, np.arange(len(keys_R)))
        if field.weight:
            weights = self._numbers(self._column(field, field.weight), field.weight)
            self.columns[WEIGHT + field.name] = weights.fill_null(1.0)

    def _combined(self, field: FieldSpec) -> None:
        """The values of a cross, from the keys and texts of its parts."""
        keys, texts, _ = zip(*(self.values[part] for part in field.cross), strict=True)
        keys_R = combined_keys(keys)
        self.columns[field.name] = pa.array(keys_R)
        whole = [as_text(text).cast(pa.large_string()) for text in texts]
        joined = pc.binary_join_element_wise(
            *whole, pa.scalar(" x ", pa.large_string()), null_handling="replace", null_replacement="(missing)"
        )
        self.values[field.name] = (keys_R, joined, np.arange(len(keys_R)))

    def _in_form(self, values: pa.Array, field: FieldSpec) -> pa.Array:
        """The texts of a field's values; a field without a form takes that of these values."""
        form = field.form or form_of_values(without_missing(values, self._missing))
        self.forms[field.name] = form
        try:
            return in_form(values, form)
        except DataError as error:
            raise DataError(f"column {field.column}: {error}") from None

    def _many_values(self, values: pa.Array, field: FieldSpec) -> None:
        offsets, listed = _lists(values, field.separator)
        listed = self._in_form(listed, field)
        keys_V = self._without_missing(hash_values(listed))
        row_of_V = np.repeat(np.arange(len(values)), np.diff(offsets))
        keep_V = keys_V != MISSING
        empty_R = np.bincount(row_of_V[keep_V], minlength=len(values)) == 0
        edges = np.append(0, np.cumsum(np.bincount(row_of_V[keep_V], minlength=len(values)) + empty_R))
        place_K = np.arange(np.count_nonzero(keep_V)) + np.cumsum(empty_R)[row_of_V[keep_V]]
        keys = np.full(edges[-1], MISSING, np.int64)
        keys[place_K] = keys_V[keep_V]
        offsets_array = pa.array(edges.astype(np.int32))
        self.columns[field.name] = pa.ListArray.from_arrays(offsets_array, pa.array(keys))
        self.values[field.name] = (keys_V, listed, row_of_V)
        if field.weight:
            weights_V = self._weights(field, offsets)
            weights = np.ones(edges[-1], np.float32)
            weights[place_K] = weights_V[keep_V]
            self.columns[WEIGHT + field.name] = pa.ListArray.from_arrays(offsets_array, pa.array(weights))

    def _weights(self, field: FieldSpec, offsets: I64) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Weights [V] of listed values; a record that lists other numbers of both is bad."""
        column = self._column(field, field.weight)
        found, listed = _lists(column, field.separator)
        weights, bad_V = to_numbers(listed, self._missing)
        row_of = np.repeat(np.arange(len(column)), np.diff(found))
        for index in np.flatnonzero(bad_V).tolist():
            self.faults.setdefault(
                int(row_of[index]), f"column {field.weight}: {self._shown(listed, index)} is not a number"
            )
        wanted_R, found_R = np.diff(offsets), np.diff(found)
        odd_R = (wanted_R != found_R) & (found_R > 0)
        for row in np.flatnonzero(odd_R).tolist():
            reason = f"column {field.weight}: {found_R[row]} weights for {wanted_R[row]} values of {field.column}"
            self.faults.setdefault(row, reason)
        out = np.ones(offsets[-1])
        fits = (wanted_R == found_R) & (found_R > 0)
        out[np.repeat(fits, wanted_R)] = np.nan_to_num(weights[np.repeat(fits, found_R)], nan=1.0)
        return out

    def _numbers(self, values: pa.Array, column: str) -> pa.Array:
        """float32, null where missing."""
        if pa.types.is_nested(values.type):
            raise DataError(f"column {column} holds {kind_of(values.type)}, not numbers")
        numbers_R, bad_R = to_numbers(values, self._missing)
        self._fault(bad_R, column, values, "not a number")
        return pa.array(numbers_R.astype(np.float32), mask=np.isnan(numbers_R))

    def _fault(self, bad_R: Bool, column: str, values: pa.Array, wanted: str) -> None:
        for index in np.flatnonzero(bad_R).tolist():
            self.faults.setdefault(index, f"column {column}: {self._shown(values, index)} is {wanted}")

    def _without_missing(self, keys: I64) -> I64:
        """Keys with ``MISSING`` for those of texts that mean: no value."""
        for key in self._missing_keys:
            keys[keys == key] = MISSING
        return keys


def _unsaid(values: pa.Array, index: int) -> str:
    return "the value"


def kind_of(kind: pa.DataType) -> str:
    """The name of a type in one word; Arrow's names of nested types quote the values' keys."""
    if pa.types.is_struct(kind) or pa.types.is_map(kind):
        return "objects"
    return "lists" if pa.types.is_nested(kind) else str(kind)


def _lists(values: pa.Array, separator: str) -> tuple[I64, pa.Array]:
    """Offsets [R + 1] from 0 and the listed values, of lists or of texts with a separator."""
    kind = values.type
    if pa.types.is_struct(kind) or pa.types.is_map(kind) or (hasattr(kind, "value_type") and _is_nested_list(kind)):
        what = "objects" if kind_of(kind) == "objects" else "lists of lists"
        raise DataError(f"{what} are no list of plain values; flatten them before")
    if pa.types.is_fixed_size_list(kind):
        values = values.cast(pa.list_(kind.value_type))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        # Arrow's own cast loses count where a view is null.
        values = pa.array(values.to_pylist(), pa.large_list(kind.value_type))
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        values = pc.split_pattern(as_text(values), separator)
        listed = pc.utf8_trim_whitespace(values.flatten())
    else:
        listed = values.flatten()
    lengths_R = pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
    return np.append(0, np.cumsum(lengths_R)).astype(np.int64), listed


def _is_nested_list(kind: pa.DataType) -> bool:
    """Whether a list's values are lists, structs or maps themselves."""
    return not pa.types.is_dictionary(kind) and bool(pa.types.is_nested(kind.value_type))
