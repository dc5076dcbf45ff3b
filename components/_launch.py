"""N workers as local processes under torchrun, or as one cluster job, and one line that says why they ended.

    launcher -> torchrun -> workers, each tied to the life of its parent (see _tied)

Whatever the workers print goes to a log beside the run's results; worker 0's event lines also drive the progress bar.
A worker that fails writes its reason to DES_ERROR_FILE; a worker that was killed cannot, and torchrun's own summary
names it.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

from components._progress import Progress
from des_core import log, scratch, storage
from des_core.errors import DesError, UserError, WorkerError
from des_core.release.serve import cache
from des_core.run import Run

Role = Literal["train", "evaluate"]

MODULES: dict[str, str] = {"train": "des_core.engine.trainer", "evaluate": "des_core.engine.evaluator"}

LEAVING = "leaving"
"""The event of a worker whose role is done, after all workers have met for the last time."""
LEAVE_S = 30.0
"""For processes to end once their work is done."""
GRACE_S = 5.0
"""Time for the others to end after a worker's failure; a frozen one never would."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def launch(role: Role, run: Run, resume: bool = False, profile: bool = False, module: str = "") -> None:
    """Run a role on ``train.workers`` workers, where cluster.backend says, until they are done.

    Args:
        profile: wait for the device after each phase of a step, so that its time is its own.
        module: the workers' module, if not the role's own.

    Raises:
        DesError: a worker failed; UserError where it is the user's to mend.
    """
    if run.config.cluster.backend == "pytorchjob":
        from components import _cluster

        _cluster.launch(role, run, resume, profile, module)
        return
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
        command = _command(module or MODULES[role], run, inputs, [*["--resume"] * resume, *["--profile"] * profile])
        environment = worker_environment(run.config.train.workers)
        # torchrun's own temporary files go with the run.
        environment |= {"DES_ERROR_FILE": str(error_file), "TMPDIR": place, "DES_CACHE": cache.folder()}
        step = 0

        def heed(line: bytes) -> bool:
            nonlocal step
            event = log.parse_event(line.decode(errors="replace").strip())
            leaving = event.get("event") == LEAVING
            if event and not leaving:
                step = int(event["step"]) if event["event"] in ("step", "resume") else step
                progress.show(event)
            return leaving

        code = _watch(command, environment, error_file, file, heed)
        error = json.loads(error_file.read_text("utf-8")) if error_file.exists() else None
    if code or error:
        resumable = storage.exists(storage.join(run.checkpoints, "last.json"))
        again = "des train -c FILE --resume" if run.day is None else f"des run -c FILE --as-of {run.day.as_of}"
        hint = f"go on with: {again}" if role == "train" and resumable else "start it again"
        raise explain(
            error, Path(log_path).read_text("utf-8", errors="replace"), f"at step {step}; see {log_path}; {hint}"
        )


def _command(module: str, run: Run, inputs: Path, flags: list[str]) -> list[str]:
    """torchrun with the workers under it, each tied to its parent."""
    tied = ("-m", "components._tied")
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


def pace() -> float:
    """Seconds between two lines of progress where there is no terminal; the local pipeline draws its own bar."""
    return 0.0 if os.environ.get("DES_LOCAL_RUN") else 10.0


def log_file(run: Run, role: str) -> str:
    """Where a role's full output goes: beside the run's results, or in run.dir where these are not local."""
    folder = run.config.run.dir if "://" in run.folder else run.folder
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, f"{role}.log")


def worker_environment(workers: int) -> dict[str, str]:
    """The environment of local workers: each has its share of the CPUs, and imports our packages from our place."""
    environment = dict(os.environ)
    for name in THREADS:
        # One CPU of a share of several is for the thread that prepares the next batch.
        environment.setdefault(name, str(max(1, cpu_quota() // workers - 1)))
    return environment | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": import_path()}


def import_path() -> str:
    """A PYTHONPATH under which a child finds the packages that this process runs."""
    home = Path(__file__).resolve().parent.parent
    # Installed packages are found anyway, and must not come before the standard library.
    first = [] if home.name in ("site-packages", "dist-packages") else [str(home)]
    return os.pathsep.join([*first, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])


def cpu_quota(cgroups: str = "/sys/fs/cgroup") -> int:
    """CPUs that this process may use: its affinity, or the control group's quota where that is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota, period in (_quota_v2(cgroups), _quota_v1(cgroups)):
        if quota > 0 and period > 0:
            allowed = min(allowed, max(1, quota // period))
    return allowed


def _quota_v2(cgroups: str) -> tuple[int, int]:
    words = _words(f"{cgroups}/cpu.max")
    return (int(words[0]), int(words[1])) if len(words) == 2 and words[0] != "max" else (0, 0)


def _quota_v1(cgroups: str) -> tuple[int, int]:
    quota, period = _words(f"{cgroups}/cpu/cpu.cfs_quota_us"), _words(f"{cgroups}/cpu/cpu.cfs_period_us")
    return (int(quota[0]), int(period[0])) if quota and period else (0, 0)


def _words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


def _watch(
    command: list[str],
    environment: dict[str, str],
    error_file: Path,
    file: BinaryIO,
    heed: Callable[[bytes], bool],
) -> int:
    """The exit code of torchrun, after its whole output went to ``file`` and, line by line, to ``heed``.

    ``heed`` tells whether a worker has said that it leaves: by then all is done, and what does not end in time,
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
                    done = heed(line) or done
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


def explain(error: dict[str, object] | None, output: str, further: str) -> DesError:
    """One line for a failed launch: the user's mistake first, then a killed worker, then a worker's own words.

    Args:
        error: what a worker left in DES_ERROR_FILE.
        output: all that torchrun and the workers printed.
        further: where it happened, and what to do.
    """
    if error and error["code"] == UserError.exit_code:
        return UserError(str(error["message"]))
    killed = killed_worker(output)
    if killed:
        worker, name = killed
        return WorkerError(
            f"worker {worker} was killed ({name}{'; out of memory?' if name == 'SIGKILL' else ''}) {further}"
        )
    if error:
        return WorkerError(f"{error['message']} {further}")
    # torch puts "[rank0]: " before the lines of a traceback once the workers have met.
    crash = re.search(r"^(?:\[rank(\d+)\]: )?(\w[\w.]*(?:Error|Exception)\b.*)$", output, re.MULTILINE)
    if crash:
        who = f"worker {crash[1]}" if crash[1] else "a worker"
        return WorkerError(f"{who} crashed ({crash[2][:200]}) {further}")
    return WorkerError(f"the workers ended without a word {further}")


def killed_worker(output: str) -> tuple[int, str] | None:
    """Worker and signal that torchrun's summary of failures names; SIGTERM only where no other failure explains it."""
    found = re.findall(r"rank\s*:\s*(\d+)\s*\(local_rank:.*?exitcode\s*:\s*(-?\d+)", output, re.DOTALL)
    signals = [(int(worker), signal.Signals(-int(code)).name) for worker, code in found if int(code) < 0]
    # torchrun itself ends those that are left with SIGTERM.
    ended = signals[0] if len(signals) == len(found) and signals else None
    return next((pair for pair in signals if pair[1] != "SIGTERM"), ended)
