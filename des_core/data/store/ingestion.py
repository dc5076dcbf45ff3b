"""The records of some files -> one part of the feature store, or a part for each day of event time.

    files -> pieces (pieces.py) -> runs of each (encoded.py) -> files of equally many rows (merging.py) -> manifest

Pieces and files are tasks of an engine (tasks.py). What is done is found again after a crash: pieces and files have
records of their own in a folder beside the parts, which goes when all is whole. A part's manifest is written last, so
a half-written part is never taken for whole.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

from pyarrow import fs as pafs

from des_core import log, storage
from des_core.config import Config, SourceConfig
from des_core.contracts import GROUP, Form, Part, RowsFile
from des_core.data.read.sources import read
from des_core.data.store import encoded, tasks
from des_core.data.store.dataset import earlier_days, settled_forms, stored_dataset
from des_core.data.store.digests import Digests
from des_core.data.store.encoded import EPOCH, SHOWN, PieceManifest, Work, encode_piece, merge_texts, settle
from des_core.data.store.encoding import encode_checked, fields_of, specs_of
from des_core.data.store.merging import Output, made_file, merge_file, rows_per_file, write_index
from des_core.data.store.parts import PartManifest, current_part, manifest_uri
from des_core.data.store.pieces import Piece, Plan, pieces_of_spans, spans_of_files
from des_core.data.store.runs import Order
from des_core.data.store.splits import likely_train_rows, order_of
from des_core.data.store.statistics import ValueTexts
from des_core.errors import DamagedError, UnusableLogsError, UserError

PROGRESS_S = 2.0
SAMPLE_BYTES = 4 << 20
"""Raw logs, as stored, whose values are sampled for their texts."""

_OF_PIECE = re.compile(r"(?:piece|run|bad|texts)-(\w+)[-.].*")


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
    """Makes the parts of a feature store, from the logs of one config.

    Args:
        run: an engine's.
    """

    def __init__(self, config: Config, source: SourceConfig, run: tasks.Run) -> None:
        self.config = config
        self.source = source
        self.root = config.features_root
        self.spec = config.features_digest
        self.specs = specs_of(fields_of(config))
        self._run = run
        self._had: set[str] = set()
        """Columns that days before have had."""
        self._group_form: Form = ""
        self._settled = False
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
            folder = storage.join(self.root, f".scratch-{job.part or 'days'}")
            try:
                known = self._make(job, sources, folder)
            except UserError:
                self._leave_nothing(folder)
                raise
            storage.delete(folder)
        if job.may_lack:
            self._had |= self._columns - {name for part in known.values() for name in part.lacks}
        return known

    @property
    def _columns(self) -> set[str]:
        """Columns that fields are made of."""
        return {name for spec in self.specs for name in (spec.column, spec.weight) if name}

    def _make(self, job: Job, sources: tuple[str, ...], folder: str) -> dict[str, PartManifest]:
        if not self._settled:
            self._settle(settled_forms(earlier_days(self.root, self.spec).values()))
            self._settled = True
        spans = spans_of_files(self.source, job.files, self._run)
        pieces = pieces_of_spans(spans, sources)
        size = sum(span.bytes for of_file in spans for span in of_file)
        if len(pieces) > 1:
            self._settle_by_head(job, pieces[0])
        plan = self._plan(job, size)
        _remove_others(folder, {piece.digest(plan) for piece in pieces})
        tally = _Tally(job, len(pieces))
        made = self._encode(plan, pieces, folder, tally)
        tally.check(made, self.source.max_bad_share)
        manifests = self._merge(job, made, sources, folder)
        for name, manifest in manifests.items():
            manifest.write(manifest_uri(self.root, name))
        tally.tell()
        return manifests

    def _settle(self, forms: Mapping[str, Form]) -> None:
        """Fix the forms of fields that had none."""
        self._group_form = self._group_form or forms.get(GROUP, "")
        self.specs = settle(self.specs, forms)

    def _settle_by_head(self, job: Job, piece: Piece) -> None:
        """Fix forms by the logs' first chunk, which the tasks of later pieces do not see."""
        grouped = bool(self.source.group) and not self._group_form
        if not grouped and all(spec.form or spec.cross or spec.kind == "numeric" for spec in self.specs):
            return
        chunk = next(iter(read(self.source, [piece.spans[0]], self.specs, may_lack=self._newer(job))), None)
        if chunk is None:
            return
        formats = {self.source.time: self.source.time_format}
        records = encode_checked(
            chunk.records, self.specs, self.source.timezone, self.source.missing, time_formats=formats
        )
        group = encoded.form_of_group(chunk, self.source.group) if grouped else ""
        self._settle({**records.forms, GROUP: group})

    def _newer(self, job: Job) -> tuple[str, ...]:
        return tuple(sorted(self._columns - self._had)) if job.may_lack else ()

    def _plan(self, job: Job, size: int) -> Plan:
        return Plan(
            spec=self.spec,
            part=job.part,
            source=self.source,
            sides=self._side_digests,
            specs=self.specs,
            group_form=self._group_form,
            newer=self._newer(job),
            seed=self.config.run.seed,
            timed=order_of(self.config) == "time",
            hold_out=job.hold_out,
            lateness_h=self.config.recurring.allowed_lateness,
            rarity=max(size - 1, 0).bit_length() - (SAMPLE_BYTES - 1).bit_length() if size > SAMPLE_BYTES else 0,
        )

    def _encode(self, plan: Plan, pieces: Sequence[Piece], folder: str, tally: _Tally) -> list[PieceManifest]:
        """The pieces' manifests, in order: those that are there, and new ones."""
        made = _encoded(self._run, plan, pieces, folder, tally)
        forms: dict[str, Form] = {}
        for manifest in made:
            forms = manifest.forms | forms
        self._settle(forms)
        # A later piece may have taken a field for something else than the first one that has values of it.
        odd = [
            place
            for place, manifest in enumerate(made)
            if any(form != forms[name] for name, form in manifest.forms.items())
        ]
        if odd:
            settled = plan.model_copy(update={"specs": self.specs, "group_form": self._group_form})
            again = _encoded(self._run, settled, [pieces[place] for place in odd], folder, None)
            for place, manifest in zip(odd, again, strict=True):
                made[place] = manifest
        return made

    def _merge(
        self, job: Job, made: Sequence[PieceManifest], sources: tuple[str, ...], folder: str
    ) -> dict[str, PartManifest]:
        """Each part's manifest, after its files."""
        runs = [run for manifest in made for run in manifest.runs]
        index = write_index(folder, runs)
        rows = sum(run.rows for run in runs)
        held_out = sum(manifest.held_out for manifest in made)
        bounds = {job.part: (0, rows)} if job.part else _days(made, Order(runs))
        each = rows_per_file(rows, sum(manifest.bytes for manifest in made))
        outputs = [
            Output(
                root=self.root,
                folder=folder,
                index=index,
                part=name,
                specs=self.specs,
                start=start,
                stop=min(start + each, stop),
                first=first,
                sketched=likely_train_rows(self.config, name, rows, held_out),
            )
            for name, (first, stop) in bounds.items()
            for start in range(first, stop, each)
        ]
        files: dict[str, list[RowsFile]] = {name: [] for name in bounds}
        for output, file in zip(outputs, _merged(self._run, outputs), strict=True):
            files[output.part].append(file)
        texts = {spec.name: ValueTexts() for spec in self.specs}
        for manifest in made:
            merge_texts(folder, manifest.digest, texts)
        bad = sum(manifest.bad for manifest in made)
        manifests: dict[str, PartManifest] = {}
        for name, own in files.items():
            # Records without a right time are of no day: they are listed with the first.
            listed = bad if not manifests else 0
            manifests[name] = PartManifest(
                spec=self.spec,
                sources=sources,
                files=len(job.files),
                part=Part(files=tuple(own), bad_rows=listed, quarantine=self._quarantine(name, made if listed else ())),
                outside=sum(manifest.outside for manifest in made),
                held_out=held_out,
                lacks=tuple(sorted({column for manifest in made for column in manifest.lacks})),
                forms={spec.name: spec.form for spec in self.specs if spec.form} | {GROUP: self._group_form},
                texts={name: found.result() for name, found in texts.items()},
            )
        return manifests

    def _quarantine(self, part: str, made: Sequence[PieceManifest]) -> str:
        """The path of the bad records' file, in the order of the logs; empty if there are none."""
        listed = [manifest.listed for manifest in made if manifest.listed]
        if not listed:
            return ""
        path = f"{part}/quarantine.csv"
        with storage.writer(storage.join(self.root, path)) as file:
            file.write(b"file,line,reason\n")
            for uri in listed:
                filesystem, inner = storage.resolve(uri)
                with filesystem.open_input_stream(inner, compression=None) as lines:
                    shutil.copyfileobj(lines, file, 1 << 20)
        return path

    def _leave_nothing(self, folder: str) -> None:
        """Remove what a mistake in the logs makes useless."""
        storage.delete(folder)
        filesystem, path = storage.resolve(self.root)
        if isinstance(filesystem, pafs.LocalFileSystem):
            with suppress(OSError):
                # A store that was never begun leaves no empty folders.
                os.rmdir(path)
                os.rmdir(os.path.dirname(path))


def _encoded(
    run: tasks.Run, plan: Plan, pieces: Sequence[Piece], folder: str, tally: _Tally | None
) -> list[PieceManifest]:
    """The manifests of pieces, in their order."""
    known = [_known_piece(folder, piece.digest(plan)) for piece in pieces]
    for manifest in filter(None, known):
        if tally:
            tally.add(manifest)
    missing = [
        Work(plan=plan, piece=piece, folder=folder) for piece, there in zip(pieces, known, strict=True) if there is None
    ]
    new = iter(tasks.run_all(run, encode_piece, missing, (lambda _, made: tally.add(made)) if tally else None))
    return [manifest or next(new) for manifest in known]


def _known_piece(folder: str, digest: str) -> PieceManifest | None:
    """The manifest of a piece that a process before has encoded."""
    uri = encoded.manifest_uri(folder, digest)
    if not storage.exists(uri):
        return None
    try:
        manifest = PieceManifest.read(uri)
    except DamagedError:
        return None
    return manifest if all(storage.exists(run.uri) for run in manifest.runs) else None


def _merged(run: tasks.Run, outputs: Sequence[Output]) -> list[RowsFile]:
    """The files, in order."""
    known = [made_file(output) for output in outputs]
    missing = [output for output, file in zip(outputs, known, strict=True) if file is None]
    new = iter(tasks.run_all(run, merge_file, missing))
    return [file or next(new) for file in known]


def _days(made: Sequence[PieceManifest], order: Order) -> dict[str, tuple[int, int]]:
    """Day -> ranks of its first row and of the next day's.

    Where clocks go back over midnight a day would come twice: its last minutes count as the next day's.
    """
    first: dict[str, int] = {}
    for day, micros in chain.from_iterable(manifest.days.items() for manifest in made):
        first[day] = min(micros, first.get(day, micros))
    starts: dict[str, int] = {}
    latest, stop = None, order.rows
    bounds: dict[str, tuple[int, int]] = {}
    for day in sorted(first, reverse=True):
        latest = first[day] if latest is None else min(latest, first[day])
        starts[day] = int(order.below(latest + EPOCH).sum())
        if starts[day] < stop:
            bounds[day] = (starts[day], stop)
        stop = starts[day]
    return dict(sorted(bounds.items()))


def _remove_others(folder: str, digests: set[str]) -> None:
    """Remove the files of pieces that are not these."""
    for name in storage.list_folder(folder):
        found = _OF_PIECE.fullmatch(name)
        if (found and found[1] not in digests) or ".partial-" in name:
            storage.delete(storage.join(folder, name))


class _Tally:
    """Counts of what is ingested: rows, bad records, pieces; writes progress lines."""

    def __init__(self, job: Job, pieces: int) -> None:
        self.read = self.bad = self._done = 0
        self._job, self._pieces = job, pieces
        self._started = self._told = time.monotonic()

    def add(self, piece: PieceManifest) -> None:
        """Count a piece."""
        self.read += piece.records
        self.bad += piece.bad
        self._done += 1
        if time.monotonic() - self._told > PROGRESS_S:
            self.tell()

    def check(self, made: Sequence[PieceManifest], most: float) -> None:
        """Raises ``UnusableLogsError`` if too many records are bad or none is good."""
        files = ", ".join(self._job.files[:3])
        if not self.read:
            raise UnusableLogsError(f"{files}: no records; give files with at least one")
        reasons = "; ".join([reason for manifest in made for reason in manifest.reasons][:SHOWN])
        if self.bad > most * self.read:
            share = f"{self.bad} of {self.read} records are bad ({self.bad / self.read:.2%})"
            raise UnusableLogsError(f"{share}, more than source.max_bad_share = {most:g}: {reasons}")
        if self.bad == self.read:
            raise UnusableLogsError(f"{files}: no good record among {self.read}: {reasons}")

    def tell(self) -> None:
        """Write a line."""
        self._told = time.monotonic()
        rows = self.read - self.bad
        rate = round(rows / max(self._told - self._started, 1e-9))
        counts = {"part": self._job.part or "days", "rows": rows, "bad_rows": self.bad, "rows_per_s": rate}
        pieces = {"pieces": f"{self._done}/{self._pieces}"} if self._pieces > 1 else {}
        log.emit("ingest", to=None, **counts, **pieces)
