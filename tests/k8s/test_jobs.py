"""The cluster's client: the real kubernetes client against an API server in this process, with all its troubles."""

from __future__ import annotations

import copy
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubernetes import client

from des_core.errors import ConfigError, UserError, WorkerError
from k8s import jobs as module
from k8s.api import Api
from k8s.jobs import RIGHTS, Job, OperatorJobs, State, connect
from k8s.manifest import DIGEST
from k8s.manifest import render as render_any
from k8s.pytorch import PYTORCH
from tests.k8s.api_stub import ApiStub, serving

# kubernetes 30 asks urllib3 for an answer's headers the old way.
pytestmark = pytest.mark.filterwarnings("ignore:HTTPResponse.getheaders:DeprecationWarning")

TEMPLATE: dict[str, Any] = {
    "metadata": {"name": "des-worker", "namespace": "des"},
    "template": {
        "metadata": {"labels": {"app.kubernetes.io/part-of": "des"}, "creationTimestamp": None},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True},
            "containers": [
                {
                    "name": "pytorch",
                    "image": "set-by-the-job:0",
                    "args": ["none"],
                    "env": [{"name": "HOME", "value": "/scratch"}, {"name": "OMP_NUM_THREADS", "value": "9"}],
                    "resources": {"limits": {"ephemeral-storage": "1Gi"}},
                    "volumeMounts": [{"name": "storage", "mountPath": "/data"}],
                }
            ],
            "volumes": [{"name": "storage", "persistentVolumeClaim": {"claimName": "des-storage"}}],
        },
    },
}
JOB = Job(
    name="shop-0123456789",
    image="ghcr.io/des/des-python:0.1.0",
    command=("torchrun", "-m", "des_core.engine.trainer", "--config", "/data/inputs.json"),
    env={"OMP_NUM_THREADS": "1"},
    nodes=2,
    nproc_per_node=3,
    cpu="2",
    memory="4Gi",
    gpus=0,
    deadline_s=600.0,
    labels={"des/run": "shop"},
)
STEP = {"metadata": {"name": "step", "uid": "step-uid"}, "spec": {"nodeName": "node-7"}, "status": {}}


def render(template: dict[str, Any], job: Job) -> dict[str, Any]:
    return render_any(PYTORCH, template, job)


def claim(*modes: str) -> dict[str, Any]:
    return {"metadata": {"name": "des-storage"}, "spec": {"accessModes": list(modes)}}


@pytest.fixture
def api() -> Iterator[ApiStub]:
    """A namespace as an overlay leaves it, and this process's pod; every request is one that the Role grants."""
    with serving() as stub:
        stub.put("podtemplates", copy.deepcopy(TEMPLATE))
        stub.put("persistentvolumeclaims", claim("ReadWriteMany"))
        stub.put("pods", copy.deepcopy(STEP))
        yield stub
        granted = {(verb, resource) for group in RIGHTS.values() for resource, verbs in group.items() for verb in verbs}
        assert set(stub.asked) <= granted


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 1)


def jobs_of(api: ApiStub, pod: str = "step") -> OperatorJobs:
    return OperatorJobs(Api(client.Configuration(host=api.url), "des", pod))


def there(api: ApiStub) -> dict[str, Any]:
    return api.objects["pytorchjobs", JOB.name]


def within(seconds: float, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


class Watching:
    """A watch that goes on in a thread."""

    def __init__(self, jobs: OperatorJobs, job: Job = JOB) -> None:
        self.states: list[State] = []
        self._thread = threading.Thread(target=lambda: self.states.extend(self._all(jobs, job)), daemon=True)
        self._thread.start()

    def _all(self, jobs: OperatorJobs, job: Job) -> Iterator[State]:
        for state in jobs.watch(job):
            self.states.append(state)
        return
        yield

    def phases(self) -> list[str]:
        """Phases in order, each once."""
        seen = [state.phase for state in self.states]
        return [phase for at, phase in enumerate(seen) if at == 0 or seen[at - 1] != phase]

    def end(self) -> State:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.states[-1]


# What is asked for.


def test_a_job_is_worker_only_and_torchrun_finds_its_place() -> None:
    manifest = render(TEMPLATE, dataclasses.replace(JOB, namespace="des", owner=("step", "step-uid")))
    assert manifest["apiVersion"] == "kubeflow.org/v1"
    assert manifest["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Pod", "name": "step", "uid": "step-uid"}
    ]
    spec = manifest["spec"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    assert spec["nprocPerNode"] == "3"
    assert spec["runPolicy"] == {
        "cleanPodPolicy": "Running",
        "activeDeadlineSeconds": 600,
        "ttlSecondsAfterFinished": 86_400,
        "backoffLimit": 0,
    }
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert (worker["replicas"], worker["restartPolicy"]) == (2, "Never")
    container = worker["template"]["spec"]["containers"][0]
    env = {one["name"]: one.get("value") or one["valueFrom"]["fieldRef"]["fieldPath"] for one in container["env"]}
    assert env == {
        "HOME": "/scratch",
        "OMP_NUM_THREADS": "1",
        "POD_NAME": "metadata.name",
        "PET_MASTER_ADDR": "shop-0123456789-worker-0",
        "PET_MASTER_PORT": "29500",
        "PET_NODE_RANK": "metadata.labels['training.kubeflow.org/replica-index']",
    }
    assert container["command"] == list(JOB.command)
    assert "args" not in container
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "4Gi"},
        "limits": {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "1Gi"},
    }
    assert worker["template"]["spec"]["automountServiceAccountToken"] is False
    assert worker["template"]["metadata"]["labels"] == {"app.kubernetes.io/part-of": "des", "des/run": "shop"}


def test_pods_of_every_job_are_valid() -> None:
    for job in (JOB, dataclasses.replace(JOB, gpus=2, elastic=True, node="node-7", queue="users")):
        worker = render(TEMPLATE, job)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x"} | worker["metadata"],
            "spec": worker["spec"],
        }
        kubernetes_validate.validate(pod, "1.34", strict=True)


def test_a_template_is_not_changed_by_what_is_made_of_it() -> None:
    before = copy.deepcopy(TEMPLATE)
    render(TEMPLATE, dataclasses.replace(JOB, node="node-7"))
    assert before == TEMPLATE


def test_a_queue_suspends_and_elastic_pods_meet_by_rendezvous() -> None:
    queued = render(TEMPLATE, dataclasses.replace(JOB, queue="users"))
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "users"
    assert queued["spec"]["runPolicy"]["suspend"] is True
    elastic = render(TEMPLATE, dataclasses.replace(JOB, elastic=True))["spec"]
    assert elastic["elasticPolicy"] == {"rdzvBackend": "c10d", "minReplicas": 1, "maxReplicas": 2, "maxRestarts": 10}
    worker = elastic["pytorchReplicaSpecs"]["Worker"]
    assert worker["restartPolicy"] == "OnFailure"
    names = {one["name"] for one in worker["template"]["spec"]["containers"][0]["env"]}
    assert not names & {"PET_MASTER_ADDR", "PET_NODE_RANK"}


def test_the_digest_is_of_what_is_asked_not_of_who_asks_or_how_it_begins() -> None:
    def digest(**changes: Any) -> str:
        return str(render(TEMPLATE, dataclasses.replace(JOB, **changes))["metadata"]["annotations"][DIGEST])

    same = digest()
    assert digest(owner=("other", "uid"), node="node-8", flags=("--resume",)) == same
    for change in ({"image": "other:1"}, {"memory": "8Gi"}, {"nodes": 3}, {"command": ("torchrun",)}, {"queue": "q"}):
        assert digest(**change) != same


def test_one_node_is_added_to_every_alternative_of_the_templates_affinity() -> None:
    template = copy.deepcopy(TEMPLATE)
    terms = [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}, {"matchFields": []}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    template["template"]["spec"]["affinity"] = {"nodeAffinity": required}
    worker = render(template, dataclasses.replace(JOB, node="node-7"))["spec"]["pytorchReplicaSpecs"]["Worker"]
    held = worker["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    field = {"key": "metadata.name", "operator": "In", "values": ["node-7"]}
    assert [term["matchFields"] for term in held["nodeSelectorTerms"]] == [[field], [field]]
    assert held["nodeSelectorTerms"][0]["matchExpressions"] == terms[0]["matchExpressions"]


def test_a_template_without_our_container_is_refused() -> None:
    template = copy.deepcopy(TEMPLATE)
    template["template"]["spec"]["containers"][0]["name"] = "main"
    with pytest.raises(ConfigError, match=r"no container named pytorch \(it has main\)"):
        render(template, JOB)


# Entry.


def test_a_new_job_is_created_and_owned_by_this_pod(api: ApiStub) -> None:
    jobs_of(api).submit(JOB)
    assert there(api)["metadata"]["ownerReferences"][0]["uid"] == "step-uid"
    assert there(api)["metadata"]["namespace"] == "des"


def test_outside_a_cluster_nobody_owns_a_job(api: ApiStub) -> None:
    jobs_of(api, pod="").submit(JOB)
    assert "ownerReferences" not in there(api)["metadata"]


def test_an_active_job_of_the_same_digest_is_adopted_and_owned_anew(api: ApiStub) -> None:
    jobs_of(api).submit(JOB)
    uid = there(api)["metadata"]["uid"]
    there(api)["spec"]["runPolicy"]["suspend"] = False
    api.put("pods", {"metadata": {"name": "second", "uid": "second-uid"}, "spec": {}, "status": {}})
    jobs_of(api, pod="second").submit(dataclasses.replace(JOB, flags=("--resume",)))
    assert there(api)["metadata"]["uid"] == uid
    assert [owner["uid"] for owner in there(api)["metadata"]["ownerReferences"]] == ["second-uid"]
    assert api.count("create", "pytorchjobs") == 1


@pytest.mark.parametrize("condition", ["Failed", "Succeeded"])
def test_an_ended_job_is_deleted_and_created_again(api: ApiStub, condition: str) -> None:
    jobs_of(api).submit(JOB)
    uid = there(api)["metadata"]["uid"]
    api.condition(JOB.name, condition)
    api.gone_after_s = 0.3
    jobs_of(api).submit(JOB)
    assert there(api)["metadata"]["uid"] != uid


def test_a_job_of_another_digest_is_deleted_and_created_again(api: ApiStub) -> None:
    jobs_of(api).submit(JOB)
    jobs_of(api).submit(dataclasses.replace(JOB, memory="8Gi"))
    worker = there(api)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"]["memory"] == "8Gi"


def test_a_job_that_is_being_deleted_is_waited_for(api: ApiStub, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs_of(api).submit(JOB)
    uid = there(api)["metadata"]["uid"]
    there(api)["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    threading.Timer(0.5, api.remove, ("pytorchjobs", JOB.name)).start()
    jobs_of(api).submit(JOB)
    assert there(api)["metadata"]["uid"] != uid
    assert api.count("delete", "pytorchjobs") == 0
    there(api)["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    monkeypatch.setattr(module, "GONE_S", 0.5)
    with pytest.raises(WorkerError, match=r"still being deleted after .* finalizers"):
        jobs_of(api).submit(JOB)


def test_a_job_that_another_made_meanwhile_is_adopted(api: ApiStub) -> None:
    api.fail("create", "pytorchjobs", 409, after=True)
    jobs_of(api).submit(JOB)
    assert api.count("patch", "pytorchjobs") == 1
    api.fail("patch", "pytorchjobs", 409, "Precondition failed")
    jobs_of(api).submit(JOB)
    assert api.count("patch", "pytorchjobs") == 3


def test_a_server_in_trouble_is_asked_again_and_nothing_is_made_twice(api: ApiStub) -> None:
    api.fail("get", "podtemplates", 503, times=2)
    api.fail("get", "pytorchjobs", 0)
    api.fail("create", "pytorchjobs", 500, after=True)
    api.fail("patch", "pytorchjobs", 429)
    jobs_of(api).submit(JOB)
    assert len([key for key in api.objects if key[0] == "pytorchjobs"]) == 1


def test_a_server_that_stays_away_is_an_error(api: ApiStub, monkeypatch: pytest.MonkeyPatch) -> None:
    api.fail("delete", "pytorchjobs", 503, "overloaded", times=100)
    with pytest.raises(WorkerError, match=r"has not answered for 1 s: 503: overloaded"):
        jobs_of(api).delete(JOB, patience_s=1.0)


@pytest.mark.parametrize(
    ("verb", "resource"),
    [("create", "pytorchjobs"), ("get", "podtemplates"), ("get", "pods"), ("patch", "pytorchjobs")],
)
def test_a_missing_right_is_named(api: ApiStub, verb: str, resource: str) -> None:
    if verb == "patch":
        jobs_of(api).submit(JOB)
    api.fail(verb, resource, 403, f'User "system:serviceaccount:des:default" cannot {verb} resource "{resource}"')
    with pytest.raises(UserError, match=rf"refused to {verb} {resource} .403: .*grant verb {verb} on {resource}$"):
        jobs_of(api).submit(JOB)


def test_what_the_cluster_finds_wrong_is_told(api: ApiStub) -> None:
    api.fail("create", "pytorchjobs", 422, "spec.pytorchReplicaSpecs: Invalid value")
    with pytest.raises(UserError, match=r"refused to create pytorchjobs .422: spec\.pytorchReplicaSpecs: Invalid"):
        jobs_of(api).submit(JOB)
    api.fail("create", "pytorchjobs", 404, "page not found")
    with pytest.raises(UserError, match="install the Kubeflow training operator"):
        jobs_of(api).submit(JOB)
    api.remove("podtemplates", "des-worker")
    with pytest.raises(UserError, match="podtemplates des-worker is not in namespace des; apply"):
        jobs_of(api).submit(JOB)


def step_with_volume() -> dict[str, Any]:
    volumes = [{"name": "storage", "persistentVolumeClaim": {"claimName": "des-storage"}}]
    return STEP | {"spec": {"nodeName": "node-7", "volumes": volumes}}


def test_a_volume_of_one_node_holds_all_pods_on_the_steps_node(api: ApiStub) -> None:
    api.put("persistentvolumeclaims", claim("ReadWriteOnce"))
    api.put("pods", step_with_volume())
    jobs_of(api).submit(JOB)
    pod = there(api)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert required["nodeSelectorTerms"][0]["matchFields"][0]["values"] == ["node-7"]


def test_a_volume_that_not_all_pods_can_mount_is_refused_before_anything_is_made(api: ApiStub) -> None:
    api.put("persistentvolumeclaims", claim("ReadWriteOnce"))
    with pytest.raises(ConfigError, match=r"des-storage is ReadWriteOnce: one node alone .* cluster.nodes = 2;"):
        jobs_of(api, pod="").submit(JOB)
    jobs_of(api, pod="").submit(dataclasses.replace(JOB, nodes=1))
    api.put("persistentvolumeclaims", claim("ReadWriteOncePod"))
    api.put("pods", step_with_volume())
    with pytest.raises(ConfigError, match=r"ReadWriteOncePod: one pod alone"):
        jobs_of(api).submit(dataclasses.replace(JOB, nodes=1))
    api.remove("persistentvolumeclaims", "des-storage")
    with pytest.raises(UserError, match="persistentvolumeclaims des-storage is not in namespace des"):
        jobs_of(api).submit(JOB)
    assert api.count("create", "pytorchjobs") == 1


# The watch.


def running(api: ApiStub) -> tuple[OperatorJobs, Watching]:
    """A job that runs, and is watched."""
    jobs = jobs_of(api)
    jobs.submit(JOB)
    for index in range(JOB.nodes):
        api.pod(JOB.name, index, {"phase": "Running"})
    api.condition(JOB.name, "Running")
    watching = Watching(jobs)
    within(60, lambda: api.count("watch", "pytorchjobs") > 0)
    return jobs, watching


def test_states_follow_each_other_to_the_end(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    watching = Watching(jobs)
    within(60, lambda: watching.phases() == ["waiting"])
    api.condition(JOB.name, "Running")
    within(60, lambda: watching.phases() == ["waiting", "running"])
    api.condition(JOB.name, "Succeeded", "JobSucceeded", "all done")
    assert watching.end().said == "JobSucceeded: all done"
    assert watching.phases() == ["waiting", "running", "succeeded"]


def test_a_suspended_job_is_queued_until_it_is_resumed(api: ApiStub) -> None:
    jobs, job = jobs_of(api), dataclasses.replace(JOB, queue="users")
    jobs.submit(job)
    watching = Watching(jobs, job)
    within(60, lambda: watching.phases() == ["queued"])
    api.condition(JOB.name, "Suspended")
    resumed = copy.deepcopy(there(api))
    resumed["spec"]["runPolicy"]["suspend"] = False
    api.put("pytorchjobs", resumed)
    api.condition(JOB.name, "Running")
    api.condition(JOB.name, "Succeeded")
    watching.end()
    assert watching.phases() == ["queued", "running", "succeeded"]


def test_an_ended_job_is_seen_at_once(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    api.condition(JOB.name, "Succeeded")
    assert [state.phase for state in jobs.watch(JOB)] == ["succeeded"]
    assert api.count("watch", "pytorchjobs") == 0


def test_a_watch_survives_an_old_version(api: ApiStub) -> None:
    _, watching = running(api)
    lists = api.count("list", "pytorchjobs")
    api.horizon = 10**6
    api.cut()
    within(60, lambda: api.count("list", "pytorchjobs") > lists)
    api.horizon = 0
    api.condition(JOB.name, "Succeeded")
    assert watching.end().phase == "succeeded"


@pytest.mark.parametrize("status", [0, 410, 429, 500, 503])
def test_a_watch_survives_refusals(api: ApiStub, status: int) -> None:
    _, watching = running(api)
    watches = api.count("watch", "pytorchjobs")
    api.fail("watch", "pytorchjobs", status, times=2)
    api.fail("list", "pytorchjobs", 503)
    api.cut()
    within(60, lambda: api.count("watch", "pytorchjobs") >= watches + 3)
    api.condition(JOB.name, "Succeeded")
    assert watching.end().phase == "succeeded"
    assert watching.phases() == ["running", "succeeded"]


def test_a_watch_survives_cut_connections_and_loses_nothing(api: ApiStub) -> None:
    api.garble = True
    _, watching = running(api)
    for _ in range(3):
        watches = api.count("watch", "pytorchjobs")
        api.cut()
        within(60, lambda seen=watches: api.count("watch", "pytorchjobs") > seen)  # type: ignore[misc]
    with api.lock:
        api.cuts += 1
    api.condition(JOB.name, "Failed", "JobFailed", "it fell")
    assert watching.end().said == "JobFailed: it fell"


def test_a_watch_survives_its_own_end_and_looks_at_pods_meanwhile(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    watching = Watching(jobs)
    within(60, lambda: api.count("watch", "pytorchjobs") >= 3)
    api.pod(JOB.name, 0, unschedulable())
    within(60, lambda: watching.states[-1].trouble is not None)
    api.condition(JOB.name, "Succeeded")
    watching.end()


def test_a_lost_right_ends_the_watch_with_its_name(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    api.fail("watch", "pytorchjobs", 403, "cannot watch")
    with pytest.raises(UserError, match="grant verb watch on pytorchjobs"):
        list(jobs.watch(JOB))
    api.fail("list", "events", 403, "cannot list")
    with pytest.raises(UserError, match="grant verb list on events"):
        list(jobs.watch(JOB))


def test_a_deleted_job_has_failed(api: ApiStub) -> None:
    _, watching = running(api)
    api.remove("pytorchjobs", JOB.name)
    assert watching.end().phase == "deleted"


def test_a_job_deleted_while_nobody_looked_has_failed(api: ApiStub) -> None:
    _, watching = running(api)
    api.horizon = 10**6
    api.remove("pytorchjobs", JOB.name)
    api.put("pytorchjobs", render(TEMPLATE, JOB))
    api.horizon = 0
    assert watching.end().phase == "deleted"
    other = jobs_of(api)
    api.remove("pytorchjobs", JOB.name)
    assert [state.phase for state in other.watch(JOB)] == ["deleted"]


# What pods say.


def unschedulable() -> dict[str, Any]:
    said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: no memory"}
    return {"phase": "Pending", "conditions": [said]}


def waiting(reason: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": "Back-off pulling image"}}
    return {"phase": "Pending", "containerStatuses": [{"name": "pytorch", "image": "x:1", "state": state}]}


@pytest.mark.parametrize(
    ("status", "told", "lasting"),
    [
        (unschedulable(), r"Unschedulable: shop-0123456789-worker-1: 0/1 nodes: no memory", False),
        (waiting("ImagePullBackOff"), r"ImagePullBackOff: shop-0123456789-worker-1 \(x:1\): Back-off .*", True),
        (waiting("CreateContainerConfigError"), r"CreateContainerConfigError: .*", True),
    ],
)
def test_why_a_pod_does_not_start_is_told(api: ApiStub, status: dict[str, Any], told: str, lasting: bool) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    api.pod(JOB.name, 0, {"phase": "Running"})
    api.pod(JOB.name, 1, status)
    api.condition(JOB.name, "Running")
    state = next(jobs.watch(JOB))
    assert state.trouble is not None
    assert re.fullmatch(told, str(state.trouble)), state.trouble
    assert state.trouble.lasting is lasting


def event(uid: str, reason: str, message: str) -> dict[str, Any]:
    name = f"event-{time.monotonic_ns()}"
    involved = {"uid": uid, "name": "x"}
    return {
        "metadata": {"name": name},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "involvedObject": involved,
    }


@pytest.mark.parametrize(
    ("reason", "message", "told", "lasting"),
    [
        ("FailedCreatePod", "pods x is forbidden: exceeded quota: cpus", "quota exceeded: pods x is .*", False),
        ("FailedCreatePod", "pods x is forbidden: violates PodSecurity", "FailedCreatePod: .*PodSecurity", True),
        ("FailedMount", "timed out waiting for the volume", "FailedMount: timed out.*", False),
    ],
)
def test_why_there_are_no_pods_is_told(api: ApiStub, reason: str, message: str, told: str, lasting: bool) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    api.put("events", event("another's", "FailedCreatePod", "pods y is forbidden: none of ours"))
    assert next(jobs.watch(JOB)).trouble is None
    api.put("events", event(there(api)["metadata"]["uid"], reason, message))
    trouble = next(jobs.watch(JOB)).trouble
    assert trouble is not None
    assert re.fullmatch(told, str(trouble))
    assert trouble.lasting is lasting
    if reason == "FailedCreatePod":
        for index in range(JOB.nodes):
            api.pod(JOB.name, index, {"phase": "Pending"})
        assert next(jobs.watch(JOB)).trouble is None, "pods came after all"


def terminated(reason: str, code: int, at: str) -> dict[str, Any]:
    end = {"terminated": {"reason": reason, "exitCode": code, "finishedAt": at, "message": "from the status"}}
    return {"phase": "Failed", "containerStatuses": [{"name": "pytorch", "state": end}]}


def test_fallen_pods_come_with_their_reasons_and_last_lines_first_fallen_first(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    api.pod(JOB.name, 0, terminated("Error", 1, "2026-01-01T00:00:09Z"))
    api.pod(JOB.name, 1, terminated("OOMKilled", 137, "2026-01-01T00:00:05Z"))
    api.logs[f"{JOB.name}-worker-0"] = [f"2026-01-01T00:00:0{at}Z line {at}" for at in range(9)]
    api.fail("get", "pods/log", 500)
    api.condition(JOB.name, "Failed", "JobFailed", "Worker failed")
    state = list(jobs.watch(JOB))[-1]
    first, second = state.fallen
    assert (first.pod, first.reason, first.code) == (f"{JOB.name}-worker-1", "OOMKilled", 137)
    assert first.lines == ("from the status",), "its log was not to be had"
    assert second.lines[-1] == "line 8"


def test_an_evicted_pod_is_told_from_one_that_failed(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    api.pod(JOB.name, 0, {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory"})
    target = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempted"}
    api.pod(JOB.name, 1, {"phase": "Failed", "conditions": [target]})
    api.condition(JOB.name, "Failed")
    fell = list(jobs.watch(JOB))[-1].fallen
    assert {one.reason for one in fell} == {"Evicted", "PreemptionByScheduler"}


# The log.


def test_every_line_of_worker_0_is_told_once_across_cut_connections(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    pod, heard, ended = f"{JOB.name}-worker-0", [], threading.Event()
    thread = threading.Thread(target=lambda: heard.extend(jobs.logs(JOB, ended)), daemon=True)
    thread.start()
    within(60, lambda: api.count("get", "pods/log") > 0)
    api.pod(JOB.name, 0, {"phase": "Pending"})
    within(60, lambda: api.count("get", "pods/log") > 1)
    api.pod(JOB.name, 0, {"phase": "Running"})
    lines = api.logs.setdefault(pod, [])
    for at in range(60):
        lines.append(f"2026-01-01T00:00:{at:02d}.{'5' if at % 2 else '25'}Z line {at}")
        if at % 20 == 10:
            time.sleep(0.1)
            api.cut()
        time.sleep(0.005)
    api.pod(JOB.name, 0, {"phase": "Succeeded"})
    lines.append("2026-01-01T00:01:00Z the last one")
    ended.set()
    thread.join(10)
    assert heard == [*(f"line {at}" for at in range(60)), "the last one"]


def test_a_log_that_may_not_be_read_is_said_and_no_failure(api: ApiStub) -> None:
    api.fail("get", "pods/log", 403, "cannot get pods/log")
    assert list(jobs_of(api).logs(JOB, threading.Event())) == [
        "the log of shop-0123456789-worker-0 cannot be read: 403: cannot get pods/log"
    ]


# The way there.


def test_a_kubeconfig_leads_to_its_contexts_namespace(
    api: ApiStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(ConfigError, match=r"needs a cluster, and there is none here .* set KUBECONFIG"):
        connect()
    (tmp_path / "config").write_text(
        f"""
apiVersion: v1
kind: Config
current-context: here
clusters: [{{name: one, cluster: {{server: "{api.url}"}}}}]
users: [{{name: me, user: {{token: secret}}}}]
contexts: [{{name: here, context: {{cluster: one, user: me, namespace: des}}}}]
"""
    )
    connect().submit(JOB)
    assert "ownerReferences" not in there(api)["metadata"]
