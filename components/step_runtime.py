"""Runs a step of the pipeline: opens its run, records the outcome, and turns errors into one line and an exit code.

Apart from ``_step``, because kfp has no decorators where a step runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from components.stages import Done
from des_core import log, storage
from des_core.config import Config, parse_config
from des_core.contracts import Reference
from des_core.errors import DamagedError, DesError, of_system
from des_core.recurring import lease
from des_core.run import Run, reopen
from des_core.secrets import hidden, remember

SECRETS = "DES_SECRETS"
"""Variable in which a local run hands its config's secrets to its steps: KFP prints the config itself, and the list of
processes shows it."""


def on_config(name: str, stage: Callable[[Config], Done], config: str, holder: str) -> Done:
    """Do a stage that precedes the pinning of a run."""
    return _run_noted(name, config, holder, stage)


def on_run(name: str, stage: Callable[[Run], Done], config: str, holder: str, inputs: str, *others: str) -> Done:
    """Do a stage of the run that was pinned as ``inputs``, after checking the digests of what it builds on."""

    def checked(parsed: Config) -> Done:
        for reference in others:
            Reference.parse(reference).read()
        return stage(reopen(parsed, Reference.parse(inputs)))

    return _run_noted(name, config, holder, checked)


def _config(config: str) -> Config:
    """The pipeline's config, with the secrets that it must not hold itself."""
    parsed = parse_config(config, "the config of this pipeline")
    whole = parsed.with_secrets(json.loads(os.environ.get(SECRETS, "{}")))
    remember(whole.notify.webhook)
    return whole


def holder_of(run_id: str) -> tuple[str, int]:
    """Who holds the lease, and the process whose end ends it: a local run's own, or KFP's run."""
    local = os.environ.get("DES_LOCAL_RUN", "")
    return (local, int(local.partition(":")[0])) if local else (run_id, 0)


def copy_page(page: str, path: str) -> None:
    """Put a run's page where KFP shows it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(storage.read_bytes(page))


def status_uri(config: Config, holder: str) -> str:
    """Where a run of the pipeline notes what its steps returned, and how it failed."""
    return storage.join(config.storage.root, "status", f"{config.run.name}.{holder.replace(':', '-')}.json")


def sweep_status(config: Config, holder: str) -> None:
    """Delete the status files of runs of this name that were killed; the holder of the lease is the only active one."""
    folder, _, own = status_uri(config, holder).rpartition("/")
    for name in storage.list_folder(folder):
        if name.startswith(f"{config.run.name}.") and name != own:
            storage.delete(storage.join(folder, name))


def end(config: str, run_id: str, state: str, error: str) -> None:
    """Tell how the run ended, whatever happened to it, and give the lease back."""
    from des_core.recurring import notice

    parsed = _config(config)
    holder, _ = holder_of(run_id)
    try:
        status = _status(parsed, holder)
        notice.post(parsed, notice.outcome(parsed, status, "" if state == "SUCCEEDED" else error or state))
    finally:
        lease.release(parsed, holder)
    if holder == run_id:
        storage.delete(status_uri(parsed, holder))


def _status(config: Config, holder: str) -> dict[str, Any]:
    uri = status_uri(config, holder)
    nothing: dict[str, Any] = {"done": {}}
    try:
        known = storage.read_json(uri) if storage.exists(uri) else nothing
    except DamagedError:
        return nothing
    return nothing | known if isinstance(known, dict) else nothing


def _note(config: Config, holder: str, name: str, done: Done) -> None:
    status = _status(config, holder)
    status["done"][name] = done.reference
    status["as_of"] = done.numbers.get("as_of", status.get("as_of", ""))
    storage.write_json(status_uri(config, holder), status)


def _fail(config: Config | None, holder: str, name: str, error: DesError) -> NoReturn:
    message = hidden(str(error))
    if config is not None:
        with contextlib.suppress(OSError, DesError):
            status = _status(config, holder) | {"error": {"step": name, "code": error.code, "message": message}}
            storage.write_json(status_uri(config, holder), status)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _run_noted(name: str, config: str, run_id: str, stage: Callable[[Config], Done]) -> Done:
    """Do a stage under the lease, record its outcome, and exit with the error's code if it fails."""
    start = time.monotonic()
    log.emit("start", name=name)
    parsed: Config | None = None
    holder, pid = holder_of(run_id)
    try:
        parsed = _config(config)
        with lease.held(parsed, holder, pid):
            if name == "resolve":
                sweep_status(parsed, holder)
            done = stage(parsed)
            _note(parsed, holder, name, done)
    except Exception as error:
        known = of_system(error) if isinstance(error, OSError) else error
        if not isinstance(known, DesError):
            print(hidden(traceback.format_exc()), file=sys.stderr, flush=True)
            reason = " ".join(str(error).split())[:300]
            known = DesError(f"{name}: unexpected {type(error).__name__}: {reason}")
        _fail(parsed, holder, name, known)
    seconds = round(time.monotonic() - start, 1)
    log.emit("done", name=name, seconds=seconds, unchanged=done.unchanged, what=done.what)
    return done
