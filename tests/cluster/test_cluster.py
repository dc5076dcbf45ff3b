"""The whole thing on a real cluster: the overlay ``kind``, its runs, and what happens when they are disturbed.

Needs KUBECONFIG, kubectl, a cluster with the training operator and a default storage class, and DES_IMAGE, an image
that its nodes have. Everything is made in namespace ``des``; each case is a run of its own name, so the tests may be
repeated. The Jobs of the cases are deleted at the end, the overlay stays.
"""

import copy
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from tests.k8s.rendering import Object, render

pytestmark = pytest.mark.cluster

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
NAMESPACE = "des"
STEP_ACCOUNT, WORKER_ACCOUNT = (f"system:serviceaccount:{NAMESPACE}:{name}" for name in ("des-pipeline", "des-worker"))
SUFFIX = secrets.token_hex(2)
"""Of this session's runs."""

READY_S = 600.0
RUN_S = 1800.0
"""Of one run on a small node: a dozen processes start one after the other."""

KILL_A_WORKER = """
import os, signal
for entry in filter(str.isdigit, os.listdir("/proc")):
    if int(entry) not in (1, os.getpid()):
        words = open(f"/proc/{entry}/cmdline").read()
        if "des_core.engine.trainer" in words:
            os.kill(int(entry), signal.SIGKILL)
"""
"""Not process 1: that is torchrun, which a signal from inside its own container cannot kill."""


def kubectl(*words: str, text: str | None = None, check: bool = True, timeout_s: float = 120.0) -> str:
    """What kubectl prints in our namespace; with ``check`` its error is the test's."""
    command = ["kubectl", "--namespace", NAMESPACE, *words]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=timeout_s)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
    return done.stdout


def until(what: str, limit_s: float, look: Callable[[], T | None]) -> T:
    """What ``look`` finds in the end; what the cluster says if it finds nothing in time."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(2)
    pods = kubectl("get", "pods,pytorchjobs,jobs", "-o", "wide", check=False)
    events = kubectl("get", "events", "--sort-by=.lastTimestamp", check=False).splitlines()[-25:]
    pytest.fail("\n".join([f"after {limit_s:.0f} s still not: {what}", pods, *events]))


def items(kind: str, selector: str) -> list[Object]:
    found: list[Object] = json.loads(kubectl("get", kind, "-l", selector, "-o", "json"))["items"]
    return found


class Run:
    """One Job like ``des-run``, with another name and config.

    Args:
        name: of the run and its model; ``job`` is the Job's, where it is another.
        tries: how often the pod may be started anew.
    """

    def __init__(self, like: Object, name: str, *words: str, job: str = "", tries: int = 0) -> None:
        self.name, self.job = f"{name}-{SUFFIX}", f"case-{job or name}-{SUFFIX}"
        manifest = copy.deepcopy(like)
        manifest["metadata"]["name"] = self.job
        manifest["spec"]["backoffLimit"] = tries
        container = manifest["spec"]["template"]["spec"]["containers"][0]
        places = ("--set", f"run.name={self.name}", "--set", f"storage.root=/data/{self.name}")
        container["args"] = [*container["args"], *places, *words]
        kubectl("apply", "-f", "-", text=yaml.safe_dump(manifest))

    @property
    def log(self) -> str:
        """What its pods have printed."""
        return kubectl("logs", "-l", f"job-name={self.job}", "--tail=-1", "--prefix", check=False)

    @property
    def step_log(self) -> str:
        """What its steps print, which goes to a file of the pod; empty before and after."""
        (pod, *_) = [*items("pods", f"job-name={self.job}"), {"metadata": {"name": "none"}}]
        words = ("cat", f"/tmp/runs/{self.name}/run.log")
        return kubectl("exec", pod["metadata"]["name"], "--", *words, check=False)

    def ended(self) -> str | None:
        """Complete or Failed, once it is."""
        status = json.loads(kubectl("get", "job", self.job, "-o", "json"))["status"]
        true = [one["type"] for one in status.get("conditions", []) if one["status"] == "True"]
        return next((kind for kind in true if kind in ("Complete", "Failed")), None)

    def end(self) -> str:
        """Complete or Failed."""
        return until(f"{self.job} has ended", RUN_S, self.ended)

    def training(self, state: str) -> Object:
        """Its PyTorchJob, once that has this condition."""

        def look() -> Object | None:
            for found in items("pytorchjobs", f"des/run={self.name}"):
                conditions = found.get("status", {}).get("conditions", [])
                if any(one["type"] == state and one["status"] == "True" for one in conditions):
                    return found
            assert self.ended() is None, f"{self.job} ended before its training was {state}:\n{self.log}"
            return None

        return until(f"the training of {self.name} is {state}", READY_S, look)

    def steps(self) -> None:
        """Wait until its workers train."""
        self.training("Running")
        until(f"{self.name} has trained a step", READY_S, lambda: re.search(r"event=step\b", self.worker_log()))

    def worker_log(self) -> str:
        """What the pods of its training have printed, as far as there are any."""
        return kubectl("logs", "-l", f"des/run={self.name},des/role=train", "--tail=-1", check=False)


@contextmanager
def forwarded(service: str, port: int) -> Iterator[str]:
    """The address of a Service on this machine."""
    command = ["kubectl", "--namespace", NAMESPACE, "port-forward", f"service/{service}", f":{port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        assert found, f"{' '.join(command)}: {line}"
        yield f"http://127.0.0.1:{found[1]}"
    finally:
        process.kill()
        process.communicate()


def ask_mlflow(call: str, **parameters: str) -> Any:
    with forwarded("mlflow", 5000) as address:
        url = f"{address}/api/2.0/mlflow/{call}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return json.load(answer)


def champion(name: str) -> Object:
    """The version that the alias points at, with its tags as a table."""
    version: Object = ask_mlflow("registered-models/alias", name=name, alias="champion")["model_version"]
    return version | {"tags": {tag["key"]: tag["value"] for tag in version.get("tags", [])}}


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The overlay ``kind`` with DES_IMAGE as its image."""
    folder = tmp_path_factory.mktemp("cluster") / "k8s"
    shutil.copytree(ROOT / "k8s", folder)
    page = folder / "overlays" / "kind" / "kustomization.yaml"
    plan = yaml.safe_load(page.read_text(encoding="utf-8"))
    name, _, tag = os.environ["DES_IMAGE"].rpartition(":")
    assert name and "/" not in tag and tag != "latest", "DES_IMAGE must be NAME:TAG, and its tag not latest"
    plan["images"][0] |= {"newName": name, "newTag": tag}
    page.write_text(yaml.safe_dump(plan), encoding="utf-8")
    return page.parent


@pytest.fixture(scope="module")
def like(overlay: Path) -> Iterator[Object]:
    """The Job ``des-run`` of the overlay, which is applied, and whose MLflow answers."""
    kubectl("delete", "job", "des-run", "--ignore-not-found", "--wait", check=False)
    kubectl("apply", "-k", str(overlay))
    kubectl("rollout", "status", "deployment/mlflow", f"--timeout={READY_S:.0f}s", timeout_s=READY_S + 30)
    (job,) = [found for found in render(overlay) if found["kind"] == "Job"]
    yield job
    jobs = [found["metadata"]["name"] for found in json.loads(kubectl("get", "jobs", "-o", "json"))["items"]]
    ours = [name for name in jobs if name.startswith("case-") and name.endswith(SUFFIX)]
    if ours:
        kubectl("delete", "job", *ours, "--wait=false")


@pytest.fixture(scope="module")
def first(like: Object) -> str:
    """The log of ``des-run``, which has ended well."""

    def ended() -> str | None:
        status = json.loads(kubectl("get", "job", "des-run", "-o", "json"))["status"]
        # SuccessCriteriaMet stands before Complete since Kubernetes 1.31.
        true = {one["type"] for one in status.get("conditions", []) if one["status"] == "True"}
        return next((kind for kind in ("Complete", "Failed") if kind in true), None)

    kind = until("des-run has ended", RUN_S, ended)
    log = kubectl("logs", "-l", "job-name=des-run", "--tail=-1")
    assert kind == "Complete", log
    return log


def test_run_once_makes_the_champion_that_a_laptop_makes(overlay: Path, first: str, tmp_path: Path) -> None:
    on_cluster = re.search(r"^test_auc=([\d.]+)", first, re.M)
    assert on_cluster, first
    changes = {
        "cluster.backend": "local",
        "run.dir": tmp_path,
        "storage.root": tmp_path,
        "registry.tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "pipelines.cli", "run", "-c", str(overlay / "config.toml"), "--json", *sets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=RUN_S)
    assert done.returncode == 0, done.stderr
    here = json.loads(done.stdout.splitlines()[-1])
    assert abs(float(on_cluster[1]) - here["auc"]) < 0.002
    assert champion("demo")["tags"]["des.run_key"] == here["run_key"]
    # Where the volume has the run from an earlier session, nothing is trained again.
    if "unchanged" not in first:
        (job,) = items("pytorchjobs", "des/run=demo,des/role=train")
        assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2


def test_serving_answers_with_the_champion(first: str, tmp_path: Path) -> None:
    kubectl("rollout", "status", "deployment/des-serving", f"--timeout={READY_S:.0f}s", timeout_s=READY_S + 30)
    words = ("generate", "--out", str(tmp_path), "--days", "1", "--rows-per-day", "50", "--seed", "1")
    subprocess.run([sys.executable, "-m", "pipelines.cli", *words], cwd=ROOT, check=True, capture_output=True)
    (log,) = tmp_path.glob("*.csv")
    with forwarded("des-serving", 8080) as address:
        headers = {"content-type": "text/csv"}
        request = urllib.request.Request(f"{address}/invocations", log.read_bytes(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            scores, version = json.load(answer)["predictions"], answer.headers["x-des-model-version"]
        with urllib.request.urlopen(f"{address}/ready", timeout=60) as answer:
            assert answer.status == 200
    assert len(scores) == 50 and all(0 < (one if isinstance(one, float) else max(one.values())) < 1 for one in scores)
    assert version == champion("demo")["version"]


def test_a_killed_worker_costs_an_attempt_and_no_more(like: Object) -> None:
    sizes = ("--set", "train.epochs=12", "--set", "train.patience=12", "--set", "train.checkpoint_steps=20")
    run = Run(like, "killed", *sizes, tries=2)
    run.steps()
    until("it has a checkpoint", READY_S, lambda: re.search(r"event=checkpoint\b", run.worker_log()))
    pods = items("pods", f"des/run={run.name},des/role=train")
    victim = next(pod["metadata"]["name"] for pod in pods if pod["metadata"]["name"].endswith("worker-1"))
    kubectl("exec", victim, "-c", "pytorch", "--", "python", "-c", KILL_A_WORKER)
    assert run.end() == "Complete", run.log
    assert "event=resume" in run.worker_log()
    assert champion(run.name)["version"] == "1", "a retry must find what was registered, not register again"


def test_too_little_memory_is_named(like: Object) -> None:
    run = Run(like, "hungry", "--set", "cluster.memory=160Mi", "--set", "train.worker_memory_mb=8192")
    assert run.end() == "Failed"
    assert re.search(r"error: .*OOMKilled", run.log), run.log


def test_a_cancelled_run_takes_its_job_along(like: Object) -> None:
    run = Run(like, "cancelled", "--set", "train.epochs=500", "--set", "train.patience=500")
    run.steps()
    kubectl("delete", "job", run.job, "--wait=false")
    selector = f"des/run={run.name}"
    until("its training job is gone", 180.0, lambda: None if items("pytorchjobs", selector) else True)
    until("its workers are gone", 180.0, lambda: None if items("pods", selector) else True)


@pytest.mark.parametrize(
    ("account", "verb", "what", "answer"),
    [
        (STEP_ACCOUNT, "create", "pytorchjobs.kubeflow.org", "yes"),
        (STEP_ACCOUNT, "get", "podtemplates", "yes"),
        (STEP_ACCOUNT, "get", "pods/log", "yes"),
        (STEP_ACCOUNT, "get", "secrets", "no"),
        (STEP_ACCOUNT, "create", "pods", "no"),
        (STEP_ACCOUNT, "create", "pods/exec", "no"),
        (WORKER_ACCOUNT, "create", "pytorchjobs.kubeflow.org", "no"),
        (WORKER_ACCOUNT, "list", "pods", "no"),
    ],
)
def test_accounts_may_do_what_they_need_and_no_more(
    like: Object, account: str, verb: str, what: str, answer: str
) -> None:
    resource, _, part = what.partition("/")
    words = ["auth", "can-i", verb, resource, f"--as={account}", *([f"--subresource={part}"] if part else [])]
    assert kubectl(*words, check=False).strip() == answer


def test_a_step_without_rights_says_so_in_one_line(like: Object, overlay: Path) -> None:
    kubectl("delete", "rolebinding", "des-trainer")
    try:
        run = Run(like, "denied")
        assert run.end() == "Failed"
        errors = [line for line in run.log.splitlines() if "error: " in line]
        assert errors and "forbidden" in errors[-1].lower() and "Traceback" not in run.log, run.log
    finally:
        (binding,) = [found for found in render(overlay) if found["kind"] == "RoleBinding"]
        kubectl("apply", "-f", "-", text=yaml.safe_dump(binding))


def test_a_suspended_job_waits_and_then_runs(like: Object) -> None:
    run = Run(like, "queued", "--set", "cluster.queue=nobody")
    run.training("Suspended")
    said = "waiting in queue nobody"
    until("the step says what it waits for", READY_S, lambda: said in run.step_log or said in run.log or None)
    assert not items("pods", f"des/run={run.name},des/role=train")

    # Kueue's part: it lets each job of the run go in turn.
    def let_go() -> str | None:
        for found in items("pytorchjobs", f"des/run={run.name}"):
            if found["spec"]["runPolicy"].get("suspend"):
                change = json.dumps({"spec": {"runPolicy": {"suspend": False}}})
                kubectl("patch", "pytorchjob", found["metadata"]["name"], "--type=merge", "-p", change)
        return run.ended()

    assert until(f"{run.job} has ended", RUN_S, let_go) == "Complete", run.log


def test_the_second_day_goes_on_from_the_first(like: Object) -> None:
    sizes = ("--set", "gate.max_auc_drop=1.0", "--set", "gate.min_auc=0.0")
    first = Run(like, "daily", "--as-of", "2026-01-01", *sizes, job="daily-1")
    assert first.end() == "Complete", first.log
    before = champion(first.name)
    second = Run(like, "daily", "--as-of", "2026-01-02", *sizes, job="daily-2")
    assert second.end() == "Complete", second.log
    after = champion(second.name)
    assert (before["version"], after["version"]) == ("1", "2")
    assert after["tags"]["des.parent_version"] == "1"
    assert after["tags"]["des.trained_through"] > before["tags"]["des.trained_through"]
    assert (before["tags"]["des.as_of"], after["tags"]["des.as_of"]) == ("2026-01-01", "2026-01-02")


def test_no_pod_of_ours_was_refused(first: str) -> None:
    """Pod Security ``restricted`` is enforced in the namespace, and nothing we make offends it."""
    labels = json.loads(kubectl("get", "namespace", NAMESPACE, "-o", "json"))["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert "violates PodSecurity" not in kubectl("get", "events", "-o", "json")
