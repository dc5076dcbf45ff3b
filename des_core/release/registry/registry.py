"""The only MLflow client: models as pyfunc without pickle, versions, tags and aliases.

    runs/NAME/mlflow.db         runs, versions, aliases (SQLite), or whatever server registry.tracking_uri names
    ROOT/artifacts              models and reports, where no MLflow server keeps them; beside the run where ROOT is an
                                object store, for which MLflow would need a driver of its own

Every judged model becomes a version: ``candidate`` always points at the latest, ``champion`` at the last one that the
gate accepted. A version carries its run's key, so a run that is registered again finds its version and makes no other.
Aliases may be moved by hand at any time: a run that was judged against another champion is refused.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import url2pathname

import numpy as np
import pyarrow as pa

from des_core import remote, scratch, storage
from des_core.addresses import SQLITE, sqlite_address, sqlite_path
from des_core.config import Config
from des_core.contracts import Record, Reference
from des_core.errors import RegistryError, StorageError, of_system
from des_core.release.registry import availability, lineage
from des_core.run import Run
from des_core.secrets import hidden
from des_core.verdict import Verdict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

HISTORY_POINTS = 500
"""Loss points logged to MLflow: enough for a curve, however long the run."""

PACKAGES = ("mlflow", "numba", "numpy", "pandas", "pyarrow", "pydantic", "safetensors", "torch")
"""What a process that serves the model needs beside our code. That is named by version and digest (lineage.py): a copy
of it in every version would be most of the registry's files."""

LOADER = "des_core.release.serve.pyfunc"
DESCRIPTION = "des.json"

PAGES = (
    *("report.html", "report.json", "gate.json", "training.json"),
    *("inputs.json", "new_rows.json", "champion.json"),
)


class Registered(Record):
    """``version.json``: where the registry keeps a run's model."""

    name: str
    version: str
    aliases: tuple[str, ...]
    """Those that pointed at it when this was written."""
    accepted: bool
    run_key: str
    gate: str
    """sha256 of the gate.json that it was registered with, as its version's tag has it."""
    tracking_uri: str


class StoredModel(NamedTuple):
    """A model version on this machine."""

    name: str
    version: str
    folder: str
    """What ``serving.export`` wrote."""


class Standing(NamedTuple):
    """What the registry knows of a run and its name."""

    champion: str
    """Version of the name's champion, or empty."""
    version: str
    """Version of this run's own model, or empty."""
    aliases: tuple[str, ...]
    """Those that point at the run's own model."""


class Parent(NamedTuple):
    """The champion that a recurring run goes on from, as its version's tags tell it."""

    version: str
    as_of: str
    """The day that it was trained up to, like 2026-01-31; empty: on whole logs."""
    trained_through: int
    """Its cut, event time in microseconds since 1970 UTC; 0: trained on whole logs, to be compared with and no more."""
    left_out: tuple[str, ...]
    """Days before its cut that it has not seen: absent or in quarantine."""
    checkpoint: str
    """Reference of its checkpoint, the path relative to storage.root."""


def champion(config: Config, into: str) -> StoredModel | None:
    """The champion of the run's name, or None; a remote artifact is downloaded into the folder ``into``."""
    if not availability.has_database(config.registry.tracking_uri, _wait_s(config)):
        return None
    with _client(config.registry.tracking_uri) as client:
        version = _aliased(client, config.run.name, "champion")
        return None if version is None else _download(client, version, into)


def parent(config: Config) -> Parent | None:
    """The champion of the run's name, from its tags; None without one.

    Raises:
        RegistryError: its tags are not as we write them.
    """
    if not availability.has_database(config.registry.tracking_uri, _wait_s(config)):
        return None
    with _client(config.registry.tracking_uri) as client:
        version = _aliased(client, config.run.name, "champion")
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
    if not availability.has_database(run.config.registry.tracking_uri, _wait_s(run.config)):
        return Standing("", "", ())
    with _client(run.config.registry.tracking_uri) as client:
        champion, own = _aliased(client, name, "champion"), _of_run(client, run)
        number = "" if champion is None else str(champion.version)
        return Standing(number, "", ()) if own is None else Standing(number, str(own.version), _aliases(client, own))


def parts_of(model_uri: str) -> tuple[str, str, str]:
    """Name, alias and number of ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``; one of the latter is empty.

    Raises:
        RegistryError: it is neither.
    """
    match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", model_uri)
    if not match:
        raise RegistryError(f"{model_uri}: write a model as models:/NAME@ALIAS or models:/NAME/VERSION")
    return match[1], match[2] or "", match[3] or ""


def _wait_s(config: Config) -> float:
    """Seconds that a registry is waited for."""
    return config.registry.wait_s or remote.patience_s()


def resolve(model_uri: str, tracking_uri: str) -> str:
    """Number of the version that a model's address means at present, empty if there is none; nothing is downloaded.

    Raises:
        RegistryError: MLflow cannot be reached.
    """
    name, alias, number = parts_of(model_uri)
    if not availability.has_database(tracking_uri):
        return ""
    with _client(tracking_uri) as client:
        version = _aliased(client, name, alias) if alias else _numbered(client, name, number)
    return "" if version is None else str(version.version)


@contextmanager
def _named(model_uri: str, tracking_uri: str) -> Iterator[tuple[MlflowClient, ModelVersion]]:
    shown = hidden(tracking_uri)
    name, alias, number = parts_of(model_uri)
    if not availability.has_database(tracking_uri):
        raise RegistryError(f"{model_uri}: there is no MLflow database at {shown}; register a model first")
    with _client(tracking_uri) as client:
        version = _aliased(client, name, alias) if alias else _numbered(client, name, number)
        if version is None:
            raise RegistryError(f"{model_uri} does not exist at {shown}; {_inventory(client, name)}")
        yield client, version


def fetch(model_uri: str, tracking_uri: str, into: str) -> StoredModel:
    """The model of ``models:/NAME@alias`` or ``models:/NAME/VERSION``.

    Raises:
        RegistryError: there is none; the message lists what there is.
    """
    with _named(model_uri, tracking_uri) as (client, version):
        return _download(client, version, into)


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
            found = None if not parent or known else _numbered(client, version.name, parent)
        return links


def register(run: Run, verdict: Verdict, export: Callable[[Run], tuple[str, pa.Table]]) -> tuple[Reference, bool]:
    """``version.json`` of the run's model, and whether a version of this run was there already.

    ``export`` gives the folder of the exported model and a few raw records; it is called for a new version only.

    A registry that stops answering half-way is waited for (``registry.wait_s``), and what was begun there is begun
    again: a run has one version, however often it is tried.

    Raises:
        RegistryError: another version became champion since the gate compared.
        UnavailableError: the registry did not answer in that time.
    """
    uri = run.config.registry.tracking_uri
    ask = partial(_register, run, verdict, export)
    return remote.wait_for(f"MLflow at {hidden(uri)}", ask, _wait_s(run.config))


def _register(run: Run, verdict: Verdict, export: Callable[[Run], tuple[str, pa.Table]]) -> tuple[Reference, bool]:
    """One attempt of ``register``."""
    config = run.config
    with _client(config.registry.tracking_uri) as client:
        version = _of_run(client, run)
        adopted = version is not None
        if version is None:
            _refuse_moved_champion(client, run, verdict)
            artifact, example = export(run)
            model_uri, mlflow_run = _log(client, run, verdict, artifact, example)
            digest = storage.digest_file(storage.join(artifact, DESCRIPTION))
            made = _create_version(client, run, verdict, model_uri, mlflow_run, digest)
            # Another process may have registered this very run meanwhile: the first version is the run's.
            version = _of_run(client, run) or made
            if str(version.version) != str(made.version):
                client.delete_model_version(made.name, made.version)
                adopted = True
            _drop_leftovers(client, run, version)
        elif version.tags.get("des.gate_digest") != verdict.written_sha256:
            version = _judge_again(client, run, verdict, version)
            adopted = False
        if version.tags.get("des.complete") != "true":
            version = _set_aliases(client, version)
        record = _record(client, run, version)
    return record.write(run.path("version.json")), adopted


def _judge_again(client: MlflowClient, run: Run, verdict: Verdict, version: ModelVersion) -> ModelVersion:
    """A version whose run was judged by other bounds: its tags say so, and then its aliases.

    A champion that would no longer be accepted stays until somebody moves the alias.
    """
    name, number = version.name, version.version
    client.set_model_version_tag(name, number, "des.complete", "false")
    tags = lineage.tags(run, verdict, storage.read_json(run.path("report.json")))
    tags |= {"des.previous_champion": verdict.champion, "des.gate_digest": verdict.written_sha256}
    for key, value in tags.items():
        if value != version.tags.get(key, ""):
            client.set_model_version_tag(name, number, key, value)
    if version.run_id:
        _log_pages(client, version.run_id, run)
    return client.get_model_version(name, number)


def recorded(run: Run) -> Registered | None:
    """``version.json`` of a run as the registry has it now; None where it is not registered, or not to the end."""
    if not availability.has_database(run.config.registry.tracking_uri, _wait_s(run.config)):
        return None
    with _client(run.config.registry.tracking_uri) as client:
        version = _of_run(client, run)
        if version is None or version.tags.get("des.complete") != "true":
            return None
        return _record(client, run, version)


def _record(client: MlflowClient, run: Run, version: ModelVersion) -> Registered:
    return Registered(
        name=run.config.run.name,
        version=str(version.version),
        aliases=_aliases(client, version),
        accepted=version.tags["des.verdict"] == "accept",
        run_key=run.key,
        gate=version.tags.get("des.gate_digest", ""),
        tracking_uri=hidden(run.config.registry.tracking_uri),
    )


def _make_database(uri: str) -> None:
    """Make our own SQLite database whole or not at all.

    MLflow makes its tables in many migrations; a process killed among them leaves a file on which no later one can
    go on. So they are made beside, and the file is renamed. One that was begun in place, by something else, is
    recognised by its missing experiments and set aside.
    """
    path = sqlite_path(uri)
    if os.path.exists(path) and _is_whole(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.exists(path) and os.path.getsize(path):
        os.replace(path, f"{path}.half-made")
    for stale in Path(path).parent.glob(f"{Path(path).name}.partial-*"):
        owner = stale.name.rpartition("-")[2].partition(".")[0]
        if not (owner.isdecimal() and os.path.exists(f"/proc/{owner}")):
            stale.unlink(missing_ok=True)
    partial = f"{path}.partial-{os.getpid()}"
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = Path(path).absolute().parent.as_uri()
    try:
        store = SqlAlchemyStore(sqlite_address(partial), folder)  # type: ignore[no-untyped-call]
        store.engine.dispose()
    except BaseException:
        for left in Path(path).parent.glob(f"{Path(partial).name}*"):
            left.unlink(missing_ok=True)
        raise
    # Of two processes that made one the first wins: a link is refused where there is a file.
    if os.path.exists(path) and not os.path.getsize(path):
        os.remove(path)
    with suppress(FileExistsError):
        os.link(partial, path)
    os.remove(partial)


def _is_whole(path: str) -> bool:
    """Whether MLflow has made all of its database: the first experiment comes after the tables."""
    if not os.path.getsize(path):
        return False
    with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=30.0)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            # Not MLflow's, which will say so itself.
            return bool(tables)
        return bool(database.execute("SELECT count(*) FROM experiments").fetchone()[0])


@contextmanager
def _client(uri: str) -> Iterator[MlflowClient]:
    """A client whose chatter is kept off the terminal and whose errors are ours."""
    availability.check(uri)
    # Ours to choose, not to override: no telemetry, no bars, and minutes of silent retries are too long.
    for key, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
    ):
        os.environ.setdefault(key, value)
    chatter = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(chatter), redirect_stderr(chatter):
        warnings.simplefilter("ignore")
        import mlflow
        from alembic.util import CommandError
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        try:
            if uri.startswith(SQLITE):
                _make_database(uri)
            yield mlflow.MlflowClient(uri, uri)
        except (MlflowException, SQLAlchemyError, CommandError, OSError, sqlite3.Error) as error:
            if _passes(uri, error):
                raise availability.unavailable(uri, error) from None
            full = of_system(error) if isinstance(error, OSError) else None
            if full is None and re.search(r"disk is full|disk I/O error|No space left", str(error)):
                full = StorageError(f"{hidden(uri)}: the disk is full or at fault; make room and start it again")
            if full is not None:
                raise full from None
            line = " ".join(str(error).replace(uri, hidden(uri)).split())[:300]
            raise RegistryError(f"MLflow at {hidden(uri)} refused: {line}") from None
        finally:
            _drop_misread_folder(uri)


def _drop_misread_folder(uri: str) -> None:
    """Delete the empty folder that MLflow makes where it takes the escapes in an SQLite address for its path."""
    misread = uri.removeprefix(SQLITE)
    if uri.startswith(SQLITE) and misread != sqlite_path(uri):
        with suppress(OSError):
            os.removedirs(os.path.dirname(misread))


def _passes(uri: str, error: Exception) -> bool:
    """Whether a registry that failed so may answer later.

    A server's 404 whose body is not MLflow's own comes from a proxy before it.
    """
    from mlflow.exceptions import MlflowException, RestException
    from sqlalchemy.exc import OperationalError

    if uri.startswith("sqlite:"):
        return "database is locked" in str(error)
    if isinstance(error, OperationalError):
        return True
    if not isinstance(error, MlflowException):
        return remote.passing(error)
    status = error.get_http_status_code()  # type: ignore[no-untyped-call]
    if not uri.startswith("http"):
        return error.error_code == "TEMPORARILY_UNAVAILABLE" or remote.passing(error)
    foreign = status == 404 and not isinstance(error, RestException)
    return foreign or status in remote.PASSING_STATUSES or remote.passing(error)


def _is_absent(error: Exception) -> bool:
    """Whether MLflow itself says that there is no such thing; it has a different error for each kind."""
    from mlflow.exceptions import MlflowException

    known = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
    return isinstance(error, MlflowException) and error.error_code in known


def _aliased(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version an alias points at; a missing name or alias is None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if _is_absent(error):
            return None
        raise


def _numbered(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if _is_absent(error):
            return None
        raise


def _of_run(client: MlflowClient, run: Run) -> ModelVersion | None:
    """The version that this run made before; the first one, should two have raced."""
    versions = client.search_model_versions(f"name='{run.config.run.name}' and tags.`des.run_key`='{run.key}'")
    return min(versions, key=lambda version: int(version.version)) if versions else None


def _aliases(client: MlflowClient, version: ModelVersion) -> tuple[str, ...]:
    aliases = client.get_registered_model(version.name).aliases
    return tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)))


def _inventory(client: MlflowClient, name: str) -> str:
    """What a person could have meant, on one line."""
    for model in client.search_registered_models(f"name='{name}'"):
        versions = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
        aliases = ", ".join(f"@{alias} = {version}" for alias, version in sorted(model.aliases.items())) or "none"
        return f"{name} has versions {', '.join(map(str, versions)) or 'none'} and aliases {aliases}"
    names = sorted(model.name for model in client.search_registered_models())
    return f"registered models: {', '.join(names)}" if names else "nothing is registered there"


def _download(client: MlflowClient, version: ModelVersion, into: str) -> StoredModel:
    """A local artifact store is read in place; from any other the model is copied."""
    import mlflow
    from mlflow.models import Model

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


def _refuse_moved_champion(client: MlflowClient, run: Run, verdict: Verdict) -> None:
    """A verdict holds against the champion it compared, and against no other."""
    name = run.config.run.name
    present = _aliased(client, name, "champion")
    version = "" if present is None else str(present.version)
    if version == verdict.champion:
        return
    moved = f"champion of {name} is now version {version or 'none'}"
    if run.day is not None:
        raise RegistryError(
            f"{moved}, the run of {run.day.as_of} was pinned to {run.day.champion or 'none'}; "
            f"run the day again, to go on from the present one: des run --as-of {run.day.as_of}"
        )
    raise RegistryError(
        f"{moved}, the gate compared {verdict.champion or 'none'}; run des evaluate and des register again"
    )


def _log(client: MlflowClient, run: Run, verdict: Verdict, artifact: str, example: pa.Table) -> tuple[str, str]:
    """The logged model's address and the id of its MLflow run."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    report = storage.read_json(run.path("report.json"))
    tags = lineage.tags(run, verdict, report)
    experiment = _experiment(client, run.config)
    with (
        _embedded(artifact) as data,
        mlflow.start_run(experiment_id=experiment, run_name=run.key[:12], tags=tags) as active,
    ):
        info = mlflow.pyfunc.log_model(
            name="model",
            loader_module=LOADER,
            data_path=data,
            # No input schema: pyfunc.py says why.
            signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype(np.float64), (-1,))])),
            input_example=example.to_pandas(),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in PACKAGES],
        )
        _log_numbers(client, active.info.run_id, run.config, report, verdict)
        _log_pages(client, active.info.run_id, run)
    return info.model_uri, active.info.run_id


def _drop_leftovers(client: MlflowClient, run: Run, version: ModelVersion) -> None:
    """Delete the MLflow runs that attempts to register this run have left without a version."""
    for left in client.search_runs([_experiment(client, run.config)], f"tags.`des.run_key` = '{run.key}'"):
        if left.info.run_id != version.run_id:
            client.delete_run(left.info.run_id)


@contextmanager
def _embedded(artifact: str) -> Iterator[str]:
    """A local folder of what goes into the registry: all of the export but the weights that stay in storage."""
    with scratch.folder("model") as place:
        folder = Path(place) / "model"
        folder.mkdir()
        elsewhere = storage.read_json(storage.join(artifact, "des.json"))["uri"]
        for name in storage.list_folder(artifact):
            if name not in elsewhere:
                filesystem, path = storage.resolve(storage.join(artifact, name))
                with filesystem.open_input_stream(path) as stream, open(folder / name, "wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 22)
        yield str(folder)


def _experiment(client: MlflowClient, config: Config) -> str:
    """Id of the run's experiment; without a server its artifacts are ours to place."""
    from mlflow.exceptions import MlflowException

    name = config.run.name
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    served = config.registry.tracking_uri.startswith("http")
    root = config.run.dir if "://" in config.storage.root else config.storage.root
    try:
        place = None if served else Path(root, "artifacts").absolute().as_uri()
        return client.create_experiment(name, place)
    except MlflowException:
        # Another run of the same name may have made it in the meantime.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def _ledger_numbers(name: str, line: dict[str, Any]) -> dict[str, float]:
    """A line of the ledger, its bytes and milliseconds per step, in all and by direction."""
    numbers: dict[str, float] = {}
    for way in ("", "forward", "backward"):
        part = line.get(way) if way else line
        if part is not None:
            place = f"{name}/{way}" if way else name
            numbers |= {
                f"bytes/{place}/{kind}": float(part[f"{kind}_bytes_per_step"]) for kind in ("predicted", "counted")
            }
            numbers[f"ms/{place}"] = float(part["ms_per_step"])
    return numbers


def _log_numbers(client: MlflowClient, run_id: str, config: Config, report: dict[str, Any], verdict: Verdict) -> None:
    """Metrics and the gate's intervals, curves, bytes of each exchange, and the config as parameters to compare."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    single = lineage.numbers(report, "test") | lineage.numbers(report.get("valid") or {}, "valid")
    for name, value in verdict.metrics.items():
        single[f"gate/{name}"] = value
    for name, (low, high) in verdict.intervals.items():
        single |= {f"gate/{name}_low": low, f"gate/{name}_high": high}
    for name in ("steps", "workers", "samples_per_s", "peak_rss_mb"):
        if report.get(name) is not None:
            single[name] = float(report[name])
    for name, line in (report.get("exchange") or {}).items():
        single |= _ledger_numbers(re.sub(r"[^A-Za-z0-9_. -]", "_", name), line)
    for size in (report.get("table") or [])[-1:]:
        single |= {f"table/{key}": float(value) for key, value in size.items() if key != "step"}
    metrics = [Metric(name, value, now, 0) for name, value in single.items()]
    history = report.get("history") or []
    stride = max(1, -(-len(history) // HISTORY_POINTS))
    metrics += [Metric("loss", float(point["loss"]), now, int(point["step"])) for point in history[::stride]]
    for point in report.get("epochs") or []:
        if point.get("auc") is not None:
            metrics.append(Metric("epoch_valid_auc", float(point["auc"]), now, int(point["step"])))
    params = [
        Param(f"{section}.{key}", str(value)[:500])
        for section in ("model", "train", "source", "split")
        for key, value in config.recorded.model_dump(mode="json")[section].items()
    ]
    client.log_batch(run_id, metrics=metrics[:1000], params=params[:100])


def _log_pages(client: MlflowClient, run_id: str, run: Run) -> None:
    with scratch.folder("pages") as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps(run.config.recorded.model_dump(mode="json"), indent=1), "utf-8"
        )
        (Path(folder) / "environment.txt").write_text(lineage.environment(), "utf-8")
        for page in PAGES:
            if storage.exists(run.path(page)):
                (Path(folder) / page).write_bytes(storage.read_bytes(run.path(page)))
        client.log_artifacts(run_id, folder)


def _create_version(
    client: MlflowClient, run: Run, verdict: Verdict, model_uri: str, mlflow_run: str, digest: str
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    name = run.config.run.name
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    report = storage.read_json(run.path("report.json"))
    tags = lineage.tags(run, verdict, report) | {"des.previous_champion": verdict.champion}
    # The model's id as a tag: a version found by its alias does not name it.
    tags["des.model_id"] = model_uri.removeprefix("models:/")
    # Des.json names the digests of the weights: with its own here all of a model is certified by the registry.
    tags["des.model_digest"] = digest
    tags["des.gate_digest"] = verdict.written_sha256
    return client.create_model_version(
        name, model_uri, run_id=mlflow_run, tags=tags, model_id=model_uri.removeprefix("models:/")
    )


def _set_aliases(client: MlflowClient, version: ModelVersion) -> ModelVersion:
    """The version with its aliases set, then marked so: a crash in between is mended by the next run.

    MLflow cannot move an alias only if it has not moved: the champion is looked at once more, last of all.
    """
    name, number = version.name, version.version
    latest = _aliased(client, name, "candidate")
    if latest is None or int(latest.version) < int(number):
        client.set_registered_model_alias(name, "candidate", number)
    if version.tags["des.verdict"] == "accept":
        present = _aliased(client, name, "champion")
        champion = "" if present is None else str(present.version)
        if champion in (version.tags["des.previous_champion"], str(number)):
            client.set_registered_model_alias(name, "champion", number)
        else:
            client.set_model_version_tag(name, number, "des.verdict", "superseded")
    client.set_model_version_tag(name, number, "des.complete", "true")
    return client.get_model_version(name, number)
