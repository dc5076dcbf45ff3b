"""One piece of raw logs -> sorted runs on storage, its bad rows, and what it adds to the day's counts.

    .scratch-PART/piece-DIGEST.json      PieceManifest, written last; DIGEST is of all that decides the piece's features
    .scratch-PART/run-DIGEST-N.arrow     runs (runs.py), in the order of the logs
    .scratch-PART/bad-DIGEST.csv         file, line, reason of the bad records; absent if there are none
    .scratch-PART/texts-DIGEST.arrow     field, key, count, text of sampled values

Records are numbered as if the whole day were read at once, so nothing here depends on how it was cut into pieces.

Dims: R records of a chunk, V values.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numba import njit, uint64

from des_core import log, storage
from des_core.config import SourceConfig
from des_core.contracts import FILE, GROUP, LABEL, ROW, TIME, FieldSpec, Form, Record
from des_core.data.read.forms import form_of_values, in_form
from des_core.data.read.hashing import Array, hash_values, splitmix64
from des_core.data.read.joins import Side, load_sides
from des_core.data.read.labels import Faults
from des_core.data.read.parsing import day_bounds, days_of, one_chunk
from des_core.data.read.sources import Chunk, read
from des_core.data.store.encoding import Encoded, encode_checked
from des_core.data.store.pieces import Piece, Plan
from des_core.data.store.runs import Run, write_run
from des_core.data.store.sorting import Sorter, fixed_width
from des_core.data.store.statistics import ValueTexts
from des_core.errors import DataError

RUN_BYTES = 256 << 20
PROGRESS_S = 10.0
SHOWN = 3
"""Bad records whose reasons a message names."""

LATEST = 1 << 63
"""Bit of the sort key of rows that are held out: they come last."""

EPOCH = 1 << 62
"""Sort key of 1970, so that times before it have one too."""


class PieceManifest(Record):
    """What a piece became. Rows are good records."""

    digest: str
    records: int = 0
    """All records, bad ones too."""
    bad: int = 0
    held_out: int = 0
    outside: int = 0
    bytes: int = 0
    """Of the rows' values."""
    runs: tuple[Run, ...] = ()
    listed: str = ""
    """Address of the bad records' file."""
    reasons: tuple[str, ...] = ()
    """Of the first bad records."""
    lacks: tuple[str, ...] = ()
    forms: dict[str, Form] = {}
    """Of fields that had none before, and of the group."""
    days: dict[str, int] = {}
    """First event time of each day, where parts are days of event time."""


class Work(Record):
    """A piece to be encoded into a folder."""

    plan: Plan
    piece: Piece
    folder: str

    def __str__(self) -> str:
        return str(self.piece)


def manifest_uri(folder: str, digest: str) -> str:
    """Address of a piece's manifest."""
    return storage.join(folder, f"piece-{digest}.json")


def texts_uri(folder: str, digest: str) -> str:
    """Address of a piece's sampled values."""
    return storage.join(folder, f"texts-{digest}.arrow")


def encode_piece(work: Work) -> PieceManifest:
    """The manifest of a piece, after its files."""
    with ExitStack() as stack:
        encoder = _Encoder(work, stack)
        for number, span in zip(work.piece.files, work.piece.spans, strict=True):
            for chunk in read(work.plan.source, [span], encoder.specs, sides=encoder.sides, may_lack=work.plan.newer):
                encoder.take_in(chunk, number)
        manifest = encoder.finish()
    manifest.write(manifest_uri(work.folder, manifest.digest))
    return manifest


def form_of_group(chunk: Chunk, column: str) -> Form:
    """What the values of the group's column are, by a chunk."""
    return form_of_values(one_chunk(chunk.records.column(column)))


@lru_cache(maxsize=1)
def _sides(source: str) -> tuple[Side, ...]:
    """Side tables, kept by a process for its next pieces."""
    return load_sides(SourceConfig.model_validate_json(source))


def settle(specs: tuple[FieldSpec, ...], forms: Mapping[str, Form]) -> tuple[FieldSpec, ...]:
    """Fields, with forms for those that have none."""
    return tuple(spec if spec.form else spec.model_copy(update={"form": forms.get(spec.name, "")}) for spec in specs)


class _Encoder:
    """Takes in a piece's chunks, in order."""

    def __init__(self, work: Work, stack: ExitStack) -> None:
        self._plan, self._folder, self._stack = work.plan, work.folder, stack
        self.digest = work.piece.digest(work.plan)
        self.specs = work.plan.specs
        self.sides = _sides(work.plan.source.model_dump_json()) if work.plan.source.join else ()
        self._group_form = work.plan.group_form
        self._sorter = Sorter(RUN_BYTES)
        self._runs: list[Run] = []
        self._texts = {spec.name: ValueTexts() for spec in self.specs}
        self._days: dict[str, int] = {}
        self._lacks: set[str] = set()
        self._reasons: list[str] = []
        self._bad_file: BinaryIO | None = None
        self._read = self._bad = self._held_out = self._outside = self._bytes = 0
        self._name, self._told = str(work.piece), time.monotonic()

    def take_in(self, chunk: Chunk, file: int) -> None:
        """Encode a chunk's records, and put the good ones into a run."""
        plan = self._plan
        encoded = encode_checked(
            chunk.records,
            self.specs,
            plan.source.timezone,
            plan.source.missing,
            time_formats={plan.source.time: plan.source.time_format},
        )
        self.specs = settle(self.specs, encoded.forms)
        features, group_R = encoded.features, self._groups(chunk)
        draws = _draws(np.uint64(plan.seed), np.uint64(file), chunk.rows_R)
        self._sample(encoded, draws[2])
        faults = {**self._far(chunk), **encoded.faults}
        if faults:
            keep_R = np.ones(len(chunk.rows_R), np.bool_)
            keep_R[list(faults)] = False
            chunk = chunk.without(faults)
            features, group_R = features.filter(pa.array(keep_R)), group_R[keep_R]
            draws = (draws[0][keep_R], draws[1][keep_R], draws[2][keep_R])
        beside = {
            LABEL: pa.array(chunk.label_R),
            TIME: pa.array(chunk.micros_R) if plan.source.time else pa.nulls(len(group_R), pa.int64()),
            GROUP: pa.array(group_R),
            FILE: pa.array(np.full(len(group_R), file, np.int32)),
            ROW: pa.array(chunk.rows_R),
        }
        table = pa.table({**dict(zip(features.column_names, features.columns, strict=True)), **beside})
        self._count(chunk, table)
        if not self._sorter.fits(table):
            self._spill()
        self._sorter.add(table, self._keys(chunk, draws[0], draws[1]))

    def _groups(self, chunk: Chunk) -> Array:
        """Keys of the records' groups."""
        column = self._plan.source.group
        if not column:
            return np.zeros(len(chunk.rows_R), np.int64)
        self._group_form = self._group_form or form_of_group(chunk, column)
        try:
            return hash_values(in_form(one_chunk(chunk.records.column(column)), self._group_form))
        except DataError as error:
            raise DataError(f"{chunk.path}: source.group = {column!r}: {error}") from None

    def _far(self, chunk: Chunk) -> Faults:
        """Records too far from the day that their file is of; the others outside it are counted."""
        plan = self._plan
        bounds = day_bounds(plan.part, plan.source.timezone) if plan.source.time else None
        if bounds is None:
            return {}
        start, stop = bounds
        allowed = round(plan.lateness_h * 3_600_000_000)
        micros_R = chunk.micros_R
        far_R = (micros_R < start - allowed) | (micros_R >= stop + allowed)
        self._outside += int(((micros_R < start) | (micros_R >= stop)).sum() - far_R.sum())
        why = f"its time is more than recurring.allowed_lateness = {plan.lateness_h:g} hours from {plan.part}"
        return {int(place): why for place in np.flatnonzero(far_R)}

    def _keys(self, chunk: Chunk, shuffle_R: Array, coin_R: Array) -> Array:
        """Sort keys [R], uint64; the highest bit puts records that are held out last."""
        plan = self._plan
        key_R = (chunk.micros_R + EPOCH).astype(np.uint64) if plan.timed else shuffle_R >> np.uint64(1)
        out_R = coin_R < np.uint64(int(plan.hold_out * 2.0**64))
        self._held_out += int(out_R.sum())
        return np.where(out_R, key_R | np.uint64(LATEST), key_R)

    def _sample(self, encoded: Encoded, draw_R: Array) -> None:
        """Count the values of sampled records."""
        chosen_R = draw_R >> np.uint64(64 - self._plan.rarity) == 0 if self._plan.rarity else None
        for name, (keys_V, values, row_of_V) in encoded.values.items():
            if chosen_R is None:
                self._texts[name].add(keys_V, values)
                continue
            chosen_V = np.flatnonzero(chosen_R[row_of_V])
            self._texts[name].add(keys_V[chosen_V], values.take(pa.array(chosen_V)))

    def _count(self, chunk: Chunk, table: pa.Table) -> None:
        self._read += chunk.read
        self._lacks |= set(chunk.absent)
        self._bytes += table.num_rows * fixed_width(table.schema)
        for column in table.columns:
            if pa.types.is_list(column.type):
                width = column.type.value_type.bit_width // 8
                self._bytes += width * sum(len(piece.flatten()) for piece in column.chunks)
        if not self._plan.part:
            days_R = days_of(chunk.micros_R, self._plan.source.timezone)
            firsts = pa.table({"day": days_R, "time": chunk.micros_R}).group_by("day").aggregate([("time", "min")])
            for day, first in zip(firsts["day"].to_pylist(), firsts["time_min"].to_pylist(), strict=True):
                self._days[day] = min(first, self._days.get(day, first))
        if chunk.bad:
            self._list(chunk)
        if time.monotonic() - self._told > PROGRESS_S:
            self._told = time.monotonic()
            log.emit("encode", task=self._name, rows=self._read - self._bad, bad_rows=self._bad)

    def _list(self, chunk: Chunk) -> None:
        """Put a chunk's bad records into quarantine."""
        if self._bad_file is None:
            self._bad_file = self._stack.enter_context(storage.writer(self._bad_uri))
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows((chunk.path, line, reason) for line, reason in chunk.bad)
        self._bad_file.write(lines.getvalue().encode())
        self._bad += len(chunk.bad)
        for line, reason in chunk.bad[: SHOWN - len(self._reasons)]:
            self._reasons.append(f"{chunk.path} line {line}: {reason}")

    @property
    def _bad_uri(self) -> str:
        return storage.join(self._folder, f"bad-{self.digest}.csv")

    def _spill(self) -> None:
        if self._sorter.rows:
            uri = storage.join(self._folder, f"run-{self.digest}-{len(self._runs)}.arrow")
            self._runs.append(write_run(uri, self._sorter.sorted()))

    def finish(self) -> PieceManifest:
        """Write what waits; the manifest."""
        self._spill()
        self._stack.close()
        storage.write_bytes(texts_uri(self._folder, self.digest), _texts_file(self._texts))
        forms = {spec.name: spec.form for spec in self.specs if spec.form}
        return PieceManifest(
            digest=self.digest,
            records=self._read,
            bad=self._bad,
            held_out=self._held_out,
            outside=self._outside,
            bytes=self._bytes,
            runs=tuple(self._runs),
            listed=self._bad_uri if self._bad else "",
            reasons=tuple(self._reasons),
            lacks=tuple(sorted(self._lacks)),
            forms=forms | ({GROUP: self._group_form} if self._group_form else {}),
            days=self._days,
        )


def _texts_file(texts: Mapping[str, ValueTexts]) -> bytes:
    columns = [
        pa.table(
            {
                "field": pa.array([name] * len(found.counts), pa.string()),
                "key": pa.array(list(found.counts), pa.int64()),
                "count": pa.array(list(found.counts.values()), pa.int64()),
                "text": pa.array([found.texts[key] for key in found.counts], pa.string()),
            }
        )
        for name, found in texts.items()
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, columns[0].schema) as writer:
        for table in columns:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def merge_texts(folder: str, digest: str, into: Mapping[str, ValueTexts]) -> None:
    """Add a piece's sampled values, those of pieces before it being there."""
    table = pa.ipc.open_file(pa.BufferReader(storage.read_bytes(texts_uri(folder, digest)))).read_all()
    for name, found in into.items():
        own = table.filter(pa.compute.equal(table["field"], name))
        found.merge(own["key"].to_pylist(), own["count"].to_pylist(), own["text"].to_pylist())


@njit(nogil=True, cache=True)
def _draws(seed: Any, file: Any, rows_R: Array) -> tuple[Array, Array, Array]:
    """Counter hashes of each record: its place in a shuffle, whether it is held out, whether its texts are sampled."""
    base = splitmix64(splitmix64(seed) ^ file)
    shuffle_R, coin_R = np.empty(len(rows_R), np.uint64), np.empty(len(rows_R), np.uint64)
    sample_R = np.empty(len(rows_R), np.uint64)
    for i in range(len(rows_R)):
        shuffle_R[i] = splitmix64(base ^ uint64(rows_R[i]))
        coin_R[i] = splitmix64(shuffle_R[i])
        sample_R[i] = splitmix64(coin_R[i])
    return shuffle_R, coin_R, sample_R
