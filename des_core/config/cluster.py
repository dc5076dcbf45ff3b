"""Where workers run: [cluster]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from des_core.config.section import Positive, Section

UNITS = {"": 1, "k": 1000}
UNITS |= {f"{letter}i": 1024 ** (power + 1) for power, letter in enumerate("KMGT")}
UNITS |= {letter: 1000 ** (power + 2) for power, letter in enumerate("MGT")}
"""Bytes by the suffix that Kubernetes writes."""

LAUNCHER_BYTES = 230 << 20
"""Of torchrun, once in each pod beside its workers."""


class ClusterConfig(Section):
    """Where workers run."""

    backend: Literal["local", "pytorchjob"] = Field("local", description="Local processes, or a PyTorchJob.")
    image: str = Field("", description="Image of steps and workers; empty: the environment's DES_IMAGE.")
    nodes: int = Field(1, ge=1, description="Pods of the job.")
    nproc_per_node: int = Field(1, ge=1, description="Workers in each pod.")
    cpu: str = Field("1", pattern=r"^(\d+(\.\d+)?|\d+m)$", description="CPUs of each pod, as Kubernetes writes them.")
    memory: str = Field(
        "",
        pattern=r"^(\d+(\.\d+)?([KMGT]i|[kMGT])?)?$",
        description="Memory of each pod, as Kubernetes writes it; empty: what des plan predicts for its workers and a "
        "quarter more, and 4Gi for the pods of Kubeflow's steps.",
    )
    gpus: int = Field(0, ge=0, description="GPUs (nvidia.com/gpu) of each pod.")
    queue: str = Field("", description="Kueue's local queue; empty: none.")
    queue_timeout_s: Positive = Field(3600.0, description="Seconds a job may wait in its queue.")
    deadline_s: Positive = Field(86_400.0, description="Seconds a job may run.")
    elastic: bool = Field(False, description="Pods may leave and join; training goes on from the last checkpoint.")

    @property
    def memory_bytes(self) -> float:
        """``memory`` in bytes, 0 where it is empty."""
        number = self.memory.rstrip("KMGTki")
        return float(number or 0) * UNITS[self.memory[len(number) :]]

    @field_validator("cpu", mode="before")
    @classmethod
    def _cpus_may_be_a_number(cls, cpu: Any) -> Any:
        return str(cpu) if isinstance(cpu, int | float) and not isinstance(cpu, bool) else cpu


def worker_limit(worker_memory_mb: int, cluster: ClusterConfig) -> tuple[float, str]:
    """Bytes that the config lets one worker have, and the key that says so; 0: none does."""
    if worker_memory_mb:
        return float(worker_memory_mb << 20), f"train.worker_memory_mb = {worker_memory_mb}"
    if cluster.backend == "pytorchjob" and cluster.memory:
        shared = f" over {cluster.nproc_per_node} workers of a pod" if cluster.nproc_per_node > 1 else ""
        left = max(cluster.memory_bytes - LAUNCHER_BYTES, 1.0)
        return left / cluster.nproc_per_node, f"cluster.memory = {cluster.memory}{shared}"
    return 0.0, ""
