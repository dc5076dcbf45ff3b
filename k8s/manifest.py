"""A job as Kubernetes takes it, of any kind: what was asked for, the pods made of a PodTemplate, the digest of both.

    PodTemplate (security, volumes, tolerations; overlays patch it) + Job (image, command, size, time) -> manifest

What the kinds differ in is in pytorch.py and ray.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from des_core.errors import ConfigError

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
DIGEST = "des/spec-digest"
"""Annotation: sha256 of all that was asked for."""
KEPT_S = 86_400
"""Seconds for which a finished job and its pods' logs are kept."""

Phase = Literal["queued", "waiting", "running", "succeeded", "failed", "deleted"]


@dataclass(frozen=True)
class Job:
    """What a run asks of the cluster. The client fills in the last three, which are no part of the digest."""

    name: str
    image: str
    command: tuple[str, ...]
    env: Mapping[str, str]
    nodes: int
    """Pods that compute."""
    nproc_per_node: int
    cpu: str
    memory: str
    gpus: int
    deadline_s: float
    queue: str = ""
    elastic: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    """Appended to the command; they say how to begin, not what to do, and the digest leaves them out too."""
    namespace: str = ""
    owner: tuple[str, str] = ("", "")
    """Name and uid of the pod with which the job is deleted; empty: none."""
    node: str = ""
    """The only node that can mount the job's volume; empty: any node."""


class Kind(Protocol):
    """A custom resource of an operator, and how its states are read."""

    group: str
    version: str
    plural: str
    template: str
    """Name of the PodTemplate that its pods are made of."""
    container: str
    """Name of the container in it."""
    operator: str
    """What must be installed."""

    def manifest(self, template: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """The job's manifest without its digest."""

    def phase(self, present: Mapping[str, Any]) -> Phase:
        """The phase that an object shows."""

    def end_message(self, present: Mapping[str, Any]) -> str:
        """``REASON: MESSAGE`` of an ended job."""

    def pods(self, job: Job) -> int:
        """How many pods run when all do."""

    def selector(self, job: Job) -> str:
        """Label selector of the job's pods."""

    def log_pod(self, job: Job) -> str:
        """Name of the pod whose log reports progress; empty: the youngest one of ``log_selector``."""

    def log_selector(self, job: Job) -> str:
        """Label selector of that pod."""


def render(kind: Kind, template: Mapping[str, Any], job: Job) -> dict[str, Any]:
    """The job's whole manifest, with its digest.

    Raises:
        ConfigError: the template has no container of the name that the operator expects.
    """
    manifest = kind.manifest(template, job)
    asked = kind.manifest(template, replace(job, flags=(), owner=("", ""), node=""))
    text = json.dumps(asked, sort_keys=True)
    manifest["metadata"]["annotations"] = {DIGEST: hashlib.sha256(text.encode()).hexdigest()}
    return manifest


def owners(owner: tuple[str, str]) -> list[dict[str, Any]]:
    """The metadata's ``ownerReferences``."""
    name, uid = owner
    return [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}] if uid else []


def metadata_of(job: Job) -> dict[str, Any]:
    """The job's metadata."""
    metadata: dict[str, Any] = {
        "name": job.name,
        "namespace": job.namespace,
        "labels": dict(job.labels) | ({QUEUE_LABEL: job.queue} if job.queue else {}),
    }
    return metadata | ({"ownerReferences": owners(job.owner)} if owners(job.owner) else {})


def pod_of(
    template: Mapping[str, Any],
    job: Job,
    container_name: str,
    command: Sequence[str],
    size: Mapping[str, str],
    more: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The template's pod with the job's labels and node, and its container with image, command, size and variables.

    Args:
        command: empty where the operator writes it.
        more: variables beside the job's.
    """
    pod: dict[str, Any] = copy.deepcopy(dict(template["template"]))
    # The API server fills in a default, which the operator would complain of.
    pod["spec"].pop("restartPolicy", None)
    metadata = pod.setdefault("metadata", {})
    metadata.pop("creationTimestamp", None)
    metadata["labels"] = metadata.get("labels", {}) | dict(job.labels)
    containers = [container for container in pod["spec"]["containers"] if container["name"] == container_name]
    if not containers:
        names = ", ".join(container["name"] for container in pod["spec"]["containers"])
        template_name = template.get("metadata", {}).get("name", "")
        raise ConfigError(
            f"PodTemplate {template_name} has no container named {container_name} (it has {names}); rename it"
        )
    container = containers[0]
    ours = [*({"name": name, "value": value} for name, value in sorted(job.env.items())), *more]
    kept = [variable for variable in container.get("env", []) if variable["name"] not in {one["name"] for one in ours}]
    resources = container.get("resources", {})
    container |= {
        "image": job.image,
        "env": [*kept, *ours],
        "resources": resources
        | {"requests": resources.get("requests", {}) | size, "limits": resources.get("limits", {}) | size},
        # The last lines of a failed pod are then in its status, even where its log is gone.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    for key in ("command", "args"):
        container.pop(key, None)
    if command:
        container["command"] = [*command]
    if job.node:
        _bind(pod["spec"], job.node)
    return pod


def from_field(name: str, path: str) -> dict[str, Any]:
    """A variable with the value of one of the pod's own fields."""
    return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}


def _bind(spec: dict[str, Any], node: str) -> None:
    """Bind the pods to one node; the terms of an affinity are alternatives, so each of them gets the condition."""
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {}).setdefault(required, {})
    terms = affinity.setdefault("nodeSelectorTerms", [{}])
    for term in terms:
        match = {"key": "metadata.name", "operator": "In", "values": [node]}
        term["matchFields"] = [*term.get("matchFields", []), match]
