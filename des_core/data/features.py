"""Raw logs -> feature store: ordered Parquet parts, what is known of their fields, the splits.

One pass reads, checks, encodes and orders the records of a part; its manifest is written last. Then the
dataset's manifest is made from the manifests of all parts, and only then do files go that nothing names any
more. A part whose sources and config have not changed is left as it is.

Source: method.md, sections 5 and 6.
Dims: R records of a chunk.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import tempfile
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
from pydantic import ValidationError

from des_core import log, storage
from des_core.config import Config, SourceConfig
from des_core.contracts import FILE, GROUP, LABEL, ROW, TIME, Dataset, FieldSpec, FieldStats, Part, Reference
from des_core.data import synthetic
from des_core.data.encoding import encode, encode_checked, fields_of, specs_of
from des_core.data.hashing import Array, hash_values, splitmix64
from des_core.data.joins import Side, load_sides
from des_core.data.order import Sorter
from des_core.data.parsing import days_of
from des_core.data.parts import PartManifest, manifest_uri, whole_part, write_rows
from des_core.data.paths import DAY, as_list, days_of_paths, digest_of, files_of
from des_core.data.sketches import Sketching, sketches
from des_core.data.sources import Chunk, check_source, read, source_of
from des_core.data.splits import divide, likely_train_rows, order_of
from des_core.data.statistics import Sketch, ValueTexts, merged, stats_of, with_statistics
from des_core.errors import DataError

__all__ = ["encode", "fields_of", "ingest", "source_files"]

PROGRESS_S = 2.0

_OURS = re.compile(
    r"manifest\.json|rows-\w+\.parquet|quarantine\.csv|sketches-[\d-]+\.arrow|.*\.partial-\d+|incoming\.parquet"
)


@dataclass(frozen=True)
class Job:
    """Files that are read together. ``part``: what they become; empty: one part for each day of event time."""

    part: str
    files: tuple[str, ...]
    hold_out: float = 0.0
    """Share of the rows set apart for validation."""


def source_files(config: Config) -> dict[str, list[str]]:
    """Part or day -> raw files, in order, without reading them.

    Raises:
        DataError: a path means no file.
    """
    source = source_of(config)
    if config.source.format == "synthetic":
        days = map(synthetic.day_name, range(config.source.days))
        return {day: [str(source.path).replace(DAY, day)] for day in days}
    if source.train:
        given = {"train": source.train, "valid": source.valid, "test": source.test}
        return {part: files_of(paths, source.format) for part, paths in given.items() if paths}
    if _by_path_day(source):
        return days_of_paths(source.path, source.format)
    return {"all": files_of(source.path, source.format)}


def _by_path_day(source: SourceConfig) -> bool:
    return any(DAY in path for path in as_list(source.path))


def ingest(config: Config, day: str | None = None) -> Reference:
    """The feature store of a config: its manifest. What has not changed is not done again.

    Args:
        day: ingest this day's logs only, beside the days that were ingested before.

    Raises:
        DataError: logs that are missing, broken, empty or too bad, or a split without rows.
    """
    source = source_of(config)
    check_source(source)
    if config.source.format == "synthetic":
        folder = storage.join(config.storage.root, "raw")
        synthetic.generate_once(folder, config.source.days, config.source.rows_per_day, config.run.seed)
    jobs = _jobs(config, source, day)
    store = _Store(config, source)
    manifests: dict[str, PartManifest] = store.earlier_days() if day is not None else {}
    for job in jobs:
        manifests |= store.ingest(job)
    reference = _assemble(store, dict(sorted(manifests.items(), key=_place)))
    _remove_stale(store.root, Dataset.load(reference), everything=day is None)
    return reference


def _place(item: tuple[str, PartManifest]) -> tuple[int, str]:
    """Days in time order; given files as they are trained on."""
    return ("train", "valid", "test").index(item[0]) if item[0] in ("train", "valid", "test") else 3, item[0]


def _jobs(config: Config, source: SourceConfig, day: str | None) -> list[Job]:
    by_path = not source.train and _by_path_day(source)
    if day is not None and not by_path:
        raise DataError(f"--day {day} needs {DAY} in source.path; without it all logs are ingested at once")
    files = source_files(config)
    if day is not None:
        if day not in files:
            raise DataError(f"--day {day}: no logs of that day; there are {', '.join(files)}")
        files = {day: files[day]}
    if config.split.by == "day" and not source.train and not by_path:
        if not source.time:
            raise DataError(
                f"split.by = 'day' needs {DAY} in source.path, or source.time, the column with the event's time"
            )
        return [Job("", tuple(files["all"]))]
    if source.train and not source.valid:
        amount = config.split.valid
        share = amount if isinstance(amount, float) and amount < 1 else 0.1
        return [Job(part, tuple(paths), share if part == "train" else 0.0) for part, paths in files.items()]
    return [Job(part, tuple(paths)) for part, paths in files.items()]


class _Store:
    """The feature store while parts are put into it."""

    def __init__(self, config: Config, source: SourceConfig) -> None:
        self.config = config
        self.source = source
        self.root = storage.join(config.storage.root, "features")
        self.spec = config.features_digest
        self.specs = specs_of(fields_of(config))
        self._sides: tuple[Side, ...] | None = None
        self._side_digests = [digest_of(join.path) for join in source.join]

    def dataset(self) -> Dataset | None:
        """The store's manifest as it is, if there is one of this version."""
        uri = storage.join(self.root, "manifest.json")
        if not storage.exists(uri):
            return None
        try:
            return Dataset.model_validate(storage.read_json(uri))
        except (ValidationError, ValueError):
            return None

    def earlier_days(self) -> dict[str, PartManifest]:
        """Every whole part that the same config made."""
        found = {name: whole_part(self.root, name) for name in storage.list_folder(self.root) if name[0] != "."}
        return {name: part for name, part in found.items() if part is not None and part.spec == self.spec}

    def ingest(self, job: Job) -> dict[str, PartManifest]:
        """The parts of a job: those that are there, if nothing has changed, or else new ones."""
        sources = (*(digest_of(path) for path in job.files), *self._side_digests)
        names = [job.part]
        if not job.part:
            dataset = self.dataset()
            names = list(dataset.parts) if dataset is not None and dataset.spec == self.spec else []
        there = {name: whole_part(self.root, name) for name in names}
        known = {
            name: part
            for name, part in there.items()
            if part is not None and part.spec == self.spec and part.sources == sources
        }
        if known and len(known) == len(names):
            return known
        with _scratch(self.root, job.part or "days") as folder:
            return self._make(job, sources, folder)

    def _make(self, job: Job, sources: tuple[str, ...], folder: str) -> dict[str, PartManifest]:
        if self._sides is None:
            self._sides = load_sides(self.source)
        sorter = Sorter(folder)
        quarantine = os.path.join(folder, "quarantine.csv")
        with open(quarantine, "w", encoding="utf-8", newline="") as file:
            tally = _Tally(job.part or "days", file, [spec.name for spec in self.specs])
            for chunk in read(self.source, job.files, self.specs, sides=self._sides):
                self._take_in(chunk, job, sorter, tally)
        tally.check(job, self.source.max_bad_share)
        streams: Iterator[tuple[str, Iterator[pa.Table]]] = iter([(job.part, sorter.sorted())])
        if not job.part:
            streams = _by_event_day(sorter.sorted(), self.source.timezone)
        manifests: dict[str, PartManifest] = {}
        for name, tables in streams:
            # Records without a right time are of no day: they are listed with the first.
            listed = tally.bad if not manifests else 0
            storage.delete(manifest_uri(self.root, name))
            train_rows = likely_train_rows(self.config, name, tally.read - tally.bad, tally.held_out)
            part = self._write(name, tables, train_rows, quarantine, listed)
            manifests[name] = PartManifest(
                spec=self.spec,
                sources=sources,
                files=len(job.files),
                part=part,
                held_out=tally.held_out,
                texts={name: texts.result() for name, texts in tally.texts.items()},
            )
        for name, manifest in manifests.items():
            manifest.write(manifest_uri(self.root, name))
        tally.done()
        return manifests

    def _take_in(self, chunk: Chunk, job: Job, sorter: Sorter, tally: _Tally) -> None:
        """Encode a chunk's records and hand the good ones to the sorter."""
        encoded = encode_checked(chunk.records, self.specs, self.source.timezone, self.source.missing)
        features = encoded.features
        group_R = np.zeros(len(chunk.rows_R), np.int64)
        if self.source.group:
            group_R = hash_values(chunk.records.column(self.source.group))
        if encoded.faults:
            keep_R = np.ones(len(chunk.rows_R), np.bool_)
            keep_R[list(encoded.faults)] = False
            chunk = chunk.without(encoded.faults)
            features, group_R = features.filter(pa.array(keep_R)), group_R[keep_R]
        file_number = job.files.index(chunk.path)
        rows = len(chunk.rows_R)
        timed = order_of(self.config) == "time"
        seed = np.uint64(self.config.run.seed)
        order_R, held_R = _draws(seed, np.uint64(file_number), chunk.rows_R)
        key_R = (chunk.micros_R + (1 << 62)).astype(np.uint64) if timed else order_R >> np.uint64(1)
        if job.hold_out:
            out_R = held_R < np.uint64(int(job.hold_out * 2.0**64))
            key_R = np.where(out_R, key_R | np.uint64(1 << 63), key_R)
            tally.held_out += int(out_R.sum())
        micros = pa.array(chunk.micros_R) if self.source.time else pa.nulls(rows, pa.int64())
        beside = {
            LABEL: pa.array(chunk.label_R),
            TIME: micros,
            GROUP: pa.array(group_R),
            FILE: pa.array(np.full(rows, file_number, np.int32)),
            ROW: pa.array(chunk.rows_R),
        }
        sorter.add(pa.table({**dict(zip(features.column_names, features.columns, strict=True)), **beside}), key_R)
        tally.add(chunk, encoded.values)

    def _write(self, name: str, tables: Iterator[pa.Table], train_rows: int, quarantine: str, bad: int) -> Part:
        sketching = Sketching(name, self.specs, 0, train_rows)
        path, sha256, rows = write_rows(self.root, name, tables, sketching.add)
        listed = f"{name}/quarantine.csv" if bad else ""
        if bad:
            with storage.writer(storage.join(self.root, listed)) as target, open(quarantine, "rb") as lines:
                target.write(b"file,line,reason\n")
                shutil.copyfileobj(lines, target)
        part = Part(path=path, sha256=sha256, rows=rows, bad_rows=bad, quarantine=listed)
        sketching.save(self.root, part, name)
        return part


@njit(nogil=True, cache=True)
def _draws(seed: Any, file: Any, rows_R: Array) -> tuple[Array, Array]:
    """Two counter hashes of each record: its place in a shuffle, and whether it is held out."""
    base = splitmix64(splitmix64(seed) ^ file)
    order_R, held_R = np.empty(len(rows_R), np.uint64), np.empty(len(rows_R), np.uint64)
    for i in range(len(rows_R)):
        order_R[i] = splitmix64(base ^ uint64(rows_R[i]))
        held_R[i] = splitmix64(order_R[i])
    return order_R, held_R


class _Tally:
    """What goes by: counts, bad records, frequent values, and a line of progress now and then."""

    def __init__(self, part: str, quarantine: Any, fields: Sequence[str]) -> None:
        self.read = self.bad = self.held_out = 0
        self.texts = {name: ValueTexts() for name in fields}
        self._part = part
        self._quarantine = csv.writer(quarantine, lineterminator="\n")
        self._reasons: list[str] = []
        self._started = self._told = time.monotonic()

    def add(self, chunk: Chunk, values: Mapping[str, tuple[Array, Any]]) -> None:
        """Count a chunk."""
        self.read += chunk.read
        self.bad += len(chunk.bad)
        self._quarantine.writerows((chunk.path, line, reason) for line, reason in chunk.bad)
        for line, reason in chunk.bad[: 3 - len(self._reasons)]:
            self._reasons.append(f"{chunk.path} line {line}: {reason}")
        for name, (keys_V, texts) in values.items():
            self.texts[name].add(keys_V, texts)
        if time.monotonic() - self._told > PROGRESS_S:
            self._tell()

    def check(self, job: Job, most: float) -> None:
        """Raises ``DataError`` if too many records are bad or none is good."""
        if not self.read:
            raise DataError(f"{', '.join(job.files[:3])}: no records; give files with at least one")
        reasons = "; ".join(self._reasons)
        if self.bad > most * self.read:
            share = f"{self.bad} of {self.read} records are bad ({self.bad / self.read:.2%})"
            raise DataError(f"{share}, more than source.max_bad_share = {most:g}: {reasons}")
        if self.bad == self.read:
            raise DataError(f"{', '.join(job.files[:3])}: no good record among {self.read}: {reasons}")

    def done(self) -> None:
        """Say the last line."""
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        rate = round((self.read - self.bad) / max(self._told - self._started, 1e-9))
        log.emit("ingest", part=self._part, rows=self.read - self.bad, bad_rows=self.bad, rows_per_s=rate)


@contextmanager
def _scratch(root: str, part: str) -> Iterator[str]:
    """A local folder that is empty at first and gone afterwards."""
    filesystem, path = storage.resolve(root)
    if isinstance(filesystem, pafs.LocalFileSystem):
        folder = os.path.join(path, f".scratch-{part}")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    else:
        folder = tempfile.mkdtemp(prefix="des-ingest-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            # A store that was never begun leaves no empty folder.
            os.rmdir(path)


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


def _assemble(store: _Store, manifests: dict[str, PartManifest]) -> Reference:
    """Write the dataset's manifest from its parts'; one that would not change is left alone."""
    splits = divide(store.config, manifests)
    totals: list[list[Sketch]] = [[] for _ in store.specs]
    for segment in splits["train"]:
        part = manifests[segment.part].part
        found = sketches(store.root, part, segment.part, store.specs, segment.start, segment.stop)
        for total, sketch in zip(totals, found, strict=True):
            total.append(sketch)
    merged_sketches = [merged(spec, total) for spec, total in zip(store.specs, totals, strict=True)]
    known = store.dataset()
    fields = tuple(with_statistics(spec, sketch) for spec, sketch in zip(store.specs, merged_sketches, strict=True))
    if known is not None and known.spec == store.spec and _overlap(known, manifests):
        # Days that come later must not change what a number means to the model.
        fields = known.fields
    files, first_files = _files_of(manifests)
    dataset = Dataset(
        spec=store.spec,
        task=store.source.task,
        fields=fields,
        has_group=bool(store.source.group),
        has_time=bool(store.source.time),
        parts={
            name: manifest.part.model_copy(update={"first_file": first_files[name]})
            for name, manifest in manifests.items()
        },
        splits=splits,
        files=files,
        stats=_stats(fields, merged_sketches, manifests),
    )
    uri = storage.join(store.root, "manifest.json")
    if known == dataset:
        return Reference(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest())
    return dataset.write(uri)


def _overlap(known: Dataset, manifests: Mapping[str, PartManifest]) -> bool:
    """Whether a part of the known dataset is still there, unchanged."""
    return any(name in known.parts and known.parts[name].sha256 == part.part.sha256 for name, part in manifests.items())


def _files_of(manifests: Mapping[str, PartManifest]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Digests of all raw files, and where each part's begin; parts of the same files share them."""
    files: list[str] = []
    starts: dict[tuple[str, ...], int] = {}
    first_files: dict[str, int] = {}
    for name, manifest in manifests.items():
        own = manifest.sources[: manifest.files]
        if own not in starts:
            starts[own] = len(files)
            files += [digest[:16] for digest in own]
        first_files[name] = starts[own]
    return tuple(files), first_files


def _stats(
    fields: Sequence[FieldSpec], totals: Sequence[Sketch], manifests: Mapping[str, PartManifest]
) -> dict[str, FieldStats]:
    texts: dict[str, dict[int, str]] = {spec.name: {} for spec in fields}
    for manifest in manifests.values():
        for name, known in manifest.texts.items():
            texts[name] |= dict(known)
    return {spec.name: stats_of(spec, total, texts[spec.name]) for spec, total in zip(fields, totals, strict=True)}


def _remove_stale(root: str, dataset: Dataset, everything: bool) -> None:
    """Remove the store's files that its manifest does not name; days of other configs go with ``everything`` else."""
    for name in storage.list_folder(root):
        folder = storage.join(root, name)
        if name in dataset.parts:
            _clean_part(root, name, dataset)
        elif name.startswith(".scratch-") and everything:
            storage.delete(folder)
        elif name != "manifest.json" and (everything or whole_part(root, name) is not None):
            inside = storage.list_folder(folder)
            if inside and all(_OURS.fullmatch(file) for file in inside):
                storage.delete(folder)


def _clean_part(root: str, name: str, dataset: Dataset) -> None:
    part = dataset.parts[name]
    segments = [segment for segment in dataset.splits["train"] if segment.part == name]
    named = {part.path, part.quarantine, f"{name}/manifest.json"}
    named |= {f"{name}/sketches-{segment.start}-{segment.stop}.arrow" for segment in segments}
    for file in storage.list_folder(storage.join(root, name)):
        if f"{name}/{file}" not in named and _OURS.fullmatch(file):
            storage.delete(storage.join(root, name, file))
