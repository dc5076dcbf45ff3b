"""A step's job on a cluster: what it asks for, how long it waits, how it explains a failure; and pods that train."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components import stages
from components.launch import cluster
from components.launch import job as job_module
from components.launch.environment import image_of, worker_environment
from components.launch.roles import launch as launch_anywhere
from des_core import storage
from des_core.config import StorageConfig, load_config
from des_core.data.store import features
from des_core.errors import (
    ConfigError,
    DeadlineError,
    DesError,
    KilledError,
    NotFiniteError,
    OutOfMemoryError,
    PodStartError,
    QueueTimeoutError,
    WorkerError,
)
from des_core.run import Run, pin
from k8s.jobs import Job, State
from k8s.pods import Fallen, Trouble
from tests.components.pods_double import LocalPods
from tests.finished import config_of, finished_run
from tests.k8s.api_stub import serving
from tests.k8s.test_jobs import STEP, TEMPLATE, claim

ON_CLUSTER = ("cluster.backend=pytorchjob", "cluster.nodes=2", "cluster.image=ghcr.io/des/des-python:0.1.0")


class Scripted:
    """A cluster in memory: states as written, worker 0's lines, and what was done."""

    def __init__(self, *states: State, lines: tuple[str, ...] = (), result: Callable[[], None] = lambda: None) -> None:
        self.states, self.lines, self.result = states, lines, result
        self.submitted: list[Job] = []
        self.deleted: list[str] = []

    def submit(self, job: Job) -> None:
        self.submitted.append(job)

    def watch(self, job: Job) -> Iterator[State]:
        for state in self.states:
            time.sleep(0.02)
            if state.ended:
                self.result()
            yield state

    def logs(self, job: Job, ended: threading.Event) -> Iterator[str]:
        yield from self.lines

    def delete(self, job: Job, patience_s: float = 0.0) -> None:
        self.deleted.append(job.name)


@pytest.fixture(autouse=True)
def in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "in_pod", lambda: True)
    monkeypatch.setattr(job_module, "SEEN_S", 0.1)


def untrained(folder: Path, *overrides: str) -> Run:
    """A run whose data are there, for a cluster."""
    run = finished_run(folder, *ON_CLUSTER, f"source.path={folder}/logs.csv", *overrides, samples=200)
    for name in ("training.json", "report.json", "predictions"):
        storage.delete(run.path(name))
    return run


def trained(run: Run) -> Callable[[], None]:
    return lambda: storage.write_json(run.path("training.json"), {}) and None


def failure(run: Run, *states: State, lines: tuple[str, ...] = ()) -> tuple[DesError, Scripted]:
    jobs = Scripted(*states, lines=lines)
    with pytest.raises(DesError) as caught:
        cluster.launch("train", run, jobs=jobs)
    assert "\n" not in str(caught.value)
    return caught.value, jobs


def test_a_job_is_named_by_its_run_and_does_what_torchrun_would_do_here(tmp_path: Path) -> None:
    run = untrained(tmp_path, "cluster.cpu=4", "cluster.gpus=1", "cluster.queue=users")
    job = cluster.job_of("train", run, resume=True)
    assert job.name == f"shop-{run.key[:10]}"
    assert cluster.job_of("evaluate", run).name == f"shop-{run.key[:10]}-evaluate"
    assert job.command == (
        *("torchrun", "-m", "des_core.engine.trainer"),
        *("--config", run.path("inputs.json"), "--dataset", str(run.dataset)),
    )
    assert job.flags == ("--resume",)
    assert job.env["OMP_NUM_THREADS"] == "3"
    assert (job.nodes, job.nproc_per_node, job.gpus, job.queue) == (2, 1, 1, "users")
    assert cluster.job_of("train", untrained(tmp_path, "cluster.cpu=500m")).env["OMP_NUM_THREADS"] == "1"


def test_the_launcher_hands_over_by_the_configs_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = untrained(tmp_path)
    jobs = Scripted(State("succeeded"), result=trained(run))
    monkeypatch.setattr(cluster, "connect", lambda: jobs)
    launch_anywhere("train", run, resume=True)
    assert [job.flags for job in jobs.submitted] == [("--resume",)]


def test_what_is_done_is_not_submitted(tmp_path: Path) -> None:
    run, jobs = untrained(tmp_path), Scripted()
    trained(run)()
    cluster.launch("train", run, jobs=jobs)
    assert not jobs.submitted


@pytest.mark.parametrize("phase", ["succeeded", "failed"])
def test_success_is_the_manifest_whatever_the_condition_says(tmp_path: Path, phase: str) -> None:
    run = untrained(tmp_path)
    cluster.launch("train", run, jobs=Scripted(State(phase), result=trained(run)))  # type: ignore[arg-type]
    error, _ = failure(untrained(tmp_path), State("succeeded"))
    assert re.search(r"succeeded, but left no \S*/training.json; .*mount the same storage.root\?", str(error))


def test_worker_0_is_heard_and_its_log_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = untrained(tmp_path)
    lines = ("event=step step=7 of=10", "a word of no meaning")
    cluster.launch("train", run, jobs=Scripted(State("running"), State("succeeded"), lines=lines, result=trained(run)))
    said = capfd.readouterr()
    assert "event=step step=7 of=10" in said.err
    assert "a word of no meaning" in said.err
    assert storage.read_bytes(run.path("train.log")).decode().splitlines() == list(lines)


def test_a_worker_that_freezes_on_its_way_out_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pod would run until cluster.deadline_s; the results are there."""
    monkeypatch.setattr(job_module, "LEAVE_S", 0.1)
    run = untrained(tmp_path)
    jobs = Scripted(*[State("running")] * 50, lines=("event=step step=7 of=10", "event=leaving worker=0"))
    finished = threading.Timer(0.3, trained(run))
    finished.start()
    cluster.launch("train", run, jobs=jobs)
    finished.join()
    assert jobs.deleted == [jobs.submitted[0].name]


def fell(reason: str, *lines: str, message: str = "", code: int = 1) -> Fallen:
    return Fallen("shop-worker-1", reason, message, code, "", lines)


SUMMARY = ("  rank      : 1 (local_rank: 0)", "  exitcode  : -9 (pid: 11)")


@pytest.mark.parametrize(
    ("state", "kind", "pattern"),
    [
        (
            State(
                "failed",
                fallen=(fell("Error", "event=error code=not-finite worker=1 message='loss is nan; lower it'"),),
            ),
            NotFiniteError,
            r"loss is nan; lower it",
        ),
        (
            State("failed", fallen=(fell("Error", "last words"), fell("OOMKilled", code=137))),
            OutOfMemoryError,
            r"pod shop-worker-1 was killed \(OOMKilled\) at step 7; .*its \d+Mi of memory \(predicted, for want of "
            r"cluster.memory\) were not enough: set more, .*",
        ),
        (
            State("failed", fallen=(fell("Evicted", message="The node was low on resource: memory"),)),
            WorkerError,
            r"pod shop-worker-1 ended \(Evicted: The node was low on resource: memory\) at step 7; see .*",
        ),
        (State("failed", fallen=(fell("Error", *SUMMARY),)), KilledError, r"worker 1 was killed \(SIGKILL.*"),
        (
            State("failed", fallen=(fell("Error", "Traceback ...", "RuntimeError: nobody foresaw this"),)),
            WorkerError,
            r"a worker crashed \(RuntimeError: nobody foresaw this\) at step 7; .*",
        ),
        (
            State(
                "failed", fallen=(fell("Error", "event=error code=worker worker=1 message='worker 1 crashed (X: y)'"),)
            ),
            WorkerError,
            r"worker 1 crashed \(X: y\) at step 7; see .*train.log; .*",
        ),
        (
            State(
                "failed",
                fallen=(
                    fell("Error", "event=error code=peer-lost worker=0 message='the connection broke'"),
                    fell("Error", "event=error code=worker worker=1 message='worker 1 crashed (MemoryError: )'"),
                ),
            ),
            WorkerError,
            r"worker 1 crashed \(MemoryError: \) at step 7; .*",
        ),
        (
            State("failed", fallen=(fell("Error", "sh: torchrun: not found", "", code=127),)),
            WorkerError,
            r"job shop-\w+ failed \(shop-worker-1: sh: torchrun: not found\) .*",
        ),
        (State("failed", "JobFailed: no word"), WorkerError, r"job shop-\w+ failed \(JobFailed: no word\) .*"),
        (
            State("failed", "DeadlineExceeded: active longer than specified deadline"),
            DeadlineError,
            r"job shop-\w+ ran for more than cluster.deadline_s = 86400 at step 7; .*",
        ),
        (
            State("failed", "PyTorchJobFailed: PyTorchJob deadline-shop is failed because 1 replica(s) failed."),
            WorkerError,
            r"job shop-\w+ failed \(PyTorchJobFailed: .*",
        ),
        (State("deleted", "job x was deleted"), WorkerError, r"job x was deleted; at step 7; .*start it again"),
    ],
)
def test_a_failure_is_one_line_that_names_its_cause(
    tmp_path: Path, state: State, kind: type[DesError], pattern: str
) -> None:
    error, jobs = failure(untrained(tmp_path), State("running"), state, lines=("event=step step=7 of=9",))
    assert type(error) is kind
    assert re.fullmatch(pattern, str(error)), str(error)
    assert not jobs.deleted, "its pods' logs can still be looked at"


def test_where_there_is_a_checkpoint_the_next_attempt_goes_on(tmp_path: Path) -> None:
    run = untrained(tmp_path)
    storage.write_json(storage.join(run.checkpoints, "last.json"), {})
    assert "the next attempt goes on from the last checkpoint" in str(failure(run, State("failed", "x"))[0])


# How long it waits.


def test_waiting_in_a_queue_has_its_own_limit_and_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = untrained(tmp_path, "cluster.queue=users", "cluster.queue_timeout_s=0.2")
    error, jobs = failure(run, *[State("queued")] * 30)
    assert re.search(
        r"was deleted after waiting in queue users for \d+ s \(cluster.queue_timeout_s = 0.2\)", str(error)
    )
    assert len(jobs.deleted) == 1 and type(error) is QueueTimeoutError
    assert "waiting in queue users for 0 s" in capfd.readouterr().err


def test_time_in_a_queue_does_not_count_against_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "LATE_S", 0.0)
    run = untrained(tmp_path, "cluster.queue=users", "cluster.deadline_s=0.3")
    done = Scripted(*[State("queued")] * 30, State("running"), State("succeeded"), result=trained(run))
    cluster.launch("train", run, jobs=done)
    storage.delete(run.path("training.json"))
    error, jobs = failure(run, *[State("running")] * 40)
    assert re.search(r"ran for more than cluster.deadline_s = 0.3 and was deleted", str(error))
    assert len(jobs.deleted) == 1 and type(error) is DeadlineError


def test_trouble_that_lasts_ends_the_wait_and_passing_trouble_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_module, "STUCK_S", 0.2)
    run = untrained(tmp_path)
    image = State("waiting", trouble=Trouble("ImagePullBackOff", "x-worker-0: no such image", True))
    error, jobs = failure(run, *[image] * 40)
    assert re.search(r"pods could not start for \d+ s: ImagePullBackOff: x-worker-0: no such image; ask", str(error))
    assert len(jobs.deleted) == 1 and type(error) is PodStartError
    # The kubelet alternates between two reasons, with nothing to complain of in between.
    pulls = State("waiting", trouble=Trouble("ErrImagePull", "x-worker-0: no such image", True))
    error, jobs = failure(run, *[image, pulls, State("waiting")] * 20)
    assert re.search(r"pods could not start for \d+ s: (ImagePullBackOff|ErrImagePull): x-worker-0", str(error))
    assert len(jobs.deleted) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("event=waiting")]
    assert all("limit_s=0" in line for line in said) and 2 <= len(said) < 50
    full = State("waiting", trouble=Trouble("Unschedulable", "0/1 nodes", False))
    passing = Scripted(*[full] * 30, State("running"), State("succeeded"), result=trained(run))
    cluster.launch("train", run, jobs=passing)
    storage.delete(run.path("training.json"))
    error, _ = failure(untrained(tmp_path, "cluster.queue_timeout_s=0.2"), *[full] * 40)
    assert "Unschedulable: 0/1 nodes" in str(error) and type(error) is PodStartError


# Before anything is submitted.


@pytest.mark.parametrize("image", ["", "des", "des:latest", "registry:5000/des", "registry:5000/des:latest"])
def test_an_image_must_name_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str) -> None:
    monkeypatch.setenv("DES_IMAGE", image)
    with pytest.raises(ConfigError, match=r"cluster.image"):
        cluster.check(untrained(tmp_path, "cluster.image=").config)
    monkeypatch.setenv("DES_IMAGE", "registry:5000/des:1")
    assert image_of(untrained(tmp_path, "cluster.image=").config) == "registry:5000/des:1"
    pinned = untrained(tmp_path, f"cluster.image=des@sha256:{'0' * 64}").config
    assert image_of(pinned).startswith("des@sha256:")


def test_a_laptops_folder_cannot_be_the_jobs_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "in_pod", lambda: False)
    run, jobs = untrained(tmp_path), Scripted()
    with pytest.raises(ConfigError, match=r"storage.root = .* is a folder of this machine, .* s3://bucket/folder"):
        cluster.launch("train", run, jobs=jobs)
    assert not jobs.submitted
    with pytest.raises(ConfigError, match=r"is a folder of this machine"):
        stages.resolve(run.config)


def test_a_password_in_an_address_does_not_reach_the_workers_and_is_refused(tmp_path: Path) -> None:
    config = untrained(tmp_path).config
    config = config.model_copy(update={"storage": StorageConfig(root="s3://me:secret@bucket/x")})
    with pytest.raises(ConfigError, match=r"holds a password") as caught:
        cluster.check(config)
    assert "secret@" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ((), "source.path = 'logs.csv'"),
        (("source.path=/data/x.csv", "storage.root=results"), "storage.root = 'results'"),
        (("source.path=/data/x.csv", "storage.root=s3://b/x", "run.dir=~/runs"), "run.dir = '~/runs'"),
        (
            ("source.path=/data/x.csv", "storage.root=/data", "registry.tracking_uri=sqlite:///m.db"),
            "registry.tracking_uri = 'sqlite:///m.db'",
        ),
    ],
)
def test_a_relative_path_is_an_error_on_a_cluster(tmp_path: Path, overrides: tuple[str, ...], key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f": {key} is a relative path, ")):
        config_of(tmp_path, "cluster.backend=pytorchjob", "cluster.nodes=2", *overrides)


def test_on_a_cluster_a_root_must_be_named_and_is_where_a_run_lives(tmp_path: Path) -> None:
    config_of(tmp_path)
    words = ("cluster.backend=pytorchjob", "cluster.nodes=2", "source.path=s3://logs/x.csv")
    with pytest.raises(ConfigError, match=r"storage.root is not set"):
        load_config(tmp_path / "shop.toml", words)
    config = load_config(tmp_path / "shop.toml", (*words, "storage.root=/data/shop"))
    assert (config.run.dir, config.storage.root) == ("/data/shop", "/data/shop")
    assert config.registry.tracking_uri == "sqlite:////data/shop/mlflow.db"


# Whole processes.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_step_that_is_told_to_end_deletes_its_job(tmp_path: Path, number: signal.Signals) -> None:
    untrained(tmp_path)
    script = (
        "from components.launch import cluster\n"
        "from des_core.config import load_config\n"
        "from des_core.run import pin\n"
        "from k8s.api import Api\n"
        "from k8s.jobs import OperatorJobs\n"
        "from kubernetes import client\n"
        "cluster.in_pod = lambda: True\n"
        f"words = {(*ON_CLUSTER, f'source.path={tmp_path}/logs.csv', f'run.dir={tmp_path}/runs/shop')!r}\n"
        f"run = pin(load_config('{tmp_path}/shop.toml', words))\n"
        "cluster.launch('train', run, jobs=OperatorJobs(Api(client.Configuration(host=HOST), 'des', 'step')))\n"
    )
    with serving() as api:
        api.put("podtemplates", TEMPLATE | {})
        api.put("persistentvolumeclaims", claim("ReadWriteMany"))
        api.put("pods", STEP | {})
        command = [sys.executable, "-c", f"HOST = '{api.url}'\n{script}"]
        with subprocess.Popen(command, env=worker_environment(2), stderr=subprocess.PIPE, text=True) as step:
            end = time.monotonic() + 30
            while not api.count("watch", "pytorchjobs") and time.monotonic() < end:
                assert step.poll() is None, step.stderr.read() if step.stderr else ""
                time.sleep(0.02)
            assert [key for key in api.objects if key[0] == "pytorchjobs"]
            step.send_signal(number)
            step.communicate(timeout=30)
        assert not [key for key in api.objects if key[0] == "pytorchjobs"]
        assert step.returncode in (128 + number, -number)


def test_the_rendered_pods_train_and_a_killed_ones_work_is_gone_on_with(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        *ON_CLUSTER,
        f"source.path={tmp_path}/logs.csv",
        *("train.batch=16", "train.epochs=12", "train.early_stop=none", "train.checkpoint_steps=5"),
        *("train.exchange=sum", "train.upper=home"),
    )
    rows = [f"{row % 2},u{row % 7},a|t{row % 3},{row}" for row in range(200)]
    (tmp_path / "logs.csv").write_text("\n".join(["click,user,tags,price", *rows]) + "\n")
    run = pin(config, features.ingest(config))
    jobs = LocalPods(tmp_path)

    def kill_soon() -> None:
        end = time.monotonic() + 200
        while not storage.exists(storage.join(run.checkpoints, "last.json")) and time.monotonic() < end:
            time.sleep(0.01)
        jobs.kill(1)

    killer = threading.Thread(target=kill_soon)
    killer.start()
    with pytest.raises(
        WorkerError, match=r"-worker-1 was killed \(exit code 137\).*the next attempt goes on from the last checkpoint"
    ):
        cluster.launch("train", run, jobs=jobs)
    killer.join()
    assert not storage.exists(run.path("training.json"))
    cluster.launch("train", run, resume=True, jobs=jobs)
    training = storage.read_json(run.path("training.json"))
    assert (training["workers"], training["steps"]) == (2, 120)
    text = storage.read_bytes(run.path("train.log")).decode()
    assert "event=resume" in text
    assert f"event=joined pod=shop-{run.key[:10]}-worker-0 worker=0 workers=2" in text
    assert jobs.commands[1] == [*jobs.commands[0], "--resume"]
