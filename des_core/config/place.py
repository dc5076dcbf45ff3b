"""Places of a run: [run], [storage], [registry], [notify]."""

from __future__ import annotations

from pydantic import Field

from des_core.config.section import NonNegative, Section


class RunConfig(Section):
    """Name, seed and folder of the run."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9-]*$", max_length=63, description="Name of the run, its folder and the registered model."
    )
    seed: int = Field(
        0, ge=0, description="Seed of every random choice: order of samples, first values, dropout, synthetic logs."
    )
    dir: str = Field(
        "", description="Folder of the run; empty: runs/NAME in the current directory, or storage.root on a cluster."
    )


class StorageConfig(Section):
    """Where features, checkpoints and reports are stored."""

    root: str = Field(
        "", description="Folder, or address like s3://bucket/folder or gs://bucket/folder; empty: run.dir."
    )


class RegistryConfig(Section):
    """Where models are registered."""

    tracking_uri: str = Field(
        "", description="Address of the MLflow tracking server; empty: SQLite file mlflow.db in run.dir."
    )
    wait_s: NonNegative = Field(
        0.0, description="Seconds to wait for an MLflow server that does not answer yet; 0: 300 in a pod, 10 elsewhere."
    )
    embed_limit: int = Field(
        64 << 20,
        ge=0,
        description="Bytes of a checkpoint up to which a registered model holds a copy of its weights' files; "
        "a larger one's lie under storage.root alone.",
    )


class NotifyConfig(Section):
    """Where the outcome of a run is posted."""

    webhook: str = Field(
        "",
        description="Address to which the outcome of a run is posted as JSON; empty: the variable "
        "DES_WEBHOOK, or nowhere.",
    )
