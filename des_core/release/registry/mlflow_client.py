"""A client of MLflow: the database that it needs, its failures as errors of DES, versions by alias, number and run."""

from __future__ import annotations

import io
import logging
import os
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from des_core import remote
from des_core.addresses import SQLITE, sqlite_address, sqlite_path
from des_core.config import Config
from des_core.errors import DesError, RegistryError, StorageError, of_system
from des_core.processes import is_alive
from des_core.release.registry import availability
from des_core.run import Run
from des_core.secrets import hidden

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


def wait_s(config: Config) -> float:
    """Seconds that a registry is waited for."""
    return config.registry.wait_s or remote.patience_s()


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
        if not (owner.isdecimal() and is_alive(int(owner))):
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
    """Whether MLflow has created its whole database; it adds the first experiment after the tables."""
    if not os.path.getsize(path):
        return False
    with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=30.0)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            # Not MLflow's, which will say so itself.
            return bool(tables)
        return bool(database.execute("SELECT count(*) FROM experiments").fetchone()[0])


@contextmanager
def connect(uri: str) -> Iterator[MlflowClient]:
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
            full = _of_disk(uri, error)
            if full is not None:
                raise full from None
            line = " ".join(str(error).replace(uri, hidden(uri)).split())[:300]
            raise RegistryError(f"MLflow at {hidden(uri)} refused: {line}") from None
        finally:
            _drop_misread_folder(uri)


def _of_disk(uri: str, error: Exception) -> DesError | None:
    """The error of one line for a full or faulty disk under MLflow, whatever MLflow wrapped it in; None for others."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and (refused := of_system(cause)) is not None:
            return refused
        if _sqlite_code(cause) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return StorageError(f"{hidden(uri)}: the disk is full or at fault; make room and start it again")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it was raised from or while handling, SQLAlchemy's original ones too; each once."""
    left, seen = [error], set[int]()
    while left:
        cause = left.pop()
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            more = (cause.__cause__, cause.__context__, getattr(cause, "orig", None))
            left += [each for each in more if isinstance(each, BaseException)]


def _sqlite_code(error: BaseException) -> int:
    """SQLite's primary result code, 0 for other errors; its higher bits say more than is asked here."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


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
        return any(_sqlite_code(cause) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) for cause in _causes(error))
    if isinstance(error, OperationalError):
        return True
    if not isinstance(error, MlflowException):
        return remote.passing(error)
    status = error.get_http_status_code()  # type: ignore[no-untyped-call]
    if not uri.startswith("http"):
        return error.error_code == "TEMPORARILY_UNAVAILABLE" or remote.passing(error)
    foreign = status == 404 and not isinstance(error, RestException)
    return foreign or status in remote.PASSING_STATUSES or remote.passing(error)


def is_absent(error: Exception) -> bool:
    """Whether MLflow answers that an object does not exist; it has a different error code for each kind."""
    from mlflow.exceptions import MlflowException

    known = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
    return isinstance(error, MlflowException) and error.error_code in known


def by_alias(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version an alias points at; a missing name or alias is None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise


def by_number(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise


def of_run(client: MlflowClient, run: Run) -> ModelVersion | None:
    """The version that this run made before; the first one, should two have raced."""
    versions = client.search_model_versions(f"name='{run.config.run.name}' and tags.`des.run_key`='{run.key}'")
    return min(versions, key=lambda version: int(version.version)) if versions else None


def aliases_of(client: MlflowClient, version: ModelVersion) -> tuple[str, ...]:
    aliases = client.get_registered_model(version.name).aliases
    return tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)))


def inventory(client: MlflowClient, name: str) -> str:
    """What a person could have meant, on one line."""
    for model in client.search_registered_models(f"name='{name}'"):
        versions = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
        aliases = ", ".join(f"@{alias} = {version}" for alias, version in sorted(model.aliases.items())) or "none"
        return f"{name} has versions {', '.join(map(str, versions)) or 'none'} and aliases {aliases}"
    names = sorted(model.name for model in client.search_registered_models())
    return f"registered models: {', '.join(names)}" if names else "nothing is registered there"
