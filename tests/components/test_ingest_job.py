"""Ingestion as a RayJob: what the step asks for, waits for and says; and the entrypoint, run here as it is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components import stages
from components.launch import cluster, ingest_job
from components.launch import job as job_module
from des_core import storage
from des_core.config import Config
from des_core.errors import ConfigError, DataError, DeadlineError, DesError, OutOfMemoryError, WorkerError
from des_core.run import features_uri
from k8s.jobs import Job, State
from k8s.pods import Fallen
from k8s.ray import RAY
from tests.components.test_cluster import Scripted
from tests.finished import config_of

ON_RAY = (
    *("cluster.backend=pytorchjob", "cluster.nodes=2", "cluster.image=ghcr.io/des/des-python:0.1.0"),
    *("ingest.engine=ray", "ingest.workers=3", "ingest.cpus=4", "ingest.memory_mb=2048"),
)


@pytest.fixture(autouse=True)
def in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "in_pod", lambda: True)
    monkeypatch.setattr(job_module, "SEEN_S", 0.1)


def config(folder: Path, *overrides: str) -> Config:
    made = config_of(folder, *ON_RAY, f"source.path={folder}/logs.csv", *overrides)
    rows = [f"{row % 2},u{row % 7},a|t{row % 3},{row}" for row in range(200)]
    (folder / "logs.csv").write_text("\n".join(["click,user,tags,price", *rows]) + "\n")
    return made


def entrypoint(job: Job) -> subprocess.CompletedProcess[str]:
    """What the head's pod would run, here, where there is no Ray cluster: the bytes are the same by either engine."""
    address = job.command[job.command.index("--config") + 1]
    stored = storage.read_json(address)
    storage.write_json(address, stored | {"ingest": stored["ingest"] | {"engine": "local"}})
    command = [sys.executable, *job.command[1:]]
    return subprocess.run(
        command, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True, timeout=120
    )


def test_what_is_asked_of_the_cluster(tmp_path: Path) -> None:
    long = config(tmp_path, f"run.name={'n' * 63}")
    job = ingest_job.job_of(long, "2026-01-02")
    assert len(job.name) <= 47, "KubeRay takes no longer name"
    assert (job.nodes, job.cpu, job.memory, job.gpus) == (3, "4", "2048Mi", 0)
    assert job.command[:3] == ("python", "-m", "components.launch.ingest_job")
    assert job.command[-2:] == ("--as-of", "2026-01-02")
    assert job.labels["des/role"] == "ingest"
    assert ingest_job.job_of(long, "all").name != job.name
    assert (
        ingest_job.job_of(config(tmp_path, "source.max_bad_share=0.5"), "all").name
        != ingest_job.job_of(config(tmp_path), "all").name
    ), "another feature store is another job"


def test_where_it_is_read_decides_nothing_about_the_model(tmp_path: Path) -> None:
    here, there = config(tmp_path, "ingest.engine=local"), config(tmp_path, "ingest.workers=9")
    assert here.digest == there.digest and here.features_digest == there.features_digest


def test_the_step_submits_and_then_finds_the_feature_store_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path)
    ended: list[subprocess.CompletedProcess[str]] = []
    jobs = Scripted(State("waiting"), State("running"), State("succeeded"), lines=("event=ingest part=all rows=200",))
    jobs.result = lambda: ended.append(entrypoint(jobs.submitted[0]))
    asked: list[Any] = []
    monkeypatch.setattr(ingest_job, "connect", lambda kind: asked.append(kind) or jobs)
    done = stages.ingest_and_pin(made)
    assert asked == [RAY] and len(jobs.submitted) == 1
    assert ended[0].returncode == 0, ended[0].stderr
    assert "event=ingested what=" in ended[0].stderr
    assert done.unchanged and "200 train" not in done.what and storage.exists(features_uri(made))
    assert "event=ingest part=all rows=200" in capfd.readouterr().err
    kept = Path(made.storage.root) / "ingest"
    assert [path.read_text() for path in kept.glob("*.log")] == ["event=ingest part=all rows=200\n"]
    stages.ingest_and_pin(made)
    assert len(jobs.submitted) == 1, "what is there is not made again"
    (tmp_path / "logs.csv").write_text("click,user,tags,price\n1,ann,a,3\n0,bob,b,4\n")
    assert not ingest_job.is_done(made, "all"), "the logs are others now"


def test_an_engine_of_ones_own_machine_submits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object) -> None:
        raise AssertionError("nothing is to be submitted")

    monkeypatch.setattr(ingest_job, "launch", refuse)
    stages.ingest_and_pin(config(tmp_path, "ingest.engine=local"))
    with pytest.raises(AssertionError):
        stages.ingest_and_pin(config(tmp_path, "source.max_bad_share=0.9"))


def failure(config: Config, *states: State, lines: tuple[str, ...] = ()) -> tuple[DesError, Scripted]:
    jobs = Scripted(*states, lines=lines)
    with pytest.raises(DesError) as caught:
        ingest_job.launch(config, "all", jobs)
    assert "\n" not in str(caught.value)
    return caught.value, jobs


def submitter(*lines: str) -> Fallen:
    return Fallen("shop-ingest-s7k2p", "Error", "", 2, "", lines)


@pytest.mark.parametrize(
    ("state", "kind", "pattern"),
    [
        (
            State("failed", fallen=(submitter("event=error code=data message='logs.csv: no good record'"),)),
            DataError,
            r"logs.csv: no good record",
        ),
        (
            State("failed", fallen=(Fallen("shop-head", "OOMKilled", "", 137, ""),)),
            OutOfMemoryError,
            r"pod shop-head was killed \(OOMKilled\) see .*; its 2048Mi of memory \(ingest.memory_mb\) were not.*",
        ),
        (
            State(
                "failed", "AppFailed: exit code 1", fallen=(submitter("ModuleNotFoundError: No module named 'ray'"),)
            ),
            WorkerError,
            r"a worker crashed \(ModuleNotFoundError: No module named 'ray'\) see .*",
        ),
        (State("failed", "SubmissionFailed: no head"), WorkerError, r"job \S+ failed \(SubmissionFailed: no head\) .*"),
        (
            State("failed", "DeadlineExceeded: too long"),
            DeadlineError,
            r"job \S+ ran for more than cluster.deadline_s = 86400 .*",
        ),
        (State("deleted", "job x was deleted while it ran"), WorkerError, r"job x was deleted while it ran; see .*"),
        (State("succeeded"), WorkerError, r"job \S+ succeeded, but left no .*manifest.json; do this step .*"),
    ],
)
def test_a_failure_is_one_line_that_names_its_cause(
    tmp_path: Path, state: State, kind: type[DesError], pattern: str
) -> None:
    error, _ = failure(config(tmp_path), State("running"), state)
    assert type(error) is kind, error
    assert re.fullmatch(pattern, str(error)), str(error)


def test_it_is_deleted_when_it_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "LATE_S", 0.0)
    error, jobs = failure(config(tmp_path, "cluster.deadline_s=0.2"), *[State("running")] * 40)
    assert type(error) is DeadlineError and len(jobs.deleted) == 1


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit(143)])
def test_a_step_that_is_told_to_end_deletes_its_job(tmp_path: Path, signal: Any) -> None:
    class Told(Scripted):
        def watch(self, job: Job) -> Iterator[State]:
            yield State("running")
            raise signal

    jobs = Told()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        ingest_job.launch(config(tmp_path), "all", jobs)
    assert jobs.deleted == [jobs.submitted[0].name]


def test_a_folder_of_a_laptop_is_refused_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "in_pod", lambda: False)
    jobs = Scripted()
    with pytest.raises(ConfigError, match=r"storage.root = .* is a folder of this machine"):
        ingest_job.launch(config(tmp_path), "all", jobs)
    assert not jobs.submitted


def test_the_entrypoint_leaves_one_line_and_the_errors_exit_code(tmp_path: Path) -> None:
    made = config(tmp_path)
    storage.write_json(ingest_job._config_uri(made), json.loads(made.recorded.model_dump_json()))
    (tmp_path / "logs.csv").write_text("click,user,tags,price\n")
    ended = entrypoint(ingest_job.job_of(made, "all"))
    assert ended.returncode == 2
    assert "event=error code=unusable-logs message=" in ended.stderr and "Traceback" not in ended.stderr
