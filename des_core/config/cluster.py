"""Where workers run: [cluster]."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from des_core.config.section import Positive, Section


class ClusterConfig(Section):
    """Where workers run."""

    backend: Literal["local", "pytorchjob"] = Field("local", description="Local processes, or a PyTorchJob.")
    image: str = Field("", description="Image of steps and workers; empty: the environment's DES_IMAGE.")
    nodes: int = Field(1, ge=1, description="Pods of the job.")
    nproc_per_node: int = Field(1, ge=1, description="Workers in each pod.")
    cpu: str = Field("1", pattern=r"^(\d+(\.\d+)?|\d+m)$", description="CPUs of each pod, as Kubernetes writes them.")
    memory: str = Field(
        "4Gi", pattern=r"^\d+(\.\d+)?([KMGT]i|[kMGT])?$", description="Memory of each pod, as Kubernetes writes it."
    )
    gpus: int = Field(0, ge=0, description="GPUs (nvidia.com/gpu) of each pod.")
    queue: str = Field("", description="Kueue's local queue; empty: none.")
    queue_timeout_s: Positive = Field(3600.0, description="Seconds a job may wait in its queue.")
    deadline_s: Positive = Field(86_400.0, description="Seconds a job may run.")
    elastic: bool = Field(False, description="Pods may leave and join; training goes on from the last checkpoint.")

    @field_validator("cpu", mode="before")
    @classmethod
    def _cpus_may_be_a_number(cls, cpu: Any) -> Any:
        return str(cpu) if isinstance(cpu, int | float) and not isinstance(cpu, bool) else cpu
