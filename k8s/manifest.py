"""A training job as Kubernetes takes it: a Worker-only PyTorchJob (kubeflow.org/v1).

    PodTemplate (security, volumes, tolerations; an overlay's to patch) + Job (image, command, size, time) -> manifest

There is no Master replica, because for one the operator adds an init container that Pod Security ``restricted``
refuses. The operator sets PET_NNODES and PET_NPROC_PER_NODE; we add where the workers meet, and torchrun reads PET_*.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from des_core.errors import ConfigError

GROUP, VERSION, PLURAL, KIND = "kubeflow.org", "v1", "pytorchjobs", "PyTorchJob"
CONTAINER = "pytorch"
"""The operator looks for a container of this name."""
INDEX_LABEL = "training.kubeflow.org/replica-index"
JOB_LABEL = "training.kubeflow.org/job-name"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
DIGEST = "des/spec-digest"
"""Annotation: sha256 of all that was asked for."""
PORT = 29500
MAX_RESTARTS = 10
"""Of an elastic job's pods and workers."""
KEPT_S = 86_400
"""How long a finished job, with its pods' logs, can be looked at."""


@dataclass(frozen=True)
class Job:
    """What a run asks of the cluster. The last three the cluster's client fills in: they are no part of the digest."""

    name: str
    image: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    nodes: int
    nproc_per_node: int
    cpu: str
    memory: str
    gpus: int
    deadline_s: float
    queue: str = ""
    elastic: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    """At the command's end; they say how to begin, not what to do, and are no part of the digest either."""
    namespace: str = ""
    owner: tuple[str, str] = ("", "")
    """Name and uid of the pod that the job dies with; empty: none."""
    node: str = ""
    """The one node that can mount the job's volume; empty: any."""


def render(template: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The job's whole manifest, with its digest.

    Raises:
        ConfigError: the template has no container named ``pytorch``.
    """
    manifest = _manifest(template, job)
    asked = _manifest(template, replace(job, flags=(), owner=("", ""), node=""))
    text = json.dumps(asked, sort_keys=True)
    manifest["metadata"]["annotations"] = {DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    return manifest


def owners(owner: tuple[str, str]) -> list[dict[str, Any]]:
    """The metadata's ``ownerReferences``."""
    name, uid = owner
    return [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}] if uid else []


def _manifest(template: Mapping[str, Any], job: Job) -> dict[str, Any]:
    labels = dict(job.labels)
    policy = {
        "cleanPodPolicy": "Running",
        "activeDeadlineSeconds": max(1, int(job.deadline_s)),
        "ttlSecondsAfterFinished": KEPT_S,
        "backoffLimit": MAX_RESTARTS if job.elastic else 0,
    }
    worker = {
        "replicas": job.nodes,
        # A worker that is lost ends the job: the step's next attempt goes on from the last checkpoint.
        "restartPolicy": "OnFailure" if job.elastic else "Never",
        "template": _pod(template, job),
    }
    spec: dict[str, Any] = {
        "nprocPerNode": str(job.nproc_per_node),
        "runPolicy": policy | ({"suspend": True} if job.queue else {}),
        "pytorchReplicaSpecs": {"Worker": worker},
    }
    if job.elastic:
        spec["elasticPolicy"] = {
            "rdzvBackend": "c10d",
            "minReplicas": 1,
            "maxReplicas": job.nodes,
            "maxRestarts": MAX_RESTARTS,
        }
    metadata: dict[str, Any] = {
        "name": job.name,
        "namespace": job.namespace,
        "labels": labels | ({QUEUE_LABEL: job.queue} if job.queue else {}),
    }
    if owners(job.owner):
        metadata["ownerReferences"] = owners(job.owner)
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "metadata": metadata, "spec": spec}


def _pod(template: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The template's pod with this job's container, labels and node."""
    pod: dict[str, Any] = copy.deepcopy(dict(template["template"]))
    # The API server fills in a default, which the operator would complain of.
    pod["spec"].pop("restartPolicy", None)
    metadata = pod.setdefault("metadata", {})
    metadata.pop("creationTimestamp", None)
    metadata["labels"] = metadata.get("labels", {}) | dict(job.labels)
    containers = [container for container in pod["spec"]["containers"] if container["name"] == CONTAINER]
    if not containers:
        names = ", ".join(container["name"] for container in pod["spec"]["containers"])
        raise ConfigError(f"PodTemplate des-worker has no container named {CONTAINER} (it has {names}); rename it")
    container = containers[0]
    ours = _environment(job)
    kept = [variable for variable in container.get("env", []) if variable["name"] not in {one["name"] for one in ours}]
    size = {"cpu": job.cpu, "memory": job.memory} | ({"nvidia.com/gpu": str(job.gpus)} if job.gpus else {})
    resources = container.get("resources", {})
    container |= {
        "image": job.image,
        "command": [*job.command, *job.flags],
        "env": [*kept, *ours],
        "resources": resources
        | {"requests": resources.get("requests", {}) | size, "limits": resources.get("limits", {}) | size},
        # A pod's last words are then in its status, even where its log is gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    container.pop("args", None)
    if job.node:
        _hold(pod["spec"], job.node)
    return pod


def _environment(job: Job) -> list[dict[str, Any]]:
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in sorted(job.env.items())]
    variables.append(_from_field("POD_NAME", "metadata.name"))
    if not job.elastic:
        # The operator's RANK is the pod's index, and without a Master it names no place to meet.
        variables += [
            {"name": "PET_MASTER_ADDR", "value": f"{job.name}-worker-0"},
            {"name": "PET_MASTER_PORT", "value": str(PORT)},
            _from_field("PET_NODE_RANK", f"metadata.labels['{INDEX_LABEL}']"),
        ]
    return variables


def _from_field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _hold(spec: dict[str, Any], node: str) -> None:
    """Bind the pods to one node; terms of an affinity are alternatives, so each of them gets the condition."""
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {}).setdefault(required, {})
    terms = affinity.setdefault("nodeSelectorTerms", [{}])
    for term in terms:
        match = {"key": "metadata.name", "operator": "In", "values": [node]}
        term["matchFields"] = [*term.get("matchFields", []), match]
