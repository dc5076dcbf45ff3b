"""The DAG on this machine: kfp.local runs each step as a process, and a person sees one line per step.

KFP prints everything to standard output, ours and its own. All of it goes to ``run.log`` in the run's folder; of the
event lines in it, ``done`` becomes a step's line and the workers' become the progress bar.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from components.launch.environment import import_path
from components.launch.process_tie import told_to_end
from components.launch.progress import Progress
from components.step_runtime import SECRETS, status_uri, sweep_status
from des_core import log, scratch, storage
from des_core.config import Config
from des_core.errors import DesError, KilledError, UserError, WorkerError, error_of
from des_core.recurring import lease
from des_core.release.serve import cache
from des_core.secrets import hidden

EVENTS = ("step", "valid", "evaluate", "checkpoint", "resume", "warm_start", "job", "joined", "waiting", "deleted")
"""Workers' events, and those of the job that they are on a cluster."""

QUIET_S = 10.0
"""Without a terminal: seconds between two lines of progress."""


def run(config: Config, as_of: str, tell: Callable[[dict[str, str]], None]) -> dict[str, dict[str, str]]:
    """Run all steps; the ``done`` event of each.

    Args:
        tell: called with the ``start`` and ``done`` events of every step as they happen.

    Raises:
        DesError: that of the failed step; BusyError where another run of this name is active.
    """
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Who holds the lease: our end ends it.
    holder = f"{os.getpid()}:{uuid.uuid4().hex[:8]}"
    status = status_uri(config, holder)
    log_path = folder / "run.log"
    try:
        # The log of another run, which may be at work, is not touched before the lease is ours.
        with (
            told_to_end(),
            lease.held(config, holder, os.getpid()),
            open(log_path, "w", encoding="utf-8") as file,
            Progress(QUIET_S) as progress,
        ):
            router = Router(file, progress, tell)
            sweep_status(config, holder)
            with redirect_stdout(router), _interpreter(holder, config):
                finished = _run_dag(config, as_of)
            if not finished:
                raise _failure(status, router, log_path)
    finally:
        lease.release(config, holder)
        storage.delete(status)
    return router.done


class Router(io.TextIOBase):
    """Standard output while KFP runs: a log, from which event lines are picked."""

    def __init__(self, file: TextIO, progress: Progress, tell: Callable[[dict[str, str]], None]) -> None:
        self._file, self._progress, self._tell = file, progress, tell
        self._line = ""
        self._since = time.monotonic()
        self.started = ""
        self.done: dict[str, dict[str, str]] = {}

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self._file.write(hidden(text))
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._heed(log.parse_event(line.strip()))
        return len(text)

    def flush(self) -> None:
        # Loggers that KFP gave this stream outlive the run.
        if not self._file.closed:
            self._file.flush()

    def _heed(self, event: dict[str, str]) -> None:
        kind = event.get("event")
        if kind in EVENTS:
            self._progress.show(event)
        elif kind in ("start", "done"):
            self._progress.close()
            self.started = event["name"]
            if kind == "done":
                # A step's own clock does not see its process begin.
                now = time.monotonic()
                event |= {"seconds": f"{now - self._since:.1f}"}
                self._since = now
                self.done[event["name"]] = event
            self._tell(event)


def _run_dag(config: Config, as_of: str) -> bool:
    """Whether all steps finished."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from kfp import local

        from pipelines.training import training

        root = os.path.join(config.run.dir, "pipeline")
        storage.delete(root)
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root, raise_on_error=True)
        try:
            # What it holds is printed, and seen in the list of processes: secrets go another way.
            training(config=config.recorded.model_dump_json(), as_of=as_of)
        except RuntimeError:
            # KFP's word for a step that failed; error.json has ours.
            return False
    return True


@contextmanager
def _interpreter(holder: str, config: Config) -> Iterator[None]:
    """A scratch folder that is first on PATH, with our own interpreter as ``python3``, tied to this process.

    KFP writes the interpreter's path over every ``python3`` of a step's command, in its arguments too: a config with
    such a path would change. So it is told that the interpreter's name is ``python3``.
    """
    with scratch.folder("run") as place:
        program = Path(place) / "bin" / "python3"
        program.parent.mkdir()
        # Steps are started as "python3 -m MODULE ...".
        program.write_text(
            f"#!/bin/sh\nshift\nexec {shlex.quote(sys.executable)} "
            '-m components.launch.process_tie --watch-output "$@"\n'
        )
        program.chmod(0o755)
        changes = {
            "PATH": f"{program.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": import_path(),
            "TMPDIR": place,
            "DES_CACHE": cache.folder(),
            "DES_LOCAL_RUN": holder,
            SECRETS: json.dumps(config.secrets),
        }
        saved, executable, temporary = dict(os.environ), sys.executable, tempfile.tempdir
        os.environ.update(changes)
        sys.executable, tempfile.tempdir = "python3", place
        try:
            yield
        finally:
            sys.executable, tempfile.tempdir = executable, temporary
            os.environ.clear()
            os.environ.update(saved)


def _failure(status: str, router: Router, log_path: Path) -> DesError:
    error: dict[str, Any] | None = storage.read_json(status).get("error") if storage.exists(status) else None
    if error:
        failure = error_of(error["code"], error["message"])
        # The message of a worker's failure names the workers' own log.
        whole = isinstance(failure, (UserError, WorkerError))
        return failure if whole else type(failure)(f"{failure}; see {log_path}")
    return KilledError(f"step {router.started or 'resolve'} ended without a message (killed?); see {log_path}")
