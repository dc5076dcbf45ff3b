"""What stays in storage, and the deletion of the rest.

    a version stays         that has an alias, or is among the newest ``retention.versions``
    a run stays             that a kept version came from, that is the latest, that is younger than ``retention.days``
                            and no version came from, or that has another name
    a checkpoint stays      that a kept version names, or of a kept run without a version; and the layers that it names
    a day's features stay   of the newest ``retention.days`` days, and no fewer than a window may hold
    definitions stay        that the present config or a kept run has

Manifests go before what they name, so that an interrupted deletion leaves nothing that looks whole. A process that has
a file mapped keeps its pages on a local disk; on an object store it has a copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, NamedTuple

from pyarrow import fs as pafs

from des_core import log, storage
from des_core.checkpoint import manifest as manifests
from des_core.config import Config
from des_core.errors import DesError, StorageError
from des_core.release.registry import registry
from des_core.run import under_root

MAKES = {"checkpoint": "manifest.json", "features": "manifest.json", "run": "inputs.json"}
"""The file without which a folder of a kind is nothing."""

DAY = re.compile(r"\d{4}-\d\d-\d\d")


class Doomed(NamedTuple):
    """Something that nothing refers to any more."""

    kind: str
    """run, checkpoint, features."""
    uri: str
    size: int
    why: str


@dataclass(frozen=True)
class Cleanup:
    """What is to be deleted."""

    doomed: tuple[Doomed, ...]
    versions: tuple[int, ...]
    """Versions whose weights are among it."""

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(one.size for one in self.doomed)


def plan(config: Config) -> Cleanup:
    """What the present [retention] does not keep, nothing where it sets no limit; nothing is deleted.

    Raises:
        DesError: the registry or the storage does not answer; nobody can know then what is referred to.
    """
    limits = config.retention
    if not (limits.days or limits.versions):
        return Cleanup((), ())
    versions = registry.versions(config)
    newest = limits.versions or len(versions)
    kept = [one for place, one in enumerate(versions) if one.aliases or place < newest]
    dropped = [one for one in versions if one not in kept]
    runs = _runs(config)
    stay = _kept_runs(config, runs, kept, versions)
    manifests_kept = _kept_manifests(config, runs, stay, kept)
    doomed = [
        *_checkpoints(config, runs, stay, manifests_kept),
        *(_whole(config, "run", "runs", key, "no kept version came from it") for key in runs if key not in stay),
        *_features(config, runs, stay),
    ]
    named = {one.uri for one in doomed}
    lost = [one.number for one in dropped if one.checkpoint and _folder(config, one) in named]
    return Cleanup(tuple(doomed), tuple(lost))


def apply(config: Config, cleanup: Cleanup) -> None:
    """Delete it, and note it at the versions whose weights are among it."""
    registry.weights_deleted(config, cleanup.versions)
    for one in cleanup.doomed:
        # What makes a folder one goes first: of all, for the folders of some may be layers of others.
        if one.kind in MAKES:
            storage.delete(storage.join(one.uri, MAKES[one.kind]))
    for one in cleanup.doomed:
        storage.delete(one.uri)
        log.emit("deleted", kind=one.kind, uri=one.uri, bytes=one.size)


def after_run(config: Config) -> None:
    """Delete what a run made superfluous; a failure is said and costs the run nothing."""
    try:
        apply(config, plan(config))
    except (DesError, OSError) as error:
        log.emit("not_cleaned", why=" ".join(str(error).split()), next="the next run tries again, as does des clean")


class _Known(NamedTuple):
    """A run in storage."""

    name: str
    as_of: str
    spec: str
    """Folder of its feature store."""
    began: datetime


def _runs(config: Config) -> dict[str, _Known]:
    """Runs by the first digits of their keys; one whose pin cannot be read is left alone."""
    root = storage.join(config.storage.root, "runs")
    found = {}
    for key in storage.list_folder(root):
        uri = storage.join(root, key, "inputs.json")
        if not storage.exists(uri):
            continue
        try:
            pinned = storage.read_json(uri)
            day, dataset = pinned["day"] or {}, pinned["dataset"]
            spec = under_root(config, dataset).uri.split("/")[-2]
            found[key] = _Known(pinned["name"], day.get("as_of", ""), spec, _changed(uri))
        except (StorageError, KeyError, TypeError, AttributeError) as error:
            log.emit("skipped", run=uri, why=" ".join(str(error).split())[:200])
            found[key] = _Known("", "", "", datetime.now(UTC))
    return found


def _kept_runs(
    config: Config, runs: dict[str, _Known], kept: list[registry.Version], versions: list[registry.Version]
) -> set[str]:
    limits, latest = config.retention, storage.join(config.storage.root, "latest")
    stay = {one.run_key[:12] for one in kept}
    if storage.exists(latest):
        stay.add(storage.read_bytes(latest).decode().strip())
    registered = {one.run_key[:12] for one in versions}
    oldest = datetime.now(UTC) - timedelta(days=limits.days)
    for key, run in runs.items():
        young = not limits.days or run.began >= oldest
        if run.name != config.run.name or (key not in registered and young):
            stay.add(key)
    return stay


def _kept_manifests(config: Config, runs: dict[str, _Known], stay: set[str], kept: list[registry.Version]) -> set[str]:
    """Addresses of the manifests that stay."""
    named = {_manifest(config, one.checkpoint) for one in kept if one.checkpoint}
    of_versions = {one.run_key[:12] for one in kept if one.checkpoint}
    root = storage.join(config.storage.root, "checkpoints")
    for key in storage.list_folder(root):
        # A run of which nothing is known here may be at work elsewhere.
        mine = key in runs and runs[key].name == config.run.name
        if not mine or (key in stay and key not in of_versions):
            named |= set(manifests.manifests(storage.join(root, key)))
    return named


def _manifest(config: Config, checkpoint: str) -> str:
    return under_root(config, checkpoint).uri


def _folder(config: Config, version: registry.Version) -> str:
    return _manifest(config, version.checkpoint).rpartition("/")[0]


def _checkpoints(config: Config, runs: dict[str, _Known], stay: set[str], kept: set[str]) -> Iterator[Doomed]:
    """Folders of steps that no kept manifest stands in or names."""
    root = storage.join(config.storage.root, "checkpoints")
    layers = set()
    for uri in kept:
        if storage.exists(uri):
            manifest = manifests.read(manifests.reference(uri))
            layers |= {(layer.run, layer.name) for layer in manifest.layers}
    for key in storage.list_folder(root):
        if key not in runs or runs[key].name != config.run.name:
            continue
        folder = storage.join(root, key)
        steps = [name for name in storage.list_folder(folder) if name.startswith("step-")]
        gone = [
            name
            for name in steps
            if storage.join(folder, name, "manifest.json") not in kept and (key, name) not in layers
        ]
        for name in gone:
            yield _whole(config, "checkpoint", f"checkpoints/{key}", name, "no kept version or checkpoint names it")
        if len(gone) == len(steps) and key not in stay:
            yield _whole(config, "run", "checkpoints", key, "none of its checkpoints stays", size=0)


def _features(config: Config, runs: dict[str, _Known], stay: set[str]) -> Iterator[Doomed]:
    """Days that are too old, and stores of definitions that nobody has any more."""
    if not config.retention.days:
        return
    present = config.features_digest[:12]
    used = {runs[key].spec for key in stay if key in runs} | {present}
    root = storage.join(config.storage.root, "features")
    for spec in storage.list_folder(root):
        if spec not in used and _owned(config, runs, spec):
            yield _whole(config, "features", "features", spec, "no kept run has these definitions")
    days = [name for name in storage.list_folder(config.features_root) if DAY.fullmatch(name)]
    if not days:
        return
    span = max(config.retention.days, config.recurring.max_days)
    oldest = (date.fromisoformat(days[-1]) - timedelta(days=span - 1)).isoformat()
    for name in days:
        if name < oldest:
            yield _whole(config, "features", f"features/{present}", name, f"older than {span} days")


def _owned(config: Config, runs: dict[str, _Known], spec: str) -> bool:
    """Whether only runs of this name used a feature store."""
    names = {run.name for run in runs.values() if run.spec == spec}
    return names == {config.run.name}


def _whole(config: Config, kind: str, folder: str, name: str, why: str, size: int | None = None) -> Doomed:
    uri = storage.join(config.storage.root, folder, name)
    return Doomed(kind, uri, _size(uri) if size is None else size, why)


def _size(uri: str) -> int:
    """Bytes of a folder's files."""
    return sum(info.size or 0 for info in _infos(uri, recursive=True))


def _changed(uri: str) -> datetime:
    """When a file was written."""
    filesystem, path = storage.resolve(uri)
    changed: Any = filesystem.get_file_info(path).mtime
    return changed if changed is not None else datetime.now(UTC)


def _infos(uri: str, recursive: bool) -> list[Any]:
    filesystem, path = storage.resolve(uri)
    found: list[Any] = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
    return found
