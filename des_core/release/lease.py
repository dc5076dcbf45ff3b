"""One run of a name at a time: a lease in storage.root, renewed while a step runs.

    ROOT/lease-NAME.json    holder, host and process, expiry

A holder that died where we can see it, a process of this host that is gone, holds nothing; any other lease ends when it
expires. Object stores have no compare-and-swap through pyarrow.fs, so whoever writes reads again after a moment.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from des_core import storage
from des_core.config import Config
from des_core.contracts import Record
from des_core.errors import UserError

LASTS_S = 1800.0
"""A lease ends this long after it was renewed last: time for the next step's pod to start."""

RENEW_S = 60.0
SETTLE_S = 0.2


class Lease(Record):
    """``lease-NAME.json``."""

    holder: str
    host: str
    pid: int
    """Process whose end ends the lease; 0: only its expiry does."""
    expires: float
    """Unix seconds."""


def uri_of(config: Config) -> str:
    """Address of the lease of a run's name."""
    return storage.join(config.storage.root, f"lease-{config.run.name}.json")


def take(config: Config, holder: str, pid: int = 0) -> None:
    """Take the lease, or renew it.

    Raises:
        UserError: another run of this name holds it, or storage.root cannot be written.
    """
    try:
        _take(config, holder, pid)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"storage.root = {config.storage.root} cannot be written ({why}); choose another place or change its rights"
        ) from None


def _take(config: Config, holder: str, pid: int) -> None:
    uri = uri_of(config)
    there = _read(uri)
    if there is None or there.holder != holder:
        _refuse_held(config, there)
    mine = Lease(holder=holder, host=socket.gethostname(), pid=pid, expires=round(time.time() + LASTS_S, 3))
    mine.write(uri)
    if there is None or there.holder != holder:
        time.sleep(SETTLE_S)
        now = _read(uri)
        if now is None or now.holder != holder:
            _refuse_held(config, now)


def release(config: Config, holder: str) -> None:
    """Give the lease back, if it is ours."""
    there = _read(uri_of(config))
    if there is not None and there.holder == holder:
        storage.delete(uri_of(config))


@contextmanager
def held(config: Config, holder: str, pid: int = 0) -> Iterator[None]:
    """The lease, renewed in the background while the block runs; it is kept afterwards, for the next step."""
    take(config, holder, pid)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_S):
            take(config, holder, pid)

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _read(uri: str) -> Lease | None:
    return Lease.model_validate(storage.read_json(uri)) if storage.exists(uri) else None


def _refuse_held(config: Config, lease: Lease | None) -> None:
    if lease is None or lease.expires < time.time() or _dead(lease):
        return
    until = datetime.fromtimestamp(lease.expires, UTC).strftime("%H:%M:%S UTC")
    raise UserError(
        f"another run of {config.run.name} is at work ({lease.holder} on {lease.host}, at least until {until}); "
        f"wait for it, or, if it is gone, delete {uri_of(config)}"
    )


def _dead(lease: Lease) -> bool:
    """Whether the holder was a process of this host that is gone."""
    if not lease.pid or lease.host != socket.gethostname():
        return False
    try:
        os.kill(lease.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
