"""Where the registry is, and whether it answers: asked before anything is trained, without loading MLflow.

A folder or ``file://`` address is refused: MLflow's file store has no model registry. Our own SQLite file needs to be
writable, a server or a database server needs to answer, and Postgres to let us in.
"""

from __future__ import annotations

import http.client
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from des_core.config import without_passwords
from des_core.errors import RegistryError

CONNECT_S = 5.0
TRIES = 2


def check(tracking_uri: str) -> None:
    """Make sure that there is a registry to talk to, without loading MLflow.

    Raises:
        RegistryError: of a form that MLflow does not take, or nobody answers within about 10 s.
    """
    scheme = urllib.parse.urlsplit(tracking_uri).scheme
    if scheme == "sqlite":
        _check_sqlite(tracking_uri)
    elif scheme in ("", "file"):
        folder = tracking_uri.removeprefix("file://") or "."
        raise RegistryError(
            f"registry.tracking_uri = {tracking_uri!r} is a plain folder, which cannot hold a model registry; "
            f"write it as sqlite:///{os.path.abspath(folder)}/mlflow.db"
        )
    elif scheme in ("http", "https") or scheme.startswith(("postgresql", "mysql")):
        _check_answer(tracking_uri, served=scheme in ("http", "https"))


def _check_sqlite(uri: str) -> None:
    path = Path(uri.removeprefix("sqlite:///"))
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


def has_database(uri: str) -> bool:
    """False for our own SQLite file before its first use: nothing is registered, and MLflow need not be loaded."""
    check(uri)
    return not uri.startswith("sqlite:///") or os.path.exists(uri.removeprefix("sqlite:///"))


def _check_answer(uri: str, served: bool) -> None:
    """Whatever answers is an answer: MLflow itself explains a refusal."""
    parts = urllib.parse.urlsplit(uri)
    if not served and not parts.hostname:
        # A socket file, which the driver finds by its own rules.
        return
    reason: object = ""
    for attempt in range(TRIES):
        try:
            if served:
                urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=CONNECT_S).close()
            else:
                port = parts.port or (3306 if parts.scheme.startswith("mysql") else 5432)
                socket.create_connection((parts.hostname or "localhost", port), CONNECT_S).close()
                _log_in(uri)
            return
        except urllib.error.HTTPError:
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            time.sleep(0.5 if attempt + 1 < TRIES else 0)
    raise RegistryError(
        f"MLflow at {without_passwords(uri)} cannot be reached ({reason}); start it, or set registry.tracking_uri"
    )


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
        raise RegistryError(
            f"MLflow's database at {without_passwords(uri)} refused: {reason}; correct registry.tracking_uri"
        ) from None
