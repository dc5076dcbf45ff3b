"""Ingestion on a Ray cluster of its own, as a RayJob (ray.io/v1) of KubeRay.

    head       Ray's control processes and the entrypoint, which plans and merges; it runs no tasks
    workers    the tasks
    submitter  a pod that submits the entrypoint, then prints its log: ours to follow

KubeRay writes the commands of all three; Ray sets RAY_ADDRESS for the entrypoint. The pods' probes are those of the
PodTemplate: KubeRay's own need wget. The Ray cluster is deleted soon after the job has ended, the submitter's pod with
the log stays as long as the job.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from k8s.manifest import Job, Phase, metadata_of, pod_of

JOB_LABEL, PART_LABEL = "des/job", "des/part"
"""On every pod: the job's name, and head, worker or submitter."""
SHUTDOWN_S = 60
"""Seconds for which the Ray cluster outlives its job, so that a failed pod can still be looked at."""
SUBMITTER_SIZE = {"cpu": "500m", "memory": "512Mi"}
STORE_SHARE = 4
"""One part in so many of a pod's memory is for Ray's object store, in /dev/shm."""
SHM = "shm"
"""Volume of the PodTemplate that is mounted there."""
PHASES: dict[str, Phase] = {
    "Complete": "succeeded",
    "Failed": "failed",
    "ValidationFailed": "failed",
    "Suspending": "queued",
    "Suspended": "queued",
    "Running": "running",
}
"""By ``status.jobDeploymentStatus``; any other one waits."""


class RayKind:
    """``Kind`` of KubeRay."""

    group, version, plural = "ray.io", "v1", "rayjobs"
    template, container = "des-ray", "ray"
    operator = "KubeRay (its RayJob), add k8s/components/kuberay to the overlay"

    def manifest(self, template: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """As ``Kind``; ``job.memory`` is in whole Mi."""
        size = {"cpu": job.cpu, "memory": job.memory}
        store_mb = int(job.memory.removesuffix("Mi")) // STORE_SHARE
        started = {"object-store-memory": str(store_mb << 20)}
        submitter = self._pod(template, job, "submitter", SUBMITTER_SIZE, 64)
        submitter["spec"]["restartPolicy"] = "Never"
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            # The submitter is no node of Ray.
            submitter["spec"]["containers"][0].pop(probe, None)
        worker_group = {
            "groupName": "workers",
            "replicas": job.nodes,
            "minReplicas": job.nodes,
            "maxReplicas": job.nodes,
            "rayStartParams": started,
            "template": self._pod(template, job, "worker", size, store_mb),
        }
        spec: dict[str, Any] = {
            "entrypoint": shlex.join([*job.command, *job.flags]),
            "submissionMode": "K8sJobMode",
            "submitterPodTemplate": submitter,
            "activeDeadlineSeconds": max(1, int(job.deadline_s)),
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": SHUTDOWN_S,
            "rayClusterSpec": {
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", **started},
                    "template": self._pod(template, job, "head", size, store_mb),
                },
                "workerGroupSpecs": [worker_group],
            },
        }
        if job.queue:
            spec["suspend"] = True
        api_version = f"{self.group}/{self.version}"
        return {"apiVersion": api_version, "kind": "RayJob", "metadata": metadata_of(job), "spec": spec}

    def _pod(
        self, template: Mapping[str, Any], job: Job, part: str, size: Mapping[str, str], shm_mb: int
    ) -> dict[str, Any]:
        pod = pod_of(template, job, self.container, [], size)
        pod["metadata"]["labels"] |= {JOB_LABEL: job.name, PART_LABEL: part}
        for volume in pod["spec"].get("volumes", []):
            if volume["name"] == SHM:
                # What is written there counts as the pod's memory.
                volume["emptyDir"]["sizeLimit"] = f"{shm_mb + 64}Mi"
        return pod

    def phase(self, present: Mapping[str, Any]) -> Phase:
        """As ``Kind``."""
        status = present.get("status") or {}
        deployment = status.get("jobDeploymentStatus", "")
        if deployment == "Complete" and status.get("jobStatus") in ("FAILED", "STOPPED"):
            return "failed"
        if deployment not in PHASES and present["spec"].get("suspend"):
            return "queued"
        return PHASES.get(deployment, "waiting")

    def end_message(self, present: Mapping[str, Any]) -> str:
        """As ``Kind``."""
        status = present.get("status") or {}
        if self.phase(present) not in ("failed", "succeeded"):
            return ""
        return f"{status.get('reason') or status.get('jobStatus', '')}: {status.get('message', '')}"

    def pods(self, job: Job) -> int:
        """As ``Kind``: the head and the workers; the submitter comes when they run."""
        return 1 + job.nodes

    def selector(self, job: Job) -> str:
        """As ``Kind``."""
        return f"{JOB_LABEL}={job.name}"

    def log_pod(self, job: Job) -> str:
        """As ``Kind``: the submitter's name is drawn by Kubernetes."""
        return ""

    def log_selector(self, job: Job) -> str:
        """As ``Kind``."""
        return f"{JOB_LABEL}={job.name},{PART_LABEL}=submitter"


RAY = RayKind()
