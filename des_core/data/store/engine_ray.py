"""Tasks on the Ray cluster that RAY_ADDRESS names, or that runs on this machine; only small records go through Ray.

Every machine of the cluster must reach the storage, and run this version: both are looked at first. An item whose
process or machine dies comes back as lost.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from des_core import __version__, storage
from des_core.data.store.tasks import Outcome, Run, attempt
from des_core.errors import ConfigError, StorageError, UnavailableError, UserError

CONNECT_S = 10.0


@contextmanager
def tasks(root: str) -> Iterator[Run]:
    """The engine.

    Args:
        root: ``storage.root``.

    Raises:
        ConfigError: Ray is not installed.
        UnavailableError: no Ray answers.
        UserError: a machine of the cluster does not reach ``root``, or runs another version.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "ingest.engine = 'ray': Ray is not installed; pip install 'des-core[ray]', or set it to 'local'"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        ended = signal.getsignal(signal.SIGTERM)
        _connect(ray)
        if threading.current_thread() is threading.main_thread():
            # Ray takes the signal for itself, and keeps it when it is shut down.
            signal.signal(signal.SIGTERM, ended)

    def run(call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Outcome]]:
        task = ray.remote(_attempt).options(num_cpus=1, max_retries=0)
        waiting = {task.remote(call, item): place for place, item in enumerate(items)}
        try:
            while waiting:
                (ready,), _ = ray.wait(list(waiting), num_returns=1)
                place = waiting.pop(ready)
                yield place, _outcome(ray, ready)
        finally:
            for left in waiting:
                ray.cancel(left, force=True)

    try:
        _check_machines(ray, root)
        yield run
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition(":")
    try:
        if host and "://" not in address:
            # Ray itself would wait for minutes, and say so on many lines.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        ray.init(address=address, configure_logging=True, logging_level=logging.ERROR, log_to_driver=True)
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UnavailableError(
            f"no Ray cluster answers at {address} ({why}); start one, or name it in RAY_ADDRESS"
        ) from None


def _attempt(call: Callable[[Any], Any], item: Any) -> Outcome:
    pa.set_cpu_count(1)
    return attempt(call, item)


def _outcome(ray: Any, ready: Any) -> Outcome:
    try:
        outcome: Outcome = ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        return Outcome(code="failed", message=" ".join(str(error.cause or error).split())[:500])
    except ray.exceptions.RayError as error:
        return Outcome(lost=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return outcome


def _check_machines(ray: Any, root: str) -> None:
    """Have each node read a file that was just written under ``root``."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    uri, token = storage.join(root, f".probe-{uuid.uuid4().hex}"), uuid.uuid4().hex
    storage.write_bytes(uri, token.encode())
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)
            probe = ray.remote(_probe).options(num_cpus=0, scheduling_strategy=there)
            try:
                seen, version = ray.get(probe.remote(uri))
            except ray.exceptions.RayError as error:
                why = " ".join(str(getattr(error, "cause", None) or error).split())[:200]
                raise UnavailableError(
                    f"Ray's machine {node['NodeManagerAddress']} runs no task of ours ({why})"
                ) from None
            if seen != token:
                raise UserError(
                    f"storage.root = {root!r} is not the same place on Ray's machine {node['NodeManagerAddress']}; "
                    "give one that all machines share, such as s3://BUCKET/FOLDER"
                )
            if version != __version__:
                raise UserError(
                    f"Ray's machine {node['NodeManagerAddress']} has version {version} of des-core, and this one "
                    f"{__version__}; use one image for all"
                )
    finally:
        storage.delete(uri)


def _probe(uri: str) -> tuple[str, str]:
    """What a machine reads at an address, and its version of this package."""
    try:
        return storage.read_bytes(uri).decode(), __version__
    except StorageError:
        return "", __version__
