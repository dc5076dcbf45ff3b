"""What the registry knows: the champion, the versions that led to it, and models to score with.

runs/NAME/mlflow.db         runs, versions, aliases (SQLite), or whatever server registry.tracking_uri names
ROOT/artifacts              models and reports, where no MLflow server keeps them; beside the run where ROOT is an
                            object store, for which MLflow would need a driver of its own
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.request import url2pathname

from des_core import storage
from des_core.config import Config
from des_core.errors import RegistryError, StorageError
from des_core.release.registry import availability, lineage
from des_core.release.registry.mlflow_client import (
    aliases_of,
    by_alias,
    by_number,
    connect,
    inventory,
    of_run,
    wait_s,
)
from des_core.release.registry.registration import DESCRIPTION, LOADER, Registered, record_of
from des_core.run import Run
from des_core.secrets import hidden

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


DELETED = "des.weights_deleted"
"""Tag of a version whose weights retention has deleted: when."""


class StoredModel(NamedTuple):
    """A model version on this machine."""

    name: str
    version: str
    folder: str
    """With des.json, as ``serving.write`` wrote it."""


class Standing(NamedTuple):
    """What the registry knows of a run and its name."""

    champion: str
    """Version of the name's champion, or empty."""
    version: str
    """Version of this run's own model, or empty."""
    aliases: tuple[str, ...]
    """Those that point at the run's own model."""


class Parent(NamedTuple):
    """The champion that a recurring run continues from, read from its version's tags."""

    version: str
    as_of: str
    """The day that it was trained up to, like 2026-01-31; empty: on whole logs."""
    trained_through: int
    """Its cut, event time in microseconds since 1970 UTC; 0: trained on whole logs, to be compared with and no more."""
    left_out: tuple[str, ...]
    """Days before its cut that it has not seen: absent or in quarantine."""
    checkpoint: str
    """Reference of its checkpoint, the path relative to storage.root."""


def parent(config: Config) -> Parent | None:
    """The champion of the run's name, from its tags; None without one.

    Raises:
        RegistryError: its tags are not as we write them.
    """
    if not availability.has_database(config.registry.tracking_uri, wait_s(config)):
        return None
    with connect(config.registry.tracking_uri) as client:
        version = by_alias(client, config.run.name, "champion")
    if version is None:
        return None
    tags = {key.removeprefix("des."): value for key, value in version.tags.items()}
    through = tags.get("trained_through", "")
    try:
        cut = lineage.micros(through) if through else 0
    except ValueError:
        raise RegistryError(
            f"models:/{version.name}/{version.version}: its tag des.trained_through = {through!r} is not a time; "
            "correct it, or move @champion to another version"
        ) from None
    left_out = tuple(filter(None, tags.get("left_out", "").split(",")))
    return Parent(str(version.version), tags.get("as_of", ""), cut, left_out, tags.get("checkpoint", ""))


def standing(run: Run) -> Standing:
    """The champion of the run's name, and the run's own version and aliases, as far as there are any."""
    name = run.config.run.name
    if not availability.has_database(run.config.registry.tracking_uri, wait_s(run.config)):
        return Standing("", "", ())
    with connect(run.config.registry.tracking_uri) as client:
        champion, own = by_alias(client, name, "champion"), of_run(client, run)
        number = "" if champion is None else str(champion.version)
        return Standing(number, "", ()) if own is None else Standing(number, str(own.version), aliases_of(client, own))


def parts_of(model_uri: str) -> tuple[str, str, str]:
    """Name, alias and number of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; one of the latter is empty.

    Raises:
        RegistryError: it is neither.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if not match:
        raise RegistryError(f"{model_uri}: write a model as models:/NAME@ALIAS or models:/NAME/VERSION")
    return match[1], match[2] or "", match[3] or ""


def resolve(model_uri: str, tracking_uri: str) -> str:
    """Number of the version that a model's address means at present, empty if there is none; nothing is downloaded.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    name, alias, number = parts_of(model_uri)
    if not availability.has_database(tracking_uri):
        return ""
    with connect(tracking_uri) as client:
        version = by_alias(client, name, alias) if alias else by_number(client, name, number)
    return "" if version is None else str(version.version)


@contextmanager
def _named(model_uri: str, tracking_uri: str) -> Iterator[tuple[MlflowClient, ModelVersion]]:
    shown = hidden(tracking_uri)
    name, alias, number = parts_of(model_uri)
    if not availability.has_database(tracking_uri):
        raise RegistryError(f"{model_uri}: there is no MLflow database at {shown}; register a model first")
    with connect(tracking_uri) as client:
        version = by_alias(client, name, alias) if alias else by_number(client, name, number)
        if version is None:
            raise RegistryError(f"{model_uri} does not exist at {shown}; {inventory(client, name)}")
        yield client, version


def fetch(model_uri: str, tracking_uri: str, into: str) -> StoredModel:
    """The model of ``models:/NAME@alias`` or ``models:/NAME/VERSION``.

    Raises:
        RegistryError: there is none; the message lists what there is.
    """
    with _named(model_uri, tracking_uri) as (client, version):
        return _download(client, version, into)


def version(model_uri: str, tracking_uri: str) -> lineage.Link:
    """What the tags of one version say of its run, its weights and its day; nothing is downloaded.

    Raises:
        RegistryError: there is no such version; the message lists what there is.
    """
    with _named(model_uri, tracking_uri) as (_, found):
        return lineage.link(str(found.version), (), found.run_id or "", found.tags)


def chain(model_uri: str, tracking_uri: str) -> list[lineage.Link]:
    """A version and its parents, back to the first one that is still there, the newest first.

    Raises:
        RegistryError: there is no such version; the message lists what there is.
    """
    with _named(model_uri, tracking_uri) as (client, version):
        numbers = client.get_registered_model(version.name).aliases
        links: list[lineage.Link] = []
        found: ModelVersion | None = version
        while found is not None:
            number = str(found.version)
            aliases = tuple(sorted(alias for alias, to in numbers.items() if str(to) == number))
            links.append(lineage.link(number, aliases, found.run_id or "", found.tags))
            parent = links[-1].parent_version
            # A tag can be set by hand: a circle ends.
            known = parent in {link.version for link in links}
            found = None if not parent or known else by_number(client, version.name, parent)
        return links


def recorded(run: Run) -> Registered | None:
    """``version.json`` of a run as the registry has it now; None where it is not registered, or not to the end."""
    if not availability.has_database(run.config.registry.tracking_uri, wait_s(run.config)):
        return None
    with connect(run.config.registry.tracking_uri) as client:
        version = of_run(client, run)
        if version is None or version.tags.get("des.complete") != "true":
            return None
        return record_of(client, run, version)


class Version(NamedTuple):
    """A version of a model, as far as it says what must stay in storage."""

    number: int
    aliases: tuple[str, ...]
    run_key: str
    checkpoint: str
    """Reference of its weights, the path relative to storage.root; empty where they were deleted."""


def versions(config: Config) -> list[Version]:
    """All versions of the run's name, the newest first.

    Raises:
        DesError: the registry does not answer.
    """
    if not availability.has_database(config.registry.tracking_uri, wait_s(config)):
        return []
    with connect(config.registry.tracking_uri) as client:
        found = []
        for version in client.search_model_versions(f"name='{config.run.name}'", max_results=10_000):
            tags = version.tags
            key, checkpoint = tags.get("des.run_key", ""), tags.get("des.checkpoint", "")
            gone = tags.get(DELETED)
            found.append(Version(int(version.version), aliases_of(client, version), key, "" if gone else checkpoint))
    return sorted(found, reverse=True)


def weights_deleted(config: Config, numbers: Sequence[int]) -> None:
    """Note at versions that their weights are deleted, before they are: nobody is to look for them."""
    if not numbers:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with connect(config.registry.tracking_uri) as client:
        for number in numbers:
            client.set_model_version_tag(config.run.name, str(number), DELETED, now)


def _download(client: MlflowClient, version: ModelVersion, into: str) -> StoredModel:
    """A local artifact store is read in place; from any other the model is copied."""
    import mlflow
    from mlflow.models import Model

    if version.tags.get(DELETED):
        raise RegistryError(
            f"models:/{version.name}/{version.version}: its weights were deleted by [retention] on "
            f"{version.tags[DELETED]}; choose another version, or train and register it again"
        )
    source = version.source or ""
    if source.startswith("models:/m-"):
        source = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    folder = url2pathname(source.removeprefix("file://")) if source.startswith("file:") else source
    if not os.path.isdir(folder):
        os.makedirs(into, exist_ok=True)
        folder = mlflow.artifacts.download_artifacts(artifact_uri=version.source, dst_path=into)
    flavor = Model.load(folder).flavors["python_function"]
    if flavor["loader_module"] != LOADER:
        raise RegistryError(f"models:/{version.name}/{version.version} was not made by des; choose another")
    model = Path(folder) / flavor["data"]
    if not model.resolve().is_relative_to(Path(folder).resolve()):
        raise RegistryError(f"models:/{version.name}/{version.version}: its MLmodel names a folder outside its own")
    digest = version.tags.get("des.model_digest")
    if not digest:
        raise RegistryError(
            f"models:/{version.name}/{version.version} has no tag des.model_digest, by which its files are checked: it "
            "was not registered by this version of DES; train and register it again"
        )
    if storage.digest_file(str(model / DESCRIPTION)) != digest:
        raise StorageError(
            f"{model / DESCRIPTION} has other bytes than version {version.version} of {version.name} was registered "
            "with (its tag des.model_digest); bring back the file, or train and register again"
        )
    return StoredModel(version.name, str(version.version), str(model))
