"""Where the registry is, and whether it answers: asked before anything is trained, without loading MLflow.

A folder or ``file://`` address is refused: MLflow's file store has no model registry. Our own SQLite file needs to be
writable, a server or a database server needs to answer, and Postgres to let us in.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from des_core import remote
from des_core.addresses import sqlite_address, sqlite_path
from des_core.errors import RegistryError, UnavailableError
from des_core.secrets import hidden

CONNECT_S = 5.0
API_S = 15.0
"""For an answer of MLflow's API, whose first one is slow."""


def check(tracking_uri: str, wait_s: float = 0.0) -> None:
    """Make sure that there is a registry to talk to, without loading MLflow.

    Args:
        wait_s: how long a server that does not answer yet is waited for, in seconds.

    Raises:
        RegistryError: of a form that MLflow does not take, or it refuses.
        UnavailableError: nobody answers.
    """
    scheme = urllib.parse.urlsplit(tracking_uri).scheme
    if scheme == "sqlite":
        _check_sqlite(tracking_uri)
    elif scheme in ("", "file"):
        folder = tracking_uri.removeprefix("file://") or "."
        raise RegistryError(
            f"registry.tracking_uri = {tracking_uri!r} is a plain folder, which cannot hold a model registry; "
            f"write it as {sqlite_address(os.path.abspath(folder))}/mlflow.db"
        )
    elif scheme in ("http", "https") or scheme.startswith(("postgresql", "mysql")):
        shown = f"MLflow at {hidden(tracking_uri)}"
        ask = _ask_server if scheme in ("http", "https") else _ask_database
        remote.wait_for(shown, lambda: ask(tracking_uri), wait_s)


def _check_sqlite(uri: str) -> None:
    path = Path(sqlite_path(uri))
    try:
        if path.exists():
            with open(path, "r+b") as file:
                if file.read(15) not in (b"SQLite format 3", b""):
                    raise RegistryError(f"registry.tracking_uri: {path} is not an SQLite database; choose another file")
            return
        nearest = next(folder for folder in path.absolute().parents if folder.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise PermissionError(13, f"{nearest} is not a folder to write in")
    except OSError as error:
        reason = error.strerror or error
        raise RegistryError(f"registry.tracking_uri: {path} cannot be written ({reason}); choose another") from None


def has_database(uri: str, wait_s: float = 0.0) -> bool:
    """False for our own SQLite file before its first use: nothing is registered, and MLflow need not be loaded.

    Raises:
        DesError: as ``check``.
    """
    check(uri, wait_s)
    return not uri.startswith("sqlite:///") or os.path.exists(sqlite_path(uri))


def unavailable(uri: str, reason: object) -> UnavailableError:
    """The error of a registry that does not answer."""
    said = " ".join(str(reason).replace(uri, hidden(uri)).split())[:300]
    return UnavailableError(
        f"MLflow at {hidden(uri)} cannot be reached ({said}); start it, or set registry.tracking_uri"
    )


def _ask_server(uri: str) -> None:
    """One question to MLflow's API. A refusal is an answer, which MLflow itself explains later.

    Raises:
        UnavailableError: no answer, one of a server in trouble, or a 404 that is not MLflow's own: a proxy's, before
            a service that has no endpoint yet.
    """
    parts = urllib.parse.urlsplit(uri)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    path = place.path.rstrip("/") + "/api/2.0/mlflow/experiments/search"
    try:
        request = urllib.request.Request(urllib.parse.urlunsplit(place._replace(path=path, query="max_results=1")))
        if parts.username:
            known = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            request.add_header("Authorization", f"Basic {base64.b64encode(known.encode()).decode()}")
        urllib.request.urlopen(request, timeout=max(CONNECT_S, API_S)).close()
    except urllib.error.HTTPError as error:
        if error.code in remote.PASSING_STATUSES or (error.code == 404 and not _is_mlflows(error)):
            raise unavailable(uri, f"HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise unavailable(uri, getattr(error, "reason", error)) from None


def _is_mlflows(error: urllib.error.HTTPError) -> bool:
    """Whether an error's body is one that MLflow writes."""
    try:
        body = json.loads(error.read(1 << 16))
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return isinstance(body, dict) and "error_code" in body


def _ask_database(uri: str) -> None:
    """One connection to a database server.

    Raises:
        RegistryError: Postgres does not let us in.
        UnavailableError: nobody answers.
    """
    parts = urllib.parse.urlsplit(uri)
    if not parts.hostname:
        # A socket file, which the driver finds by its own rules.
        return
    try:
        port = parts.port or (3306 if parts.scheme.startswith("mysql") else 5432)
        socket.create_connection((parts.hostname, port), CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise unavailable(uri, error) from None
    _log_in(uri)


def _log_in(uri: str) -> None:
    """Refuse what Postgres refuses: MLflow would ask again for two minutes, in silence."""
    scheme, _, place = uri.partition("://")
    if scheme not in ("postgresql", "postgresql+psycopg"):
        return
    import psycopg

    try:
        psycopg.connect(f"postgresql://{place}", connect_timeout=round(CONNECT_S) + 1).close()
    except psycopg.Error as error:
        reason = " ".join(str(error).replace(place, "").split())
        if remote.passing(error):
            raise unavailable(uri, reason) from None
        raise RegistryError(
            f"MLflow's database at {hidden(uri)} refused: {reason}; correct registry.tracking_uri"
        ) from None
