"""What a pipeline's step and the single command of the same name both do: skip what is done, else do it.

Every stage may be repeated after any crash: it finds its own finished result, or makes it whole. What a stage needs
it reads from the run's folder; nothing else passes from one to the next.
"""

from __future__ import annotations

import textwrap
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from components.finished import is_evaluated, is_trained, publish
from components.launch import memory
from components.launch.roles import launch
from des_core import log, remote, storage
from des_core.config import Config
from des_core.contracts import Dataset, Reference
from des_core.errors import ConfigError, DataError, StorageError, UserError
from des_core.run import Run, features_uri, pin

if TYPE_CHECKING:
    from des_core.data.store.parts import PartManifest

ALL, ABSENT = "all", "absent"
"""What a run may be about beside a day."""

POLL_S = 60.0
"""Between two looks for a day's logs."""

SHORT = 80
"""Characters of a reason in a step's line."""

EXAMPLE_ROWS = 5
"""Raw records that MLflow shows beside a model."""


@dataclass(frozen=True)
class Done:
    """A stage's result."""

    what: str
    """One line for a person."""
    reference: str = ""
    """Of the manifest that was written or found."""
    unchanged: bool = False
    """Whether it was there already."""
    page: str = ""
    """Address of a page to look at."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """For machines."""


def resolve(config: Config, as_of: str = "") -> Done:
    """Check all that can be checked before anything is computed; ``reference`` is the day, "all" or "absent".

    Args:
        as_of: a date, "yesterday", or empty for whole logs.

    Raises:
        UserError: logs are missing, the registry does not answer, or ``as_of`` is not understood.
    """
    from des_core.data.store import features
    from des_core.release.registry import availability, registry

    if "[[" in as_of or "{{" in as_of:
        raise ConfigError(
            f"as_of = {as_of!r} was not expanded by the scheduler; give a date, yesterday, or leave it empty"
        )
    if config.cluster.backend == "pytorchjob":
        from components.launch import cluster

        cluster.check(config)
    try:
        # Formats that declare their own fields are not known to the config.
        config.check_slices({field.name: field.kind for field in features.fields_of(config)})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    availability.check(config.registry.tracking_uri, config.registry.wait_s or remote.patience_s())
    what = f"{config.model.name} on {_count(config.train.workers, 'worker')}"
    if as_of:
        return _resolve_day(config, as_of, what)
    _check_order(config)
    files = features.source_files(config)
    parent = registry.parent(config)
    if parent is not None and parent.as_of:
        raise UserError(
            f"{config.run.name} is retrained by the day, and version {parent.version}, of {parent.as_of}, may have "
            f"seen any of these logs; give a day: --as-of DATE, or another name: --set run.name={config.run.name}-whole"
        )
    logs = _count(len({file for part in files.values() for file in part}), "file")
    return Done(f"{what}, {logs} of {config.source.format} logs", ALL, numbers={"as_of": ""})


def _check_order(config: Config) -> None:
    """Refuse to count days where samples are shuffled: the last day of whole logs then comes up at once.

    Raises:
        ConfigError: rows are to go by days, and the order is random.
    """
    if config.table.idle_days and config.train.shuffle:
        raise ConfigError(
            "table.idle_days counts the days of the logs, and train.shuffle = true meets them all at once; "
            "set train.shuffle to false, or run day by day (des run --as-of)"
        )


def _resolve_day(config: Config, as_of: str, what: str) -> Done:
    """The day, once its logs have arrived; "absent" where they do not arrive and the config allows it."""
    from des_core.recurring import daily

    day = daily.yesterday(config) if as_of == "yesterday" else daily.parse_day(as_of, "as_of")
    deadline = time.monotonic() + config.recurring.wait_hours * 3600
    while True:
        days = daily.closed(config, day)
        if day in days or time.monotonic() >= deadline:
            break
        log.emit("wait", day=day, hours=config.recurring.wait_hours)
        time.sleep(min(POLL_S, max(deadline - time.monotonic(), 0.0)))
    if day in days:
        return Done(f"{what}, {day}: {_count(len(days), 'closed day')}", day, numbers={"as_of": day})
    missing = config.source.ready.replace("{day}", day) if config.source.ready else "its logs"
    if config.recurring.on_missing == "fail":
        raise DataError(f"{day}: {missing} did not come; see recurring.wait_hours and recurring.on_missing")
    return Done(f"{day}: {missing} did not come, nothing to do", ABSENT, numbers={"as_of": day})


def ingest_and_pin(config: Config, as_of: str = ALL) -> Done:
    """The feature store that a run needs, and ``inputs.json``: whole logs, or a day's window.

    Args:
        as_of: a day, or "all".

    Raises:
        DesError: the RayJob that reads the logs failed (``ingest_job.launch``).
        ConfigError: the run needs more memory than its workers may have, which only the data's statistics tell.
    """
    here = config
    if config.ingest.engine == "ray" and config.cluster.backend == "pytorchjob":
        from components.launch import ingest_job

        ingest_job.launch(config, as_of)
        # All is there: this pod has no Ray cluster, and needs none to find it.
        here = config.model_copy(update={"ingest": config.ingest.model_copy(update={"engine": "local"})})
    if as_of != ALL:
        return _ingest_day(config, as_of, here)
    done = ingest(here)
    run = pin(config, Reference.parse(done.reference))
    memory.check(run)
    return replace(done, reference=str(run.reference("inputs.json")))


def _ingest_day(config: Config, as_of: str, here: Config) -> Done:
    """Every closed day up to this one that is missing; then the window is pinned.

    Args:
        here: the config by which this process reads logs.
    """
    from des_core.recurring import daily

    parts = day_parts(here, as_of)
    known = daily.pinned(config, as_of, parts)
    run = daily.pin_day(config, as_of, parts)
    memory.check(run)
    assert run.day is not None
    dataset = Dataset.load(run.dataset)
    new, tail = dataset.rows("train"), dataset.rows("test")
    what = f"{_count(len(run.day.days), 'day')}: {new:,} new rows before the cut, {tail:,} in the tail"
    bad = sum(part.part.bad_rows for part in parts.values())
    outside = sum(parts[day].outside for day in run.day.days)
    what += f"; {_count(bad, 'bad row')} in quarantine" if bad else ""
    what += f"; {_count(outside, 'row')} from other days" if outside else ""
    what += f"; left out: {', '.join(run.day.left_out)}" if run.day.left_out else ""
    unchanged = known is not None and known.key == run.key
    return Done(what, str(run.reference("inputs.json")), unchanged)


def ingest_logs(config: Config, as_of: str) -> str:
    """Read the logs of a day and of the days before it, or all; one line that says what there is. Nothing is pinned."""
    return ingest(config).what if as_of == ALL else _count(len(day_parts(config, as_of)), "day")


def day_parts(config: Config, as_of: str) -> dict[str, PartManifest]:
    """The day parts up to ``as_of``, made where they are missing.

    Raises:
        DataError: that day has no logs, or unusable ones.
    """
    from des_core.recurring import daily

    files = daily.closed(config, as_of)
    if as_of not in files:
        raise DataError(f"{as_of}: no logs of that day; there are {', '.join(files) or 'none'}")
    return daily.ingest(config, files, as_of)


def ingest(config: Config, day: str | None = None) -> Done:
    """Raw logs -> feature store."""
    from des_core.data.store import features

    uri = features_uri(config)
    before = storage.read_bytes(uri) if storage.exists(uri) else b""
    reference = features.ingest(config, day)
    dataset = Dataset.load(reference)
    rows = {split: dataset.rows(split) for split in ("train", "valid", "test")}
    bad = sum(part.bad_rows for part in dataset.parts.values())
    what = ", ".join(f"{count:,} {split}" for split, count in rows.items()) + f" rows, {len(dataset.fields)} fields"
    what += f"; {_count(bad, 'bad row')} in quarantine" if bad else ""
    unchanged = storage.read_bytes(uri) == before
    return Done(what, str(reference), unchanged, numbers={"rows": rows, "bad_rows": bad, "dataset": str(reference)})


def score(run: Run) -> Done:
    """``new_rows.json``: the champion on the window's rows, before anything is trained on them."""
    if run.day is None:
        return Done("whole logs: no row is new", str(run.reference("inputs.json")), unchanged=True)
    from des_core.release.judge import champion
    from des_core.verdict import NewRows

    reference, kept = champion.score_new(run, lambda: launch("score", run))
    record = NewRows.load(reference)
    who = f"version {record.version} on {record.samples:,} new rows" if record.version else "there is no champion yet"
    if record.reason:
        who = f"the champion cannot score the new rows: {record.reason}"
    return Done(who + _metric("", record.metrics), str(reference), kept)


def train(run: Run, resume: bool | None = None) -> Done:
    """Weights and ``training.json``; by default from the last checkpoint, if there is one.

    Raises:
        DesError: as ``launch``.
    """
    finished = is_trained(run)
    if run.day is None:
        _check_order(run.config)
    if not finished:
        for name in ("training.json", "report.json", "predictions", "champion.json", "gate.json"):
            storage.delete(run.path(name))
        memory.check(run)
        resume = storage.exists(storage.join(run.checkpoints, "last.json")) if resume is None else resume
        launch("train", run, resume)
    training = storage.read_json(run.path("training.json"))
    best: dict[str, Any] = max(training["valid"], key=lambda epoch: epoch["score"], default={})
    what = f"{_count(training['workers'], 'worker')}, {_count(training['steps'], 'step')}"
    what += f", {training['samples_per_s']:,.0f} samples/s" + _metric(" best valid", best)
    numbers = {key: training[key] for key in ("workers", "steps", "samples_per_s", "checkpoint")}
    return Done(what, str(run.reference("training.json")), finished, numbers=numbers)


def evaluate(run: Run) -> Done:
    """``report.json``, the predictions, the champion on the same rows, and the page.

    Raises:
        UserError: the run was not trained.
    """
    from des_core.release.judge import champion
    from des_core.release.report import report

    if not is_trained(run):
        raise UserError(f"{run.path('training.json')}: this config and data were not trained; run des train first")
    finished = is_evaluated(run)
    if not finished:
        for name in ("report.json", "predictions"):
            storage.delete(run.path(name))
    _, kept = champion.score(run, lambda: launch("evaluate", run))
    page = report.write(run)
    publish(run)
    numbers = storage.read_json(run.path("report.json"))
    what = f"{numbers['samples']:,} test rows" + _metric("", numbers)
    reference = str(run.reference("report.json"))
    return Done(what, reference, finished and kept, page, headline(numbers))


def gate(run: Run) -> Done:
    """``gate.json``, and the page with the verdict on it.

    Raises:
        UserError: the run was not evaluated.
    """
    from des_core.recurring import daily
    from des_core.release.judge.gate import decide
    from des_core.release.report import report
    from des_core.verdict import Verdict

    if not storage.exists(run.path("champion.json")):
        raise UserError(f"{run.path('report.json')}: this run was not evaluated; run des evaluate first")
    before = storage.read_bytes(run.path("gate.json")) if storage.exists(run.path("gate.json")) else b""
    reference = decide(run)
    verdict = Verdict.load(reference)
    page = report.write(run)
    publish(run)
    unchanged = storage.read_bytes(run.path("gate.json")) == before
    daily.quarantine(run, verdict.days_at_fault, verdict.reasons)
    # All of it is said at the end.
    what = f"{verdict.verdict}: {textwrap.shorten(verdict.reasons[0], SHORT, placeholder=' ...')}"
    numbers = {"verdict": verdict.verdict, "reasons": list(verdict.reasons)}
    return Done(what, str(reference), unchanged, page, numbers)


def register(run: Run) -> Done:
    """``version.json``: the model in the registry, and its aliases."""
    from des_core.recurring import retention
    from des_core.release.judge.gate import same_verdict, verdict_of
    from des_core.release.registry import registration
    from des_core.release.report import report
    from des_core.verdict import Verdict

    judged = run.reference("gate.json")
    if not same_verdict(judged, verdict_of(run)):
        raise StorageError(f"{judged.uri} is not the verdict that the run's files give; judge it again: des register")
    verdict = Verdict.load(judged)
    reference, adopted = registration.register(run, verdict, _model)
    record = registration.Registered.load(reference)
    page = report.write(run)
    publish(run)
    retention.after_run(run.config)
    aliases = ", ".join(record.aliases) or "no alias"
    what = f"unchanged, version {record.version}" if adopted else f"{record.name} version {record.version} ({aliases})"
    numbers = {"name": record.name, "version": int(record.version), "aliases": list(record.aliases)}
    return Done(what, str(reference), adopted, page, numbers | {"accepted": record.accepted})


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a report that commands print."""
    names = ("split", "samples", "auc", "logloss", "ne", "calibration", "gauc", "rmse", "mae")
    return {name: report[name] for name in names if report.get(name) is not None}


def _model(run: Run, folder: str) -> pa.Table:
    """Describe the model in a folder; a few raw records for it."""
    from des_core.release.serve import serving

    serving.write(run, folder)
    return example_rows(run)


def example_rows(run: Run) -> pa.Table:
    """A few raw records with all of the model's columns, from the logs that the run is of; texts stay texts."""
    from des_core.data.read import sources
    from des_core.data.read.hashing import as_text
    from des_core.data.store import features

    source, fields = sources.source_of(run.config), Dataset.load(run.dataset).fields
    parts = features.source_files(run.config)
    # A field may be newer than the logs of days before.
    last = run.day.as_of if run.day is not None else list(parts)[-1]
    chunks = sources.read(source, parts[last], fields, labelled=False)
    records = next(chunk.records for chunk in chunks if chunk.records.num_rows).slice(0, EXAMPLE_ROWS)
    for spec in fields:
        if not spec.column:
            continue
        column = records.column(spec.column)
        if spec.form == "text" and pa.types.is_integer(column.type):
            place = records.column_names.index(spec.column)
            records = records.set_column(place, spec.column, as_text(column.combine_chunks()))
    return records


def _metric(prefix: str, metrics: dict[str, Any]) -> str:
    for key, name in (("auc", "AUC"), ("rmse", "RMSE")):
        if metrics.get(key) is not None:
            return f",{prefix} {name} {metrics[key]:.4f}"
    return ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
