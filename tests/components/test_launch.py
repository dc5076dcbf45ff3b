"""The launcher with real torchrun and real processes: what it passes on, how it explains a failure, and no orphans."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.launch import local
from components.launch.environment import worker_environment
from components.launch.failure import killed_worker, launch_error
from components.launch.roles import launch
from des_core import storage
from des_core.cpus import cpu_quota
from des_core.errors import CheckpointError, DesError, KilledError, PeerLostError, WorkerError
from des_core.run import Run
from tests.finished import finished_run

DOUBLE = "tests.components.worker_double"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of two workers, started from a folder whose own components/ must do no harm."""
    (tmp_path / "components").mkdir()
    (tmp_path / "components" / "__init__.py").write_text("raise SystemExit('the wrong components')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DES_TEST_FOLDER", str(tmp_path))
    return finished_run(tmp_path, samples=200)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid-*")]


def gone(pid: int, within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not _alive(pid):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(autouse=True)
def no_orphans(tmp_path: Path) -> Iterator[None]:
    yield
    assert all(gone(pid) for pid in pids(tmp_path))


def test_workers_get_their_arguments_and_threads_and_their_events_are_shown(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DES_TEST_WORKER", "done")
    monkeypatch.setenv("PYTHONPATH", ".")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    launch("train", run, resume=True, module=DOUBLE)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["arguments"][2:] == ["--dataset", str(run.dataset), "--resume"]
    assert seen["environment"]["PYTHONSAFEPATH"] == "1"
    assert seen["environment"]["OMP_NUM_THREADS"] == str(max(1, cpu_quota() // 2))
    assert "step=7 of=10" in capfd.readouterr().err
    assert "a word of no meaning" in Path(run.path("train.log")).read_text()


@pytest.mark.parametrize(
    ("behaviour", "kind", "pattern"),
    [
        ("mistaken", CheckpointError, r"checkpoint was written for factors=16; set model.factors = 16"),
        (
            "killed",
            KilledError,
            r"worker 1 was killed \(SIGKILL; out of memory\?\) at step 7; see .*train.log; "
            r"go on with: des train -c FILE --resume",
        ),
        (
            "frozen",
            PeerLostError,
            r"worker 1 has not answered for \d s \(killed, frozen or cut off\) at step 0; see .*",
        ),
        (
            "crashed",
            WorkerError,
            r"a worker crashed \(RuntimeError: nobody foresaw this\) at step 0; see .*train.log; .*",
        ),
    ],
)
def test_a_failure_is_one_line_that_names_its_cause(
    run: Run, monkeypatch: pytest.MonkeyPatch, behaviour: str, kind: type[DesError], pattern: str
) -> None:
    storage.write_json(storage.join(run.checkpoints, "last.json"), {})
    monkeypatch.setenv("DES_TEST_WORKER", behaviour)
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        launch("train", run, module=DOUBLE)
    assert type(caught.value) is kind
    assert re.fullmatch(pattern, str(caught.value)), str(caught.value)
    assert time.monotonic() - start < 30


def test_a_worker_that_freezes_on_its_way_out_holds_nobody_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DES_TEST_WORKER", "stuck_at_the_end")
    monkeypatch.setattr(local, "LEAVE_S", 1.0)
    start = time.monotonic()
    launch("train", run, module=DOUBLE)
    assert time.monotonic() - start < 30


def launcher_in(folder: Path) -> subprocess.Popen[bytes]:
    """A process that launches the double's workers for the run under a folder."""
    script = (
        "from components.launch.roles import launch\n"
        "from des_core.config import load_config\n"
        "from des_core.run import pin\n"
        f"config = load_config('shop.toml', ('run.dir={folder}/runs/shop',))\n"
        f"launch('train', pin(config), module='{DOUBLE}')\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], env=worker_environment(2), stderr=subprocess.DEVNULL, start_new_session=True
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_launcher(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("DES_TEST_WORKER", "staying")
    with launcher_in(tmp_path) as launcher:
        end = time.monotonic() + 30
        while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(pids(tmp_path)) == 2
        launcher.send_signal(number)
    assert all(gone(pid) for pid in pids(tmp_path))


def those_with(text: str) -> list[int]:
    """Living processes with a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in line and _alive(int(path.parent.name)) and int(path.parent.name) != os.getpid():
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("births", range(4))
def test_a_launcher_that_is_killed_while_workers_are_born_leaves_none(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, births: int
) -> None:
    """At its first, second ... process; each asks the kernel for its own end first of all."""
    monkeypatch.setenv("DES_TEST_WORKER", "staying")
    mark = f"{tmp_path}/runs/shop"
    with launcher_in(tmp_path) as launcher:
        end = time.monotonic() + 30
        while len(those_with(mark)) < births + 1 and time.monotonic() < end:
            time.sleep(0.005)
        launcher.kill()
    end = time.monotonic() + 15
    while those_with(mark) and time.monotonic() < end:
        time.sleep(0.05)
    assert not those_with(mark)


def test_a_step_whose_reader_is_gone_may_still_take_its_job_away(tmp_path: Path) -> None:
    (tmp_path / "step_double.py").write_text(
        "import sys, time\n"
        "from components.launch.process_tie import told_to_end\n"
        "with told_to_end():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    except SystemExit:\n"
        f"        open({str(tmp_path / 'deleted')!r}, 'w').close()\n"
        "        raise\n"
    )
    command = [sys.executable, "-m", "components.launch.process_tie", "--watch-output", "step_double"]
    environment = worker_environment(1)
    environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as step:
        assert step.stdout is not None
        assert step.stdout.readline() == b"ready\n"
        step.stdout.close()
        assert step.wait(20) == 128 + signal.SIGTERM
    assert (tmp_path / "deleted").exists()


def test_the_quota_of_either_kind_of_control_group_counts(tmp_path: Path) -> None:
    allowed = len(os.sched_getaffinity(0))
    assert cpu_quota(str(tmp_path)) == allowed
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(str(tmp_path)) == allowed
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert cpu_quota(str(tmp_path)) == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(str(tmp_path)) == 1


def test_threads_that_the_user_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert worker_environment(2)["OMP_NUM_THREADS"] == "3"


def test_of_several_dead_workers_the_one_that_torchrun_did_not_end_is_named() -> None:
    summary = """
[0]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 11)
------------------
Root Cause (first observed failure):
[1]:
  rank      : 3 (local_rank: 3)
  exitcode  : -11 (pid: 14)
"""
    assert killed_worker(summary) == (3, "SIGSEGV")
    assert killed_worker("rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 11)") is None
    crashed = summary.replace("-11", "1")
    assert killed_worker(crashed) is None, "the one left over was ended by torchrun"
    # What the others say of a killed peer is a consequence; a mistake of the user's is a cause.
    lost = {"code": "peer-lost", "message": "worker 3 has not answered", "worker": 0}
    assert str(launch_error(lost, summary, "here")) == "worker 3 was killed (SIGSEGV) here"
    assert str(launch_error(lost | {"code": "checkpoint"}, summary, "here")) == "worker 3 has not answered"
    assert launch_error(None, "", "here") is None
    # torchrun's own traceback is no worker's.
    torchruns = "Traceback ...\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert launch_error(None, torchruns, "here") is None
    assert "ValueError: x" in str(launch_error(None, f"ValueError: x\n{torchruns}", "here"))
