"""Raw logs -> checked records, a chunk at a time: CSV, Criteo's TSV, libsvm, Parquet, side tables joined.

A chunk holds the columns that somebody asked for and nothing else; texts stay as they are written,
missing ones are null. A record that is not whole, or has no right label or time, is bad: it is left out and
listed with its line and the reason. A file that cannot be read at all, or lacks a column, is an error.

Dims: R records of a chunk.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from des_core import log, storage
from des_core.config import Config, SourceConfig
from des_core.contracts import FieldSpec
from des_core.data.read import libsvm, synthetic
from des_core.data.read.delimited import Raw, read_delimited
from des_core.data.read.hashing import I64
from des_core.data.read.joins import Side, load_sides
from des_core.data.read.labels import F32, Faults, labels_of, parse_positive, shown
from des_core.data.read.parsing import Bool, check_timezone, column_without_missing, one_chunk, to_micros
from des_core.data.read.paths import DAY, columns_of_path
from des_core.data.read.spans import PARQUET_BATCH, Span, opened_parquet, units
from des_core.errors import ConfigError, DataError

CRITEO_COLUMNS = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))
"""Columns of Criteo's display logs, which name none: a label, 13 numbers, 26 categories."""


@dataclass(frozen=True)
class Chunk:
    """Good records of one file, and the bad ones among them.

    ``rows_R`` counts the file's records from 0 and ``lines_R`` its lines from 1; ``bad`` holds a line and a
    reason each; ``read`` counts all. ``label_R`` and ``micros_R`` are empty where they were not asked for.
    """

    path: str
    records: pa.Table
    rows_R: I64
    lines_R: I64
    bad: tuple[tuple[int, str], ...]
    read: int
    label_R: F32
    micros_R: I64
    absent: tuple[str, ...] = ()
    """Columns that the file lacks, and may."""

    def without(self, faults: Faults) -> Chunk:
        """The chunk without the records at some positions, which become bad."""
        if not faults:
            return self
        keep_R = np.ones(len(self.rows_R), np.bool_)
        keep_R[list(faults)] = False
        bad = [(int(self.lines_R[index]), reason) for index, reason in faults.items()]
        return replace(
            self,
            records=self.records.filter(pa.array(keep_R)),
            rows_R=self.rows_R[keep_R],
            lines_R=self.lines_R[keep_R],
            bad=tuple(sorted([*self.bad, *bad])),
            label_R=self.label_R[keep_R] if len(self.label_R) else self.label_R,
            micros_R=self.micros_R[keep_R] if len(self.micros_R) else self.micros_R,
        )


def source_of(config: Config) -> SourceConfig:
    """The source as it is read: synthetic logs are CSVs under the storage root, with columns that are known."""
    source = config.source
    if source.format != "synthetic":
        return source
    return source.model_copy(
        update={
            "format": "csv",
            "path": storage.join(config.storage.root, "raw", f"{DAY}.csv"),
            "label": synthetic.LABEL,
            "time": synthetic.TIME,
            "group": source.group or synthetic.GROUP,
        }
    )


def read(
    source: SourceConfig,
    paths: Sequence[str | Span],
    fields: Sequence[FieldSpec],
    labelled: bool = True,
    sides: Sequence[Side] | None = None,
    may_lack: Collection[str] = (),
    more: Sequence[str] = (),
) -> Iterator[Chunk]:
    """Checked records of files, or of spans of files, in their order, with the columns of ``fields``.

    Args:
        labelled: also read and check label, time and group; without them, for scoring, a side table
            is only joined for columns that the log does not have itself.
        sides: the source's side tables, where they were loaded already.
        may_lack: columns without which a file has no values of their fields; a line says so.
        more: columns beside those of ``fields``.

    Raises:
        DataError: a file is missing, broken, or without a column; its times do not parse at all.
    """
    check_source(source)
    sides = load_sides(source) if sides is None else sides
    wanted = _wanted(source, fields, labelled) | dict.fromkeys(more, "to keep")
    optional = frozenset(may_lack) - {source.label, source.time, source.group, *more}
    for given in paths:
        span = Span(path=given) if isinstance(given, str) else given
        path = span.path
        plan = _Plan(span, wanted, sides, labelled, optional)
        for number, raw in enumerate(_raw(source, span, plan.choose)):
            records = plan.join(raw.table)
            nothing = np.zeros(0, np.int64)
            labels_R, absent = nothing.astype(np.float32), tuple(plan.absent)
            chunk = Chunk(path, records, raw.rows_R, raw.lines_R, raw.bad, raw.read, labels_R, nothing, absent)
            yield _labelled(chunk, source, first=number == 0 and not span.first) if labelled else chunk


def check_source(source: SourceConfig) -> None:
    """Raises ``ConfigError`` for a time zone, comparison or delimiter that cannot be."""
    check_timezone(source.timezone)
    parse_positive(source.positive)
    if not source.delimiter.isascii() or source.delimiter in '\r\n"\0':
        raise ConfigError(
            f"source.delimiter = {source.delimiter!r}: must be one ASCII character, no quote, no line end"
        )


def _wanted(source: SourceConfig, fields: Sequence[FieldSpec], labelled: bool) -> dict[str, str]:
    """Column -> what it is wanted for."""
    wanted: dict[str, str] = {}
    for field in fields:
        if field.column:
            wanted.setdefault(field.column, f"field {field.name}")
        if field.weight:
            wanted.setdefault(field.weight, f"the weights of field {field.name}")
    if labelled:
        wanted.setdefault(source.label, "source.label")
        for key in ("time", "group"):
            if column := getattr(source, key):
                wanted.setdefault(column, f"source.{key}")
    return wanted


class _Plan:
    """The wanted columns that one file has itself, and those that come from side tables."""

    def __init__(
        self, span: Span, wanted: dict[str, str], sides: Sequence[Side], strict: bool, optional: frozenset[str]
    ) -> None:
        self._path = span.path
        self._begins = not span.first
        self._wanted = wanted
        self._sides = sides
        self._strict = strict
        self._optional = optional
        self._joins: list[tuple[Side, list[str]]] = []
        self._of_path: dict[str, str | None] = {}
        self.absent: list[str] = []

    def choose(self, available: list[str]) -> list[str]:
        """The columns to read of the log.

        Raises:
            DataError: one is not there, or is there twice.
        """
        needed = dict(self._wanted)
        # A column that the file has itself is the better one.
        given_by_path = {name: value for name, value in columns_of_path(self._path).items() if name not in available}
        taken: dict[str, None] = {}
        for side in reversed(self._sides):
            given = [name for name in needed if name in side.names and (self._strict or name not in available)]
            for name in given:
                if name in available:
                    raise DataError(
                        f"{self._path}: column {name!r} is in the log and in a side table; "
                        "name the side table's columns to take in source.join.columns"
                    )
                del needed[name]
            if given:
                self._joins.insert(0, (side, given))
                needed.setdefault(side.on, "source.join.on")
        for name, purpose in needed.items():
            if name in given_by_path:
                self._of_path[name] = given_by_path[name]
                continue
            if name in self._optional and name not in available:
                self.absent.append(name)
                if self._begins:
                    log.emit("no_column", file=self._path, column=name, wanted_for=purpose)
                continue
            if available.count(name) != 1:
                raise DataError(f"{self._path}: {self._fault(name, purpose, available)}")
            taken[name] = None
        return list(taken)

    def _fault(self, name: str, purpose: str, available: list[str]) -> str:
        if name in available:
            return f"more than one column is named {name!r} ({purpose}); rename one"
        close = difflib.get_close_matches(name, available, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(available[:20])}"
        return f"no column {name!r} ({purpose}); {hint}"

    def join(self, records: pa.Table) -> pa.Table:
        """Records with the columns of the side tables, and without a value in those that the file lacks."""
        for name, value in self._of_path.items():
            records = records.append_column(name, pa.array([value] * records.num_rows, pa.string()))
        for name in self.absent:
            records = records.append_column(name, pa.nulls(records.num_rows, pa.string()))
        for side, names in self._joins:
            found = side.look_up(records.column(side.on), names)
            for name in names:
                records = records.append_column(name, found.column(name))
        return records


def _raw(source: SourceConfig, span: Span, choose: Callable[[list[str]], list[str]]) -> Iterator[Raw]:
    """One span's records as they are."""
    if source.format == "parquet":
        return _read_parquet(span, source.missing, choose)
    if source.format == "libsvm":
        chosen = choose([libsvm.LABEL, libsvm.FEATURES, libsvm.VALUES, libsvm.QUERY])
        return libsvm.read_libsvm(span.path, source.encoding, libsvm.QUERY in chosen, span.blocks, span.row)
    delimiter, quoting, header = dialect(source)
    header = span.names or header
    return read_delimited(
        *(span.path, delimiter, quoting, header, source.missing, choose, source.encoding),
        *(span.blocks, span.width, span.row),
    )


def dialect(source: SourceConfig) -> tuple[str, bool, bool | tuple[str, ...]]:
    """Delimiter, quoting and header of text logs with columns."""
    if source.format == "criteo":
        return "\t", False, CRITEO_COLUMNS
    return source.delimiter, source.quoting == "minimal", source.header


def _read_parquet(span: Span, missing: Sequence[str], choose: Callable[[list[str]], list[str]]) -> Iterator[Raw]:
    row = span.row
    with opened_parquet(span.path) as file:
        chosen = choose(file.schema_arrow.names)
        for groups in units(file)[span.first : span.stop]:
            for batch in file.iter_batches(PARQUET_BATCH, row_groups=groups, columns=chosen):
                table = pa.Table.from_batches([batch]).select(chosen)
                texts = {name: column_without_missing(table.column(name), missing) for name in chosen}
                rows_R = np.arange(row, row + table.num_rows)
                yield Raw(pa.table(texts), rows_R, rows_R + 1, (), len(rows_R))
                row += len(rows_R)


EARLIEST = 631_152_000 * 1_000_000
"""1990 in microseconds: an earlier time is a number that was taken for seconds, such as a date written in digits."""


def _labelled(chunk: Chunk, source: SourceConfig, first: bool) -> Chunk:
    """The chunk with labels and times, without the records that have no right ones."""
    faults: Faults = {}
    micros_R = chunk.micros_R
    if source.time:
        times = one_chunk(chunk.records.column(source.time))
        micros_R, absent_R, bad_R = to_micros(times, source.timezone, form=source.time_format)
        early_R = ~absent_R & ~bad_R & (micros_R < EARLIEST)
        if first and (bad_R | early_R).any() and (bad_R | early_R | absent_R).all():
            raise DataError(_no_times(chunk.path, source.time, times, micros_R, bad_R))
        for index in np.flatnonzero(bad_R | absent_R | early_R).tolist():
            fault = "the time is missing"
            if not absent_R[index]:
                fault = f"the time {shown(times, index)} is {_not_a_time(int(micros_R[index]), bool(bad_R[index]))}"
            faults[index] = f"column {source.time}: {fault}"
    label_R, unlabelled = labels_of(one_chunk(chunk.records.column(source.label)), source)
    return replace(chunk, label_R=label_R, micros_R=micros_R).without(unlabelled | faults)


def _not_a_time(micros: int, bad: bool) -> str:
    """What is wrong with a time."""
    if bad:
        return "neither unix seconds nor ISO 8601; source.time_format says what it is"
    date = f"{datetime.fromtimestamp(micros / 1e6, UTC):%Y-%m-%d}"
    return f"{date} as unix seconds or ISO 8601, which cannot be meant; source.time_format says what it is"


def _no_times(path: str, key: str, times: pa.Array, micros_R: I64, bad_R: Bool) -> str:
    """The message for a column that holds no times at all."""
    index = int(bad_R.argmax()) if bad_R.any() else 0
    index = index if times[index].is_valid else int(np.asarray(times.is_valid()).argmax())
    what = _not_a_time(int(micros_R[index]), bool(bad_R[index]))
    return f"{path}: source.time = {key!r} holds no times: {shown(times, index)} is {what}, or name another column"
