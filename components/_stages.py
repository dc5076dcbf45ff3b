"""What a pipeline's step and the single command of the same name both do: skip what is done, else do it.

Every stage may be repeated after any crash: it finds its own finished result, or makes it whole. What a stage needs
it reads from the run's folder; nothing else passes from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from components._launch import launch
from des_core import storage
from des_core.config import Config
from des_core.contracts import Dataset, Reference
from des_core.errors import ConfigError, StorageError, UserError
from des_core.run import Run, features_uri, pin

RESULTS = ("report.json", "report.html", "predictions.parquet", "champion.json", "gate.json", "version.json")
"""What a finished run has left beside its training."""

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
    """Check all that can be checked before anything is computed.

    Raises:
        UserError: logs are missing, the registry does not answer, or ``as_of`` was not expanded.
    """
    from des_core.data import features
    from des_core.release import tracking

    if "[[" in as_of or "{{" in as_of:
        raise ConfigError(f"as_of = {as_of!r} was not expanded by the scheduler; give a date, or leave it empty")
    files = features.source_files(config)
    tracking.check(config.registry.tracking_uri)
    logs = _count(len({file for part in files.values() for file in part}), "file")
    what = f"{config.model.name} on {_count(config.train.workers, 'worker')}, {logs} of {config.source.format} logs"
    return Done(what, config.model_dump_json())


def ingest(config: Config, day: str | None = None) -> Done:
    """Raw logs -> feature store."""
    from des_core.data import features

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


def train(run: Run, resume: bool | None = None, profile: bool = False) -> Done:
    """Weights and ``training.json``; by default from the last checkpoint, if there is one.

    Args:
        profile: measure a step's phases, each to its end.

    Raises:
        DesError: as ``launch``.
    """
    finished = _trained(run)
    if not finished:
        for name in ("training.json", "report.json", "predictions.parquet", "champion.json", "gate.json"):
            storage.delete(run.path(name))
        resume = storage.exists(storage.join(run.checkpoints, "last.json")) if resume is None else resume
        launch("train", run, resume, profile)
    training = storage.read_json(run.path("training.json"))
    best: dict[str, Any] = max(training["valid"], key=lambda epoch: epoch["score"], default={})
    what = f"{_count(training['workers'], 'worker')}, {_count(training['steps'], 'step')}"
    what += f", {training['samples_per_s']:,.0f} samples/s" + _metric(" best valid", best)
    numbers = {key: training[key] for key in ("workers", "steps", "samples_per_s", "checkpoint")}
    return Done(what, str(run.reference("training.json")), finished, numbers=numbers)


def evaluate(run: Run) -> Done:
    """``report.json``, ``predictions.parquet``, the champion's scores of the same rows, and the page.

    Raises:
        UserError: the run was not trained.
    """
    from des_core.release import champion, report

    if not _trained(run):
        raise UserError(f"{run.path('training.json')}: this config and data were not trained; run des train first")
    finished = storage.exists(run.path("report.json")) and storage.exists(run.path("predictions.parquet"))
    if not finished:
        launch("evaluate", run)
    _, kept = champion.score(run)
    page = report.write(run)
    run.publish()
    numbers = storage.read_json(run.path("report.json"))
    what = f"{numbers['samples']:,} test rows" + _metric("", numbers)
    reference = str(run.reference("report.json"))
    return Done(what, reference, finished and kept, page, headline(numbers))


def gate(run: Run) -> Done:
    """``gate.json``, and the page with the verdict on it.

    Raises:
        UserError: the run was not evaluated.
    """
    from des_core.release import report
    from des_core.release.gate import Verdict, decide

    if not storage.exists(run.path("champion.json")):
        raise UserError(f"{run.path('report.json')}: this run was not evaluated; run des evaluate first")
    before = storage.read_bytes(run.path("gate.json")) if storage.exists(run.path("gate.json")) else b""
    reference = decide(run)
    verdict = Verdict.load(reference)
    page = report.write(run)
    run.publish()
    unchanged = storage.read_bytes(run.path("gate.json")) == before
    what = f"{verdict.verdict}: {'; '.join(verdict.reasons)}"
    numbers = {"verdict": verdict.verdict, "reasons": list(verdict.reasons)}
    return Done(what, str(reference), unchanged, page, numbers)


def register(run: Run) -> Done:
    """``version.json``: the model in the registry, and its aliases."""
    from des_core.release import registry, report
    from des_core.release.gate import Verdict

    verdict = Verdict.load(run.reference("gate.json"))
    reference, adopted = registry.register(run, verdict, _model)
    record = registry.Registered.load(reference)
    page = report.write(run)
    run.publish()
    aliases = ", ".join(record.aliases) or "no alias"
    what = f"unchanged, version {record.version}" if adopted else f"{record.name} version {record.version} ({aliases})"
    numbers = {"name": record.name, "version": int(record.version), "aliases": list(record.aliases)}
    return Done(what, str(reference), adopted, page, numbers | {"accepted": record.accepted})


def settled(config: Config) -> Done | None:
    """The registered version of this config and the present logs, if all its results are there."""
    from des_core.release import registry

    if not _ingested(config):
        return None
    run = pin(config)
    if not _trained(run) or not all(storage.exists(run.path(name)) for name in RESULTS):
        return None
    standing = registry.standing(run)
    record = registry.Registered.load(run.reference("version.json"))
    if standing.version != record.version:
        return None
    reference = record.model_copy(update={"aliases": standing.aliases}).write(run.path("version.json"))
    run.publish()
    return Done(f"unchanged, version {standing.version}", str(reference), True)


def headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a report that commands print."""
    names = ("split", "samples", "auc", "logloss", "ne", "calibration", "gauc", "rmse", "mae")
    return {name: report[name] for name in names if report.get(name) is not None}


def _ingested(config: Config) -> bool:
    """Whether the feature store is made of this config and the raw files as they are now."""
    from des_core.data import features, parts, paths, sources

    uri = features_uri(config)
    if not storage.exists(uri):
        return False
    root, dataset = uri.rpartition("/")[0], Dataset.model_validate(storage.read_json(uri))
    files = features.source_files(config)
    if not all(storage.exists(file) for part in files.values() for file in part):
        return False
    sides = [paths.digest_of(join.path) for join in sources.source_of(config).join]
    wanted = {(*map(paths.digest_of, part), *sides) for part in files.values()}
    manifests = [parts.whole_part(root, name) for name in dataset.parts]
    made = {(part.spec, part.sources) for part in manifests if part is not None}
    return made == {(config.features_digest, digests) for digests in wanted} and None not in manifests


def _trained(run: Run) -> bool:
    """Whether training.json is there and the checkpoint that it names is whole."""
    if not storage.exists(run.path("training.json")):
        return False
    try:
        Reference.parse(storage.read_json(run.path("training.json"))["checkpoint"]).read()
    except StorageError:
        return False
    return True


def _model(run: Run) -> tuple[str, pa.Table]:
    """The exported model's folder and a few raw records."""
    from des_core.data import features, sources
    from des_core.release import serving

    source = sources.source_of(run.config)
    files = [file for part in features.source_files(run.config).values() for file in part]
    chunks = sources.read(source, files, Dataset.load(run.dataset).fields, labelled=False)
    records = next(chunk.records for chunk in chunks if chunk.records.num_rows)
    return serving.export(run), records.slice(0, EXAMPLE_ROWS)


def _metric(prefix: str, metrics: dict[str, Any]) -> str:
    for key, name in (("auc", "AUC"), ("rmse", "RMSE")):
        if metrics.get(key) is not None:
            return f",{prefix} {name} {metrics[key]:.4f}"
    return ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
