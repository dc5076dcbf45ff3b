"""The records of some files -> one part of the feature store, or a part for each day of event time.

One pass reads, checks, encodes and orders; a second over the ordered rows writes and sketches them. A part's
manifest is written last, so a half-written part is never taken for whole.

Dims: R records of a chunk, V values.
"""

from __future__ import annotations

import csv
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit, uint64
from pyarrow import fs as pafs

from des_core import log, scratch, storage
from des_core.config import Config, SourceConfig
from des_core.contracts import FILE, GROUP, LABEL, ROW, TIME, Form, Part
from des_core.data.read.forms import form_of_values, in_form
from des_core.data.read.hashing import Array, hash_values, splitmix64
from des_core.data.read.joins import Side, load_sides
from des_core.data.read.labels import Faults
from des_core.data.read.parsing import day_bounds, days_of, one_chunk
from des_core.data.read.sources import Chunk, read
from des_core.data.store.dataset import earlier_days, settled_forms, stored_dataset
from des_core.data.store.digests import Digests
from des_core.data.store.encoding import encode_checked, fields_of, specs_of
from des_core.data.store.parts import PartManifest, current_part, manifest_uri, write_rows
from des_core.data.store.sketches import Sketching
from des_core.data.store.sorting import Sorter
from des_core.data.store.splits import likely_train_rows, order_of
from des_core.data.store.statistics import ValueTexts
from des_core.errors import DataError, UnusableLogsError

PROGRESS_S = 2.0


@dataclass(frozen=True)
class Job:
    """Files that are read together. ``part``: what they become; empty: one part for each day of event time."""

    part: str
    files: tuple[str, ...]
    hold_out: float = 0.0
    """Share of the rows set apart for validation."""
    may_lack: bool = False
    """Whether files without a field's column are taken, if no job like this had it before: the field is newer."""


class Ingestion:
    """Makes the parts of a feature store, from the logs of one config."""

    def __init__(self, config: Config, source: SourceConfig) -> None:
        self.config = config
        self.source = source
        self.root = config.features_root
        self.spec = config.features_digest
        self.specs = specs_of(fields_of(config))
        self._had: set[str] = set()
        """Columns that days before have had."""
        self._group_form: Form = ""
        self._settled = False
        self._sides: tuple[Side, ...] | None = None
        self._digests = Digests(config.storage.root)
        self._side_digests = self._digests.of(join.path for join in source.join)

    def parts(self, job: Job) -> dict[str, PartManifest]:
        """The parts of a job: those that are there, if nothing has changed, or else new ones."""
        sources = (*self._digests.of(job.files), *self._side_digests)
        self._digests.keep()
        names = [job.part]
        if not job.part:
            dataset = stored_dataset(self.root)
            names = list(dataset.parts) if dataset is not None and dataset.spec == self.spec else []
        there = {name: current_part(self.root, name, self.spec, sources) for name in names}
        known = {name: part for name, part in there.items() if part is not None}
        if not known or len(known) != len(names):
            with _scratch(self.root, job.part or "days") as folder:
                known = self._make(job, sources, folder)
        if job.may_lack:
            self._had |= self._columns - {name for part in known.values() for name in part.lacks}
        return known

    @property
    def _columns(self) -> set[str]:
        """Columns that fields are made of."""
        return {name for spec in self.specs for name in (spec.column, spec.weight) if name}

    def _make(self, job: Job, sources: tuple[str, ...], folder: str) -> dict[str, PartManifest]:
        if self._sides is None:
            self._sides = load_sides(self.source)
        if not self._settled:
            self._settle(settled_forms(earlier_days(self.root, self.spec).values()))
            self._settled = True
        sorter = Sorter(folder)
        quarantine = os.path.join(folder, "quarantine.csv")
        with open(quarantine, "w", encoding="utf-8", newline="") as file:
            tally = _Tally(job.part or "days", file, [spec.name for spec in self.specs])
            newer = self._columns - self._had if job.may_lack else ()
            for chunk in read(self.source, job.files, self.specs, sides=self._sides, may_lack=newer):
                self._take_in(chunk, job, sorter, tally)
        tally.check(job, self.source.max_bad_share)
        streams: Iterator[tuple[str, Iterator[pa.Table]]] = iter([(job.part, sorter.sorted())])
        if not job.part:
            streams = _by_event_day(sorter.sorted(), self.source.timezone)
        manifests: dict[str, PartManifest] = {}
        for name, tables in streams:
            # Records without a right time are of no day: they are listed with the first.
            listed = tally.bad if not manifests else 0
            train_rows = likely_train_rows(self.config, name, tally.read - tally.bad, tally.held_out)
            part = self._write(name, tables, train_rows, quarantine, listed)
            manifests[name] = PartManifest(
                spec=self.spec,
                sources=sources,
                files=len(job.files),
                part=part,
                outside=tally.outside,
                held_out=tally.held_out,
                lacks=tuple(sorted(tally.lacks)),
                forms={spec.name: spec.form for spec in self.specs if spec.form} | {GROUP: self._group_form},
                texts={name: texts.result() for name, texts in tally.texts.items()},
            )
        for name, manifest in manifests.items():
            manifest.write(manifest_uri(self.root, name))
        tally.done()
        return manifests

    def _settle(self, forms: Mapping[str, Form]) -> None:
        """Fix the forms of fields that had none."""
        self._group_form = self._group_form or forms.get(GROUP, "")
        self.specs = tuple(
            spec if spec.form else spec.model_copy(update={"form": forms.get(spec.name, "")}) for spec in self.specs
        )

    def _take_in(self, chunk: Chunk, job: Job, sorter: Sorter, tally: _Tally) -> None:
        """Encode a chunk's records and hand the good ones to the sorter."""
        encoded = encode_checked(
            chunk.records,
            self.specs,
            self.source.timezone,
            self.source.missing,
            time_formats={self.source.time: self.source.time_format},
        )
        self._settle(encoded.forms)
        features = encoded.features
        group_R = np.zeros(len(chunk.rows_R), np.int64)
        if self.source.group:
            groups = one_chunk(chunk.records.column(self.source.group))
            self._settle({GROUP: form_of_values(groups)} if not self._group_form else {})
            try:
                group_R = hash_values(in_form(groups, self._group_form))
            except DataError as error:
                raise DataError(f"{chunk.path}: source.group = {self.source.group!r}: {error}") from None
        faults = {**self._outside(chunk, job, tally), **encoded.faults}
        if faults:
            keep_R = np.ones(len(chunk.rows_R), np.bool_)
            keep_R[list(faults)] = False
            chunk = chunk.without(faults)
            features, group_R = features.filter(pa.array(keep_R)), group_R[keep_R]
        file_number = job.files.index(chunk.path)
        key_R, held_out = self._keys(chunk, file_number, job.hold_out)
        beside = {
            LABEL: pa.array(chunk.label_R),
            TIME: pa.array(chunk.micros_R) if self.source.time else pa.nulls(len(key_R), pa.int64()),
            GROUP: pa.array(group_R),
            FILE: pa.array(np.full(len(key_R), file_number, np.int32)),
            ROW: pa.array(chunk.rows_R),
        }
        sorter.add(pa.table({**dict(zip(features.column_names, features.columns, strict=True)), **beside}), key_R)
        tally.held_out += held_out
        tally.add(chunk, encoded.values)

    def _outside(self, chunk: Chunk, job: Job, tally: _Tally) -> Faults:
        """Records too far from the day that their file is of; the others outside it are counted."""
        bounds = day_bounds(job.part, self.source.timezone) if self.source.time else None
        if bounds is None:
            return {}
        start, stop = bounds
        allowed = round(self.config.recurring.allowed_lateness * 3_600_000_000)
        micros_R = chunk.micros_R
        far_R = (micros_R < start - allowed) | (micros_R >= stop + allowed)
        tally.outside += int(((micros_R < start) | (micros_R >= stop)).sum() - far_R.sum())
        hours = f"{self.config.recurring.allowed_lateness:g}"
        why = f"its time is more than recurring.allowed_lateness = {hours} hours from {job.part}"
        return {int(place): why for place in np.flatnonzero(far_R)}

    def _keys(self, chunk: Chunk, file_number: int, hold_out: float) -> tuple[Array, int]:
        """Sort keys [R], uint64, and how many records are held out: their highest bit puts them last."""
        shuffle_R, coin_R = _draws(np.uint64(self.config.run.seed), np.uint64(file_number), chunk.rows_R)
        timed = order_of(self.config) == "time"
        key_R = (chunk.micros_R + (1 << 62)).astype(np.uint64) if timed else shuffle_R >> np.uint64(1)
        out_R = coin_R < np.uint64(int(hold_out * 2.0**64))
        return np.where(out_R, key_R | np.uint64(1 << 63), key_R), int(out_R.sum())

    def _write(self, name: str, tables: Iterator[pa.Table], train_rows: int, quarantine: str, bad: int) -> Part:
        sketching = Sketching(name, self.specs, 0, train_rows)
        written = write_rows(self.root, name, tables, sketching.add)
        listed = f"{name}/quarantine.csv" if bad else ""
        if bad:
            with storage.writer(storage.join(self.root, listed)) as target, open(quarantine, "rb") as lines:
                target.write(b"file,line,reason\n")
                shutil.copyfileobj(lines, target)
        part = written.model_copy(update={"bad_rows": bad, "quarantine": listed})
        sketching.save(self.root, part, name)
        return part


@njit(nogil=True, cache=True)
def _draws(seed: Any, file: Any, rows_R: Array) -> tuple[Array, Array]:
    """Two counter hashes of each record: its place in a shuffle, and whether it is held out."""
    base = splitmix64(splitmix64(seed) ^ file)
    shuffle_R, coin_R = np.empty(len(rows_R), np.uint64), np.empty(len(rows_R), np.uint64)
    for i in range(len(rows_R)):
        shuffle_R[i] = splitmix64(base ^ uint64(rows_R[i]))
        coin_R[i] = splitmix64(shuffle_R[i])
    return shuffle_R, coin_R


class _Tally:
    """Counts of what is ingested: rows, bad records, frequent values; writes progress lines."""

    def __init__(self, part: str, quarantine: Any, fields: Sequence[str]) -> None:
        self.read = self.bad = self.held_out = self.outside = 0
        self.lacks: set[str] = set()
        self.texts = {name: ValueTexts() for name in fields}
        self._part = part
        self._quarantine = csv.writer(quarantine, lineterminator="\n")
        self._reasons: list[str] = []
        self._started = self._told = time.monotonic()

    def add(self, chunk: Chunk, values: Mapping[str, tuple[Array, Any]]) -> None:
        """Count a chunk."""
        self.read += chunk.read
        self.lacks |= set(chunk.absent)
        self.bad += len(chunk.bad)
        self._quarantine.writerows((chunk.path, line, reason) for line, reason in chunk.bad)
        for line, reason in chunk.bad[: 3 - len(self._reasons)]:
            self._reasons.append(f"{chunk.path} line {line}: {reason}")
        for name, (keys_V, texts) in values.items():
            self.texts[name].add(keys_V, texts)
        if time.monotonic() - self._told > PROGRESS_S:
            self._tell()

    def check(self, job: Job, most: float) -> None:
        """Raises ``UnusableLogsError`` if too many records are bad or none is good."""
        if not self.read:
            raise UnusableLogsError(f"{', '.join(job.files[:3])}: no records; give files with at least one")
        reasons = "; ".join(self._reasons)
        if self.bad > most * self.read:
            share = f"{self.bad} of {self.read} records are bad ({self.bad / self.read:.2%})"
            raise UnusableLogsError(f"{share}, more than source.max_bad_share = {most:g}: {reasons}")
        if self.bad == self.read:
            raise UnusableLogsError(f"{', '.join(job.files[:3])}: no good record among {self.read}: {reasons}")

    def done(self) -> None:
        """Say the last line."""
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        rate = round((self.read - self.bad) / max(self._told - self._started, 1e-9))
        log.emit("ingest", part=self._part, rows=self.read - self.bad, bad_rows=self.bad, rows_per_s=rate)


@contextmanager
def _scratch(root: str, part: str) -> Iterator[str]:
    """A new local folder that is deleted after the block."""
    filesystem, path = storage.resolve(root)
    if isinstance(filesystem, pafs.LocalFileSystem):
        folder = os.path.join(path, f".scratch-{part}")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    else:
        folder = scratch.make("ingest")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            # A store that was never begun leaves no empty folders.
            os.rmdir(path)
            os.rmdir(os.path.dirname(path))


def _by_event_day(tables: Iterator[pa.Table], timezone: str) -> Iterator[tuple[str, Iterator[pa.Table]]]:
    """A stream in time order, cut into days."""
    pieces = _cut_by_day(tables, timezone)
    for day, group in groupby(pieces, key=lambda piece: piece[0]):
        yield day, (table for _, table in group)


def _cut_by_day(tables: Iterator[pa.Table], timezone: str) -> Iterator[tuple[str, pa.Table]]:
    latest = ""
    for table in tables:
        micros_R = table.column(TIME).to_numpy()
        days_R = np.array(days_of(micros_R, timezone).to_pylist())
        # Where clocks go back over midnight a day would come twice: its last minutes count as the next day's.
        days_R = np.where(days_R < latest, latest, days_R)
        days_R = np.array(list(np.maximum.accumulate(days_R.astype("datetime64[D]")).astype(str)))
        edges = np.flatnonzero(np.append(True, days_R[1:] != days_R[:-1]))
        for start, stop in zip(edges, np.append(edges[1:], len(days_R)), strict=True):
            latest = str(days_R[start])
            yield latest, table.slice(start, stop - start)
