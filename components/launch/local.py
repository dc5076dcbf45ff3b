"""N workers as local processes under torchrun.

    launcher -> torchrun -> workers, each tied to the life of its parent (process_tie.py)

Whatever the workers print goes to a log beside the run's results; worker 0's event lines also drive the progress bar.
A worker that fails writes its reason to DES_ERROR_FILE; a worker that was killed cannot, and torchrun's own summary
names it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from components.launch.environment import worker_environment
from components.launch.failure import launch_error
from components.launch.progress import Progress
from components.launch.roles import LEAVE_S, LEAVING, MODULES, Role, log_file, pace
from des_core import log, scratch, storage
from des_core.errors import WorkerError
from des_core.release.serve import cache
from des_core.run import Run

GRACE_S = 5.0
"""Time for the others to end after a worker's failure; a frozen one never would."""


def launch(role: Role, run: Run, resume: bool = False, module: str = "") -> None:
    """Run a role on ``train.workers`` local processes until they are done; raises as ``roles.launch``."""
    log_path = log_file(run, role)
    with (
        scratch.folder("workers") as place,
        open(log_path, "wb") as file,
        Progress(pace()) as progress,
    ):
        error_file = Path(place) / "error.json"
        inputs = Path(place) / "inputs.json"
        # Not the run's own inputs.json: that names the place where the run began, and folders are moved.
        day = None if run.day is None else run.day.model_dump(mode="json")
        inputs.write_text(json.dumps({"config": run.config.recorded.model_dump(mode="json"), "day": day}), "utf-8")
        command = _command(module or MODULES[role], run, inputs, ["--resume"] * resume)
        environment = worker_environment(run.config.train.workers)
        # torchrun's own temporary files go with the run.
        environment |= {"DES_ERROR_FILE": str(error_file), "TMPDIR": place, "DES_CACHE": cache.folder()}
        step = 0

        def on_line(line: bytes) -> bool:
            nonlocal step
            event = log.parse_event(line.decode(errors="replace").strip())
            leaving = event.get("event") == LEAVING
            if event and not leaving:
                step = int(event["step"]) if event["event"] in ("step", "resume") else step
                progress.show(event)
            return leaving

        code = _watch(command, environment, error_file, file, on_line)
        error = json.loads(error_file.read_text("utf-8")) if error_file.exists() else None
    if code or error:
        resumable = storage.exists(storage.join(run.checkpoints, "last.json"))
        again = "des train -c FILE --resume" if run.day is None else f"des run -c FILE --as-of {run.day.as_of}"
        hint = f"go on with: {again}" if role == "train" and resumable else "start it again"
        where = f"at step {step}; see {log_path}; {hint}"
        output = Path(log_path).read_text("utf-8", errors="replace")
        raise launch_error(error, output, where) or WorkerError(f"the workers ended without a message {where}")


def _command(module: str, run: Run, inputs: Path, flags: list[str]) -> list[str]:
    """torchrun with the workers under it, each tied to its parent."""
    tied = ("-m", "components.launch.process_tie")
    return [
        *(
            sys.executable,
            *tied,
            f"--parent={os.getpid()}",
            "torch.distributed.run",
            "--standalone",
            "--monitor-interval",
            "0.2",
        ),
        *("--nproc-per-node", str(run.config.train.workers)),
        *(*tied, module, "--config", str(inputs), "--dataset", str(run.dataset)),
        *flags,
    ]


def _watch(
    command: list[str],
    environment: dict[str, str],
    error_file: Path,
    file: BinaryIO,
    on_line: Callable[[bytes], bool],
) -> int:
    """The exit code of torchrun, after its whole output went to ``file`` and, line by line, to ``on_line``.

    ``on_line`` tells whether a worker has said that it leaves: by then all is done, and what does not end in time,
    frozen on its way out, is killed.
    """
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    rest, deadline, done = b"", float("inf"), False
    try:
        while True:
            if select.select([pipe], [], [], 0.2)[0]:
                piece = os.read(pipe, 1 << 16)
                if not piece:
                    return process.wait()
                file.write(piece)
                file.flush()
                *whole, rest = (rest + piece).split(b"\n")
                for line in whole:
                    done = on_line(line) or done
            failed = error_file.exists()
            if deadline == float("inf") and (failed or done):
                deadline = time.monotonic() + (GRACE_S if failed else LEAVE_S)
            if time.monotonic() > deadline:
                _kill(process)
                if done and not failed:
                    return 0
    finally:
        _kill(process)
        process.stdout.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End torchrun at once; its workers are tied to it."""
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
