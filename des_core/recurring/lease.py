"""One run of a name at a time: a lease in storage.root, renewed while a run is at work.

    ROOT/lease-NAME.json    holder, host and process, expiry

A run of one process renews it all the time, so its lease is short; between two steps of a run on Kubeflow nobody does.
A holder that died where we can see it, a process of this host that is gone, holds nothing. One of another host may have
died too, as when a Job's pod is replaced: a lease that is short is waited for, and taken if nobody renewed it. Object
stores have no compare-and-swap through pyarrow.fs, so whoever writes reads again after a moment.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NoReturn

from des_core import log, storage
from des_core.config import Config
from des_core.contracts import Record
from des_core.errors import BusyError, DamagedError, DesError, UserError
from des_core.processes import is_alive

PROCESS_S, PIPELINE_S = 90.0, 1800.0
"""A lease ends this long after it was renewed last: one of a process, and of a pipeline whose next pod must start."""

LONGEST_S = 2 * PIPELINE_S
"""From now on: no lease is longer, even on a clock that differs."""
RENEW_S = 20.0
SETTLE_S = 0.2
LOOK_S = 1.0


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
        BusyError: another run of this name holds it.
        UserError: storage.root cannot be written.
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
    ours = there is not None and there.holder == holder
    if not ours:
        _wait_until_free(config, there)
    expires = round(time.time() + (PROCESS_S if pid else PIPELINE_S), 3)
    Lease(holder=holder, host=socket.gethostname(), pid=pid, expires=expires).write(uri)
    if not ours:
        time.sleep(SETTLE_S)
        now = _read(uri)
        if now is None or now.holder != holder:
            _refuse(config, now)


def _wait_until_free(config: Config, there: Lease | None) -> None:
    """Wait until nobody holds the lease, if it is a short one.

    Raises:
        BusyError: it is long, or was renewed.
    """
    told = False
    while there is not None and there.expires > time.time() and not _dead(there):
        alive = there.pid and there.host == socket.gethostname()
        if alive or there.expires > time.time() + PROCESS_S:
            _refuse(config, there)
        if not told:
            log.emit("wait", lease=uri_of(config), holder=there.holder, host=there.host)
        told = True
        time.sleep(LOOK_S)
        now = _read(uri_of(config))
        if now is not None and now.expires != there.expires:
            _refuse(config, now)
        there = now


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
            try:
                take(config, holder, pid)
            except DesError as error:
                # The work goes on: a registry that moved meanwhile refuses its end.
                log.emit("lease", why=str(error))

    thread = threading.Thread(target=renew, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _read(uri: str) -> Lease | None:
    """The present lease; a damaged one counts as none, with a log line."""
    if not storage.exists(uri):
        return None
    try:
        lease = Lease.read(uri)
    except DamagedError:
        log.emit("lease", why=f"{uri} is no lease (damaged?); it is replaced")
        return None
    if lease.expires > time.time() + LONGEST_S:
        log.emit("lease", why=f"{uri} ends later than any lease may (another clock?); it is replaced")
        return None
    return lease


def _refuse(config: Config, lease: Lease | None) -> NoReturn:
    who = f"{lease.holder} on {lease.host}" if lease else "somebody"
    until = datetime.fromtimestamp(lease.expires, UTC).strftime("%H:%M:%S UTC") if lease else "now"
    raise BusyError(
        f"another run of {config.run.name} is at work ({who}, at least until {until}); "
        f"wait for it, or, if it is gone, delete {uri_of(config)}"
    )


def _dead(lease: Lease) -> bool:
    """Whether the holder was a process of this host that has ended."""
    return bool(lease.pid) and lease.host == socket.gethostname() and not is_alive(lease.pid)
