"""Which results of a run are there, whole, and made of the present config and logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from des_core import storage
from des_core.config import Config
from des_core.contracts import Dataset, Reference
from des_core.data.store import predictions
from des_core.errors import StorageError
from des_core.run import Run, features_uri, pin

if TYPE_CHECKING:
    from des_core.data.store.parts import PartManifest

RESULTS = ("report.json", "report.html", "predictions", "champion.json", "gate.json", "version.json")
"""What a finished run has left beside its training."""


def finished_run(config: Config, as_of: str = "") -> Run | None:
    """The run of this config and the present logs, if it is registered and all of its results are there."""
    from des_core.release.registry import registry

    run = known_day(config, as_of) if as_of else pin(config) if is_ingested(config) else None
    if run is None or not is_evaluated(run) or not all(storage.exists(run.path(name)) for name in RESULTS):
        return None
    record = registry.recorded(run)
    if record is None or not is_judged(run, record.gate):
        return None
    record.write(run.path("version.json"))
    publish(run)
    return run


def publish(run: Run) -> None:
    """Copy what people open to the root, and mark this run as the latest."""
    predictions.copy(run.path("predictions"), storage.join(run.config.storage.root, "predictions"))
    run.publish()


def is_ingested(config: Config) -> bool:
    """Whether the feature store is made of this config and the raw files as they are now."""
    from des_core.data.store import features

    uri = features_uri(config)
    if not storage.exists(uri):
        return False
    files = features.source_files(config)
    if not all(storage.exists(path) for paths in files.values() for path in paths):
        return False
    parts = Dataset.read(uri).parts
    if len(files) == 1:
        # One set of files may have been cut into days, each a part.
        (paths,) = files.values()
        files = dict.fromkeys(parts, paths)
    return parts.keys() == files.keys() and features.current_parts(config, files) is not None


def known_day(config: Config, as_of: str) -> Run | None:
    """The run of a day, if the logs are ingested as they are now and the day was pinned."""
    from des_core.recurring import daily

    parts = day_parts(config, as_of)
    return daily.pinned(config, as_of, parts) if parts is not None else None


def day_parts(config: Config, as_of: str) -> dict[str, PartManifest] | None:
    """The parts of a day and of the usable days before it; None if one is not made of the logs as they are now."""
    from des_core.data.store import features
    from des_core.recurring import daily

    files = {
        day: paths
        for day, paths in daily.closed(config, as_of).items()
        if day == as_of or not daily.unusable(config, day, paths)
    }
    parts = features.current_parts(config, files)
    return parts if parts is not None and as_of in parts else None


def is_trained(run: Run) -> bool:
    """Whether training.json is there and the checkpoint that it names is whole."""
    if not storage.exists(run.path("training.json")):
        return False
    try:
        Reference.parse(storage.read_json(run.path("training.json"))["checkpoint"]).read()
    except (StorageError, KeyError, TypeError):
        return False
    return True


def is_evaluated(run: Run) -> bool:
    """Whether report.json and the predictions that it names are there, and of this training."""
    if not is_trained(run) or not storage.exists(run.path("report.json")):
        return False
    try:
        report = storage.read_json(run.path("report.json"))
        if report["training_sha256"] != run.reference("training.json").sha256:
            return False
        return predictions.is_whole(run.path("predictions"), report["predictions_sha256"])
    except (StorageError, FileNotFoundError, KeyError, TypeError):
        return False


def is_judged(run: Run, sha256: str) -> bool:
    """Whether the verdict is the one that was registered, on the files that are there, by the config's bounds."""
    from des_core.release.judge import champion
    from des_core.verdict import Verdict

    try:
        judged = run.reference("gate.json")
        if judged.sha256 != sha256:
            return False
        verdict = Verdict.load(judged)
        new_rows = str(run.reference("new_rows.json")) if run.day is not None else ""
        there = (str(run.reference("champion.json")), new_rows, run.config.verdict_digest)
        return (verdict.inputs, verdict.new_rows, verdict.bounds) == there and champion.is_whole(run)
    except StorageError:
        return False
