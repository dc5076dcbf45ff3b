"""Training and scoring workers as a PyTorchJob (kubeflow.org/v1) without a Master.

A Master replica would make the operator add an init container that Pod Security ``restricted`` refuses. The operator
sets PET_NNODES and PET_NPROC_PER_NODE; we add the address at which workers meet, and torchrun reads PET_*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from k8s.manifest import KEPT_S, Job, Phase, from_field, metadata_of, pod_of

INDEX_LABEL = "training.kubeflow.org/replica-index"
JOB_LABEL = "training.kubeflow.org/job-name"
PORT = 29500
MAX_RESTARTS = 10
"""Of an elastic job's pods and workers."""


class PyTorchKind:
    """``Kind`` of the Kubeflow training operator."""

    group, version, plural = "kubeflow.org", "v1", "pytorchjobs"
    template, container = "des-worker", "pytorch"
    operator = "the Kubeflow training operator"

    def manifest(self, template: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """As ``Kind``."""
        policy = {
            "cleanPodPolicy": "Running",
            "activeDeadlineSeconds": max(1, int(job.deadline_s)),
            "ttlSecondsAfterFinished": KEPT_S,
            "backoffLimit": MAX_RESTARTS if job.elastic else 0,
        }
        size = {"cpu": job.cpu, "memory": job.memory} | ({"nvidia.com/gpu": str(job.gpus)} if job.gpus else {})
        worker = {
            "replicas": job.nodes,
            # A worker that is lost ends the job: the step's next attempt goes on from the last checkpoint.
            "restartPolicy": "OnFailure" if job.elastic else "Never",
            "template": pod_of(template, job, self.container, [*job.command, *job.flags], size, _meeting_place(job)),
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
        api_version = f"{self.group}/{self.version}"
        return {"apiVersion": api_version, "kind": "PyTorchJob", "metadata": metadata_of(job), "spec": spec}

    def phase(self, present: Mapping[str, Any]) -> Phase:
        """As ``Kind``."""
        status = present.get("status") or {}
        true = {one["type"] for one in status.get("conditions") or [] if one["status"] == "True"}
        if "Failed" in true:
            return "failed"
        if "Succeeded" in true:
            return "succeeded"
        if present["spec"].get("runPolicy", {}).get("suspend") or "Suspended" in true:
            return "queued"
        return "running" if "Running" in true else "waiting"

    def end_message(self, present: Mapping[str, Any]) -> str:
        """As ``Kind``."""
        conditions = (present.get("status") or {}).get("conditions") or []
        ends = [one for one in conditions if one["type"] in ("Failed", "Succeeded") and one["status"] == "True"]
        return next((f"{one.get('reason', '')}: {one.get('message', '')}" for one in ends), "")

    def pods(self, job: Job) -> int:
        """As ``Kind``."""
        return job.nodes

    def selector(self, job: Job) -> str:
        """As ``Kind``."""
        return f"{JOB_LABEL}={job.name}"

    def log_pod(self, job: Job) -> str:
        """As ``Kind``: worker 0."""
        return f"{job.name}-worker-0"

    def log_selector(self, job: Job) -> str:
        """As ``Kind``."""
        return f"{self.selector(job)},{INDEX_LABEL}=0"


PYTORCH = PyTorchKind()


def _meeting_place(job: Job) -> list[dict[str, Any]]:
    """Variables by which torchrun finds the other pods; an elastic job gets them from the operator."""
    variables = [from_field("POD_NAME", "metadata.name")]
    if not job.elastic:
        # The operator's RANK is the pod's index, and without a Master it names no address to meet at.
        variables += [
            {"name": "PET_MASTER_ADDR", "value": f"{job.name}-worker-0"},
            {"name": "PET_MASTER_PORT", "value": str(PORT)},
            from_field("PET_NODE_RANK", f"metadata.labels['{INDEX_LABEL}']"),
        ]
    return variables
