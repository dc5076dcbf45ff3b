"""The champion's scores: of a day's new rows before anything is trained on them, and of the test rows.

It sees them through its own field definitions. Where the run's feature store holds all of its columns, it reads them
there; where its fields were defined differently, the raw logs are ingested again with its definitions into a scratch
folder, and the samples that both have are joined by their ids. A champion that needs a column which the logs no longer
have cannot be compared.

A day's run scores with the champion that was pinned, whoever is champion by then: the new rows are all rows of its
window, which no model of this line was trained on. The reference must not have seen the test rows either: a version
that gate.reference names, or in a day's run the champion's forerunner of a week before.
"""

from __future__ import annotations

from datetime import date, timedelta
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from des_core import metrics as measure
from des_core import scratch, storage
from des_core.config import FieldConfig, StorageConfig
from des_core.contracts import FILE, LABEL, ROW, TIME, Dataset, FieldSpec, Reference, Segment
from des_core.data.feed.batches import Stream, columns_of, sample_ids
from des_core.data.store import drift
from des_core.errors import ConfigError, DataError, StorageError, UserError
from des_core.release.judge import checks
from des_core.release.judge.gate import read_table
from des_core.release.registry import registry
from des_core.run import Day, Run
from des_core.verdict import Champion, NewRows

if TYPE_CHECKING:
    from des_core.release.serve.serving import Scorer

STORED = ("name", "column", "kind", "separator", "weight", "derive", "form", "cross")
"""What decides a field's columns in the feature store: statistics and pooling are applied when they are read."""

BATCH = 8192

REFERENCE_DAYS = 7
"""Between a day's run and the champion that it is compared with beside the present one."""


def score(run: Run) -> tuple[Reference, bool]:
    """``champion.json`` of the run, and whether it was there already.

    It is kept where it scored this report's rows with the run's champion: of a day the pinned one. Of a run over whole
    logs it is the present one, and what is registered is kept too: its verdict is then a fact, and the champion may
    well be the run's own model.

    Raises:
        UserError: the champion or gate.reference is not in the registry, or the latter has seen the test rows.
    """
    report = str(run.reference("report.json"))
    present, own = (run.day.champion, "") if run.day is not None else registry.standing(run)[:2]
    referred, given = _reference(run)
    known = _whole_record(run, report)
    if known is not None and not own and known.version != present:
        known = None
    if known is not None and known.reference == referred:
        return run.reference("champion.json"), True
    record = known or _compared(run, report, present)
    reason, sha256 = "", ""
    if referred:
        try:
            reason, sha256 = _score_test(run, referred, "reference.parquet")
        except (UserError, StorageError) as error:
            # The run does without one that nobody asked for.
            if given:
                raise
            reason = str(error)
    changes = {"reference_reason": reason, "reference_sha256": sha256, "reference_given": given}
    changes["reference"] = referred
    return record.model_copy(update=changes).write(run.path("champion.json")), False


def _reference(run: Run) -> tuple[str, bool]:
    """The version that is compared as well, and whether the config names it."""
    named = run.config.gate.reference
    if named:
        return named.removeprefix("none"), True
    if run.day is None or not run.day.champion:
        return "", False
    week_ago = (date.fromisoformat(run.day.as_of) - timedelta(days=REFERENCE_DAYS)).isoformat()
    champion = f"models:/{run.config.run.name}/{run.day.champion}"
    for link in registry.chain(champion, run.config.registry.tracking_uri):
        if link.as_of and link.as_of <= week_ago:
            # The champion itself, where it is that old, is compared already.
            return ("" if link.version == run.day.champion else link.version), False
    return "", False


def _compared(run: Run, report: str, version: str) -> Champion:
    """The record of the champion's scores, without a reference."""
    if not version:
        return Champion(status="none", report=report)
    reason, sha256 = _score_test(run, version, "champion.parquet")
    status: Literal["scored", "not_comparable"] = "not_comparable" if reason else "scored"
    return Champion(status=status, version=version, reason=reason, report=report, scores_sha256=sha256)


def _whole_record(run: Run, report: str) -> Champion | None:
    """champion.json, if it is of this report and the scores that it names have the right digest."""
    if not storage.exists(run.path("champion.json")):
        return None
    try:
        record = Champion.load(run.reference("champion.json"))
    except StorageError:
        return None
    named = {"champion.parquet": record.scores_sha256, "reference.parquet": record.reference_sha256}
    whole = all(_is(run.path(name), sha256) for name, sha256 in named.items() if sha256)
    return record if whole and record.report == report else None


def is_whole(run: Run) -> bool:
    """Whether the records of this run's comparisons, and the scores that they name, are as they were written."""
    report = str(run.reference("report.json"))
    return _whole_record(run, report) is not None and (run.day is None or _whole_new_rows(run))


def _is(uri: str, sha256: str) -> bool:
    return storage.exists(uri) and storage.digest_file(uri) == sha256


def score_new(run: Run) -> tuple[Reference, bool]:
    """``new_rows.json`` of a day's run, and whether it was there already.

    ``new_rows.parquet`` has the pinned champion's scores of every row of the window: sample, label, probability, day.
    Without a champion there is the day's drift only.

    Raises:
        UserError: the pinned champion is not in the registry.
    """
    day = run.day
    if day is None:
        raise UserError(f"{run.folder}: this run is over whole logs, only a day's run has new rows")
    if _whole_new_rows(run):
        return run.reference("new_rows.json"), True
    record = NewRows(as_of=day.as_of)
    if day.champion:
        scored = _scored_by(run, day.champion, ("train", "test"))
        record = _summed(run, scored) if isinstance(scored, pa.Table) else NewRows(as_of=day.as_of, reason=scored)
        if isinstance(scored, pa.Table):
            sha256 = _write(run.path("new_rows.parquet"), scored)
            record = record.model_copy(update={"scores_sha256": sha256})
    root = run.dataset.uri.rpartition("/")[0]
    earlier = [name for name in storage.list_folder(root) if name < day.as_of and name not in day.left_out]
    measured = drift.measure(
        root, Dataset.load(run.dataset).fields, day.as_of, earlier[-run.config.recurring.max_days :]
    )
    changes = {"drift": measured, "accepted": day.accepted}
    return record.model_copy(update=changes).write(run.path("new_rows.json")), False


def _whole_new_rows(run: Run) -> bool:
    """Whether the day's record is there, with the scores that it names."""
    if not storage.exists(run.path("new_rows.json")):
        return False
    try:
        record = NewRows.load(run.reference("new_rows.json"))
    except StorageError:
        return False
    return not record.version or _is(run.path("new_rows.parquet"), record.scores_sha256)


def _summed(run: Run, scored: pa.Table) -> NewRows:
    """The record of the new rows' scores."""
    assert run.day is not None
    days = {}
    for name in sorted(scored["day"].unique().to_pylist()):
        rows = scored.filter(pc.equal(scored["day"], name))
        days[name] = {"samples": float(rows.num_rows)} | _judged(run.config.source.task, rows)
    return NewRows(
        as_of=run.day.as_of,
        version=run.day.champion,
        samples=scored.num_rows,
        metrics=_judged(run.config.source.task, scored),
        days=days,
    )


def _judged(task: str, scored: pa.Table) -> dict[str, float]:
    labels, predictions = (np.asarray(scored[name].to_numpy(), np.float64) for name in ("label", "probability"))
    judged = measure.judge(task, labels, predictions) if len(labels) else {}
    return {name: float(judged[name]) for name in checks.NAMES if judged.get(name) is not None}


def _score_test(run: Run, version: str, name: str) -> tuple[str, str]:
    """Write a version's scores of the test rows: why it could not score them, or the file's sha256."""
    scored = _known(run, version)
    if scored is None:
        found = _scored_by(run, version, ("test",))
        if isinstance(found, str):
            return found, ""
        scored = found
    return "", _write(run.path(name), scored.select(["sample", "probability"]))


def _known(run: Run, version: str) -> pa.Table | None:
    """The test rows' scores among those of the new rows, if this version made them."""
    if run.day is None or not storage.exists(run.path("new_rows.json")):
        return None
    record = NewRows.load(run.reference("new_rows.json"))
    if record.version != version:
        return None
    scored = read_table(run.path("new_rows.parquet"), record.scores_sha256)
    wanted = _samples(run.dataset, ("test",))["sample"]
    return scored.filter(pc.is_in(scored["sample"], value_set=wanted.combine_chunks()))


def _scored_by(run: Run, version: str, splits: tuple[str, ...]) -> pa.Table | str:
    """A version's (sample, label, probability, day) of the splits' rows in stored order, or why it has none."""
    # Loads torch, which only a run with a champion needs.
    from des_core.release.serve.serving import Scorer

    with scratch.folder("champion") as folder:
        model = f"models:/{run.config.run.name}/{version}"
        found = registry.fetch(model, run.config.registry.tracking_uri, folder)
        try:
            scorer = Scorer(found.folder, run.config.storage.root)
        except UserError as error:
            return str(error)
        began = _pinned_day(run, scorer)
        if run.day is not None and version != run.day.champion:
            _check_unseen(run.day, version, began)
        try:
            here = _has_columns(run, scorer)
            theirs = _predict(scorer, *((run.dataset, splits) if here else _ingested_again(run, scorer)))
            ours = _samples(run.dataset, splits)
            place = pc.index_in(ours["sample"], value_set=theirs["sample"].combine_chunks())
            both = ours.filter(pc.is_valid(place))
            scored = both.append_column("probability", theirs["probability"].take(place.drop_null()))
            return _unseen(run.day, began, scored).drop_columns("time")
        except UserError as error:
            return str(error)
        finally:
            storage.delete(_scratch(run))


def _pinned_day(run: Run, scorer: Scorer) -> Day | None:
    """The day whose run trained this model; None where its run was over whole logs or is not in this storage."""
    uri = storage.join(run.config.storage.root, "runs", scorer.description.run_key[:12], "inputs.json")
    day = storage.read_json(uri).get("day") if storage.exists(uri) else None
    return None if day is None else Day.model_validate(day)


def _check_unseen(day: Day, version: str, trained: Day | None) -> None:
    """A reference must not have been trained on rows that it is to judge.

    Raises:
        ConfigError: it was, or nobody knows.
    """
    if trained is None:
        raise ConfigError(
            f"gate.reference = {version}: no day's run in storage.root trained it, so it may have seen the rows that "
            "judge; choose a version of a day's run"
        )
    if trained.cut > day.cut:
        raise ConfigError(
            f"gate.reference = {version} was trained as of {trained.as_of} and may have seen rows of {day.as_of}; "
            "choose an earlier version"
        )


def _unseen(day: Day | None, trained: Day | None, scored: pa.Table) -> pa.Table:
    """The rows that the champion was not trained on.

    A window goes on where its weights end; training that starts from nothing takes the rows of before as well.
    """
    if day is None or day.checkpoint or not day.champion:
        return scored
    if trained is None:
        raise UserError(
            f"version {day.champion}: no day's run in storage.root trained it, so it may have seen the rows"
        )
    tail = pc.and_(pc.equal(scored["day"], trained.as_of), pc.greater_equal(scored["time"], trained.cut))
    return scored.filter(pc.or_(pc.greater(scored["day"], trained.as_of), tail))


def _samples(dataset: Reference, splits: tuple[str, ...]) -> pa.Table:
    """(sample, label, time, day) of the splits' rows, in stored order."""
    known = Dataset.load(dataset)
    schema = pa.schema({"sample": pa.string(), "label": pa.float32(), "time": pa.int64()})
    tables = [schema.empty_table()]
    parts = []
    for split in splits:
        for batch in Stream(dataset, split, [LABEL, TIME, FILE, ROW]).batches(BATCH):
            columns = [sample_ids(batch, known.files), batch[LABEL], batch[TIME]]
            tables.append(pa.table(columns, schema=schema))
        parts += [np.full(segment.stop - segment.start, segment.part) for segment in known.splits[split]]
    days = pa.array(np.concatenate(parts) if parts else [], pa.string())
    return pa.concat_tables(tables).append_column("day", days)


def _predict(scorer: Scorer, dataset: Reference, splits: tuple[str, ...]) -> pa.Table:
    """(sample, probability) of a feature store with the scorer's columns."""
    files = Dataset.load(dataset).files
    columns = [column for field in scorer.description.fields for column in columns_of(field)]
    tables = [pa.table({"sample": pa.array([], pa.string()), "probability": pa.array([], pa.float64())})]
    for split in splits:
        for batch in Stream(dataset, split, [*columns, FILE, ROW]).batches(BATCH):
            scores = pa.array(scorer.score_features(batch), pa.float64())
            tables.append(pa.table({"sample": sample_ids(batch, files), "probability": scores}))
    return pa.concat_tables(tables)


def _has_columns(run: Run, scorer: Scorer) -> bool:
    """Whether the run's feature store has all that the scorer reads, made in its way."""
    here = {_stored(field) for field in Dataset.load(run.dataset).fields}
    theirs, ours = scorer.description.config.source, run.config.source
    same = (theirs.timezone, theirs.missing) == (ours.timezone, ours.missing)
    return same and all(_stored(field) in here for field in scorer.description.fields)


def _stored(field: FieldSpec) -> tuple[str, ...]:
    return tuple(str(getattr(field, key)) for key in STORED)


def _ingested_again(run: Run, scorer: Scorer) -> tuple[Reference, tuple[str, ...]]:
    """A feature store of the same logs with the scorer's fields, and the splits with the rows: of a day all."""
    from des_core.data.read import sources
    from des_core.data.store import features
    from des_core.data.store.dataset import dataset_of
    from des_core.data.store.encoding import specs_of

    theirs = scorer.description.config.source
    keys = set(FieldConfig.model_fields)
    declared = tuple(FieldConfig(**field.model_dump(include=keys)) for field in scorer.description.fields)
    source = sources.source_of(run.config).model_copy(update={"timezone": theirs.timezone, "missing": theirs.missing})
    changes = {"fields": declared, "source": source, "storage": StorageConfig(root=_scratch(run))}
    config = run.config.model_copy(update=changes)
    if run.day is None:
        return features.ingest(config), ("test",)
    wanted = {segment.part for segments in Dataset.load(run.dataset).splits.values() for segment in segments}
    files = features.day_files(config)
    if wanted - set(files):
        raise DataError(f"the logs of {', '.join(sorted(wanted - set(files)))} are gone")
    manifests = features.ingest_days(config, {day: files[day] for day in sorted(wanted)})
    segments = tuple(Segment(part=day, start=0, stop=made.part.rows) for day, made in manifests.items())
    splits: dict[str, tuple[Segment, ...]] = {"train": segments, "valid": (), "test": ()}
    root = config.features_root
    dataset = dataset_of(config, source, specs_of(declared), root, manifests, splits)
    return dataset.write(storage.join(root, "manifest.json")), ("train",)


def _scratch(run: Run) -> str:
    """A feature store of this run alone."""
    return storage.join(run.folder, "champion-features")


def _write(uri: str, table: pa.Table) -> str:
    """Write a Parquet file and return its sha256."""
    written = pa.BufferOutputStream()
    pq.write_table(table, written, compression="zstd")
    return storage.write_bytes(uri, written.getvalue().to_pybytes())
