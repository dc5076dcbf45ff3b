"""Ingestion as a RayJob: what is asked for, and the client's rules, which are those of every kind of job."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes import client

from des_core.errors import ConfigError, UserError
from k8s import jobs as module
from k8s.api import Api
from k8s.jobs import RIGHTS, Job, OperatorJobs
from k8s.manifest import DIGEST, render
from k8s.ray import RAY
from tests.k8s.api_stub import ApiStub, serving
from tests.k8s.test_jobs import STEP, Watching, claim, event, within
from tests.k8s.test_manifests import pod_faults

pytestmark = pytest.mark.filterwarnings("ignore:HTTPResponse.getheaders:DeprecationWarning")

COMPONENT = Path(__file__).parents[2] / "k8s" / "components" / "kuberay"
TEMPLATE: dict[str, Any] = yaml.safe_load((COMPONENT / "ray.yaml").read_text(encoding="utf-8"))
JOB = Job(
    name="shop-0123456789-ingest",
    image="ghcr.io/des/des-python:0.1.0",
    command=("python", "-m", "components.launch.ingest_job", "--config", "/data/a b.json", "--as-of", "all"),
    env={"PYTHONSAFEPATH": "1"},
    nodes=3,
    nproc_per_node=1,
    cpu="2",
    memory="4096Mi",
    gpus=0,
    deadline_s=600.0,
    labels={"des/run": "shop"},
)


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """The schema of an object with these keys and no others."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
POD = closed(["metadata", "spec"], metadata={"type": "object"}, spec={"type": "object"})
PARAMETERS = {"type": "object", "additionalProperties": TEXT}
GROUP = closed(
    ["groupName", "maxReplicas", "minReplicas", "template"],
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=PARAMETERS,
    template=POD,
    suspend={"type": "boolean"},
    numOfHosts=COUNT,
)
CLUSTER = closed(
    ["headGroupSpec"],
    headGroupSpec=closed(["template"], rayStartParams=PARAMETERS, template=POD, serviceType=TEXT),
    workerGroupSpecs={"type": "array", "items": GROUP},
    rayVersion=TEXT,
)
RAYJOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"type": "object", "properties": {"name": {"maxLength": 47}}},
    spec=closed(
        ["entrypoint"],
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        submitterPodTemplate=POD,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit=COUNT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        suspend={"type": "boolean"},
        rayClusterSpec=CLUSTER,
    ),
)
"""The keys of KubeRay's RayJob that are used here, with their types."""


@pytest.fixture
def api() -> Iterator[ApiStub]:
    """A namespace as an overlay with the component leaves it; every request is one that the Role grants."""
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
    return OperatorJobs(Api(client.Configuration(host=api.url), "des", pod), RAY)


def there(api: ApiStub) -> dict[str, Any]:
    return api.objects["rayjobs", JOB.name]


def templates(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = manifest["spec"]
    return {
        "head": spec["rayClusterSpec"]["headGroupSpec"]["template"],
        "worker": spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"],
        "submitter": spec["submitterPodTemplate"],
    }


# What is asked for.


@pytest.mark.parametrize("changes", [{}, {"queue": "users", "node": "node-7", "owner": ("step", "step-uid")}])
def test_the_job_is_one_of_kuberays_and_its_pods_are_valid_and_restricted(changes: dict[str, Any]) -> None:
    manifest = render(RAY, TEMPLATE, dataclasses.replace(JOB, namespace="des", **changes))
    jsonschema.validate(manifest, RAYJOB)
    for part, template in templates(manifest).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"} | template["metadata"]}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, "1.34", strict=True)
        assert pod_faults({"kind": "PodTemplate", "template": template}) == []
        labels = template["metadata"]["labels"]
        assert (labels["des/job"], labels["des/part"], labels["des/run"]) == (JOB.name, part, "shop")
    assert manifest["spec"].get("suspend", False) is bool(changes)


def test_an_unknown_key_is_no_rayjob() -> None:
    manifest = render(RAY, TEMPLATE, JOB)
    manifest["spec"]["entryPoint"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, RAYJOB)


def test_workers_do_the_tasks_and_the_head_none() -> None:
    manifest = render(RAY, TEMPLATE, JOB)
    spec = manifest["spec"]
    assert spec["entrypoint"] == "python -m components.launch.ingest_job --config '/data/a b.json' --as-of all"
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"], spec["activeDeadlineSeconds"]) == (0, True, 600)
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (3, 3, 3)
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    found = templates(manifest)
    for part in ("head", "worker"):
        container = found[part]["spec"]["containers"][0]
        assert "command" not in container and "args" not in container, "KubeRay writes them"
        assert (
            container["resources"]["limits"] == container["resources"]["requests"] == {"cpu": "2", "memory": "4096Mi"}
        )
        assert "wget" not in str(container) and container["livenessProbe"], "KubeRay adds its own where there are none"
    store = int(group["rayStartParams"]["object-store-memory"])
    shm = next(one for one in found["worker"]["spec"]["volumes"] if one["name"] == "shm")["emptyDir"]["sizeLimit"]
    assert store == 1024 << 20 and shm == "1088Mi", "the object store fits into /dev/shm"
    assert found["submitter"]["spec"]["restartPolicy"] == "Never"
    assert "livenessProbe" not in found["submitter"]["spec"]["containers"][0]


def test_a_template_without_our_container_is_refused() -> None:
    template = copy.deepcopy(TEMPLATE)
    template["template"]["spec"]["containers"][0]["name"] = "main"
    with pytest.raises(ConfigError, match=r"PodTemplate des-ray has no container named ray \(it has main\)"):
        render(RAY, template, JOB)


# Entry: the rules of every kind.


def test_it_is_created_adopted_and_made_again_once_it_has_ended(api: ApiStub) -> None:
    jobs_of(api).submit(JOB)
    jsonschema.validate({key: there(api)[key] for key in ("apiVersion", "kind", "metadata", "spec")}, RAYJOB)
    assert there(api)["metadata"]["ownerReferences"][0]["uid"] == "step-uid"
    uid = there(api)["metadata"]["uid"]
    api.put("pods", {"metadata": {"name": "second", "uid": "second-uid"}, "spec": {}, "status": {}})
    api.ray_status(JOB.name, jobDeploymentStatus="Running", jobStatus="RUNNING")
    jobs_of(api, "second").submit(JOB)
    assert there(api)["metadata"]["uid"] == uid and api.count("create", "rayjobs") == 1
    assert [owner["uid"] for owner in there(api)["metadata"]["ownerReferences"]] == ["second-uid"]
    api.ray_status(JOB.name, jobDeploymentStatus="Failed", jobStatus="FAILED")
    jobs_of(api).submit(JOB)
    assert there(api)["metadata"]["uid"] != uid
    jobs_of(api).submit(dataclasses.replace(JOB, nodes=9))
    assert there(api)["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 9
    assert there(api)["metadata"]["annotations"][DIGEST]
    jobs_of(api).delete(JOB)
    assert ("rayjobs", JOB.name) not in api.objects


def test_where_kuberay_is_not_installed_one_line_says_so(api: ApiStub) -> None:
    api.fail("create", "rayjobs", 404, "page not found")
    with pytest.raises(UserError, match=r"rayjobs\.ray\.io does not exist; install KubeRay .* k8s/components/kuberay"):
        jobs_of(api).submit(JOB)
    api.remove("podtemplates", "des-ray")
    with pytest.raises(UserError, match="podtemplates des-ray is not in namespace des; apply"):
        jobs_of(api).submit(JOB)


# The watch.


def test_states_follow_the_deployment_and_the_job(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    watching = Watching(jobs, JOB)
    within(60, lambda: watching.phases() == ["waiting"])
    api.ray_status(JOB.name, jobDeploymentStatus="Initializing")
    api.ray_status(JOB.name, jobDeploymentStatus="Running", jobStatus="PENDING")
    within(60, lambda: watching.phases() == ["waiting", "running"])
    api.ray_status(JOB.name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", message="Job finished.")
    assert watching.end().said == "SUCCEEDED: Job finished."
    assert watching.phases() == ["waiting", "running", "succeeded"]


def test_a_suspended_job_is_queued(api: ApiStub) -> None:
    job = dataclasses.replace(JOB, queue="users")
    jobs = jobs_of(api)
    jobs.submit(job)
    assert next(jobs.watch(job)).phase == "queued"
    api.ray_status(JOB.name, jobDeploymentStatus="Suspended")
    assert next(jobs.watch(job)).phase == "queued"


@pytest.mark.parametrize(
    ("status", "past_deadline"),
    [
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit 2"}, False),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, False),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too long"}, True),
    ],
)
def test_a_failed_job_comes_with_its_reason_and_its_pods(
    api: ApiStub, status: dict[str, str], past_deadline: bool
) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    end = {"terminated": {"reason": "Error", "exitCode": 1, "finishedAt": "2026-01-01T00:00:05Z", "message": "x"}}
    api.ray_pod(
        JOB.name, "submitter", {"phase": "Failed", "containerStatuses": [{"name": "ray", "state": end}]}, "s7k2p"
    )
    api.logs[f"{JOB.name}-s7k2p"] = ["2026-01-01T00:00:01Z event=error code=data message='logs.csv is empty'"]
    api.ray_status(JOB.name, **status)
    state = list(jobs.watch(JOB))[-1]
    assert (state.phase, state.past_deadline) == ("failed", past_deadline)
    assert [one.pod for one in state.fallen] == [f"{JOB.name}-s7k2p"]
    assert state.fallen[0].lines == ("event=error code=data message='logs.csv is empty'",)


def test_why_pods_do_not_start_is_told(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    api.ray_pod(JOB.name, "head", {"phase": "Running"})
    api.ray_pod(
        JOB.name, "worker", {"containerStatuses": [{"name": "ray", "image": "x:1", "state": waiting}]}, "worker-0"
    )
    trouble = next(jobs.watch(JOB)).trouble
    assert trouble is not None and trouble.lasting and "ImagePullBackOff" in str(trouble)
    for index in range(JOB.nodes):
        api.ray_pod(JOB.name, "worker", {"phase": "Running"}, f"worker-{index}")
    assert next(jobs.watch(JOB)).trouble is None
    api.put("events", event(there(api)["metadata"]["uid"], "FailedCreatePod", "pods x is forbidden: exceeded quota"))
    assert next(jobs.watch(JOB)).trouble is None, "all pods run"


# The log.


def test_the_youngest_submitters_lines_are_told_as_soon_as_there_is_one(api: ApiStub) -> None:
    jobs = jobs_of(api)
    jobs.submit(JOB)
    heard: list[str] = []
    ended = threading.Event()
    thread = threading.Thread(target=lambda: heard.extend(jobs.logs(JOB, ended)), daemon=True)
    thread.start()
    within(60, lambda: api.count("list", "pods") > 0)
    api.ray_pod(JOB.name, "submitter", {"phase": "Failed"}, "old")
    api.ray_pod(JOB.name, "submitter", {"phase": "Running"}, "new")
    api.logs[f"{JOB.name}-new"] = [f"2026-01-01T00:00:0{at}Z event=ingest rows={at}" for at in range(3)]
    within(60, lambda: api.count("get", "pods/log") > 0)
    api.ray_pod(JOB.name, "submitter", {"phase": "Succeeded"}, "new")
    ended.set()
    thread.join(20)
    assert heard == [f"event=ingest rows={at}" for at in range(3)]


def test_a_job_whose_submitter_never_came_has_no_log(api: ApiStub) -> None:
    ended = threading.Event()
    ended.set()
    assert list(jobs_of(api).logs(JOB, ended)) == []
