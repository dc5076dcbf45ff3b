"""Raw logs -> feature store: ordered Parquet parts, what is known of their fields, the splits.

Which files become which parts is decided here, ingestion.py makes the parts, dataset.py the manifest
over them. A part whose sources and config have not changed is left as it is.

Source: method.md, sections 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from des_core import storage
from des_core.config import Config, SourceConfig
from des_core.contracts import Dataset, Reference
from des_core.data.read import synthetic
from des_core.data.read.paths import DAY, as_list, days_of_paths, files_of
from des_core.data.read.sources import check_source, source_of
from des_core.data.store import tasks
from des_core.data.store.dataset import earlier_days, remove_stale, write_dataset
from des_core.data.store.digests import Digests
from des_core.data.store.encoding import encode, fields_of, specs_of
from des_core.data.store.ingestion import Ingestion, Job
from des_core.data.store.parts import PartManifest, current_part
from des_core.data.store.splits import order_of
from des_core.errors import DataError, UnusableLogsError

__all__ = ["day_files", "encode", "fields_of", "ingest", "ingest_days", "source_files", "specs_of"]


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
    with tasks.engine_of(config) as run:
        ingestion = Ingestion(config, source, run)
        manifests = earlier_days(ingestion.root, ingestion.spec) if day is not None else {}
        for job in _newest_first(jobs) if _by_path_day(source) else jobs:
            manifests |= ingestion.parts(job)
    reference = write_dataset(
        config, source, ingestion.specs, ingestion.root, dict(sorted(manifests.items(), key=_place))
    )
    remove_stale(ingestion.root, Dataset.load(reference), everything=day is None)
    return reference


def day_files(config: Config) -> dict[str, list[str]]:
    """Raw files by day, for logs that are delivered by day.

    Raises:
        DataError: they do not, or they are not in time order.
    """
    source = source_of(config)
    if source.train or not _by_path_day(source):
        raise DataError(f"a day's run needs {DAY} in source.path; without it all logs are one run")
    if order_of(config) != "time":
        raise DataError("a day's run needs rows in time order: set source.time, and split.by to 'time' or 'day'")
    if config.source.format == "synthetic":
        folder = storage.join(config.storage.root, "raw")
        return synthetic.generate_once(folder, config.source.days, config.source.rows_per_day, config.run.seed)
    return source_files(config)


def ingest_days(
    config: Config,
    files: Mapping[str, Sequence[str]],
    unusable: Callable[[str, UnusableLogsError], None] | None = None,
) -> dict[str, PartManifest]:
    """The parts of days, made where they are missing or their logs have changed.

    Args:
        unusable: called with a day whose logs are broken, empty or too bad, and why; the day is left out.

    Raises:
        UnusableLogsError: a day's logs are unusable, and nobody is called.
        DataError: the logs are not as the config says, or a side table is at fault.
    """
    source = source_of(config)
    check_source(source)
    parts: dict[str, PartManifest] = {}
    with tasks.engine_of(config) as run:
        ingestion = Ingestion(config, source, run)
        for job in _newest_first([Job(day, tuple(paths)) for day, paths in sorted(files.items())]):
            try:
                parts |= ingestion.parts(job)
            except UnusableLogsError as error:
                # A column that is missing, or a side table at fault, is not the day's: it stops the run.
                if unusable is None:
                    raise
                unusable(job.part, error)
    return dict(sorted(parts.items()))


def current_parts(config: Config, files: Mapping[str, Sequence[str]]) -> dict[str, PartManifest] | None:
    """The parts that are made of these raw files as they are now, or None if one is missing or of other files."""
    source, digests = source_of(config), Digests(config.storage.root)
    sides = digests.of(join.path for join in source.join)
    parts: dict[str, PartManifest] = {}
    for name, paths in files.items():
        part = current_part(config.features_root, name, config.features_digest, (*digests.of(paths), *sides))
        if part is None:
            return None
        parts[name] = part
    return parts


def _newest_first(jobs: Sequence[Job]) -> list[Job]:
    """Days with the last one before all others, which may lack columns that it has.

    A field may be newer than the logs of days before; one that the last day lacks, or that days before it had, is a
    mistake, which is found in the last day before anything else is read.
    """
    return [*jobs[-1:], *(replace(job, may_lack=True) for job in jobs[:-1])]


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
        return [Job("", tuple(files["all"]))]
    if source.train and not source.valid:
        amount = config.split.valid
        share = amount if isinstance(amount, float) and amount < 1 else 0.1
        return [Job(part, tuple(paths), share if part == "train" else 0.0) for part, paths in files.items()]
    return [Job(part, tuple(paths)) for part, paths in files.items()]
