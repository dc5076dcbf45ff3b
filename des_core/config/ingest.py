"""Where raw logs are read into the feature store: [ingest]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from des_core.config.section import Section


class IngestConfig(Section):
    """Where raw logs are read into the feature store; the same bytes come of it anywhere."""

    engine: Literal["local", "ray"] = Field(
        "local",
        description="local: processes of this machine, as many as there are CPUs and GiB of memory that may be used; "
        "ray: tasks of the Ray cluster that RAY_ADDRESS names (pip install 'des-core[ray]'), whose machines all reach "
        "storage.root and the logs; on Kubernetes (cluster.backend = pytorchjob) it is a RayJob of its own.",
    )
    workers: int = Field(2, ge=1, description="ray on Kubernetes: worker pods, beside the head.")
    cpus: int = Field(2, ge=1, description="ray on Kubernetes: CPUs of each pod.")
    memory_mb: int = Field(4096, ge=512, description="ray on Kubernetes: MiB of memory of each pod.")
