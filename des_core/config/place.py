"""Where a run lives, and who is told of its end: [run], [storage], [registry], [notify]."""

from __future__ import annotations

from pydantic import Field

from des_core.config.section import NonNegative, Section


class RunConfig(Section):
    """Who this run is and where it lives."""

    name: str = Field(
        pattern=r"^[a-z][a-z0-9-]*$", max_length=63, description="Name of the run, its folder and the registered model."
    )
    seed: int = Field(0, ge=0, description="Seed of shuffles, first values, dropout and synthetic logs.")
    dir: str = Field(
        "", description="Folder of the run; empty: runs/NAME in the current directory, on a cluster storage.root."
    )


class StorageConfig(Section):
    """Where features, checkpoints and reports live."""

    root: str = Field("", description="A folder or s3://, gs:// address; empty means run.dir.")


class RegistryConfig(Section):
    """Where models are registered."""

    tracking_uri: str = Field("", description="MLflow tracking address; empty: SQLite mlflow.db in run.dir.")
    wait_s: NonNegative = Field(
        0.0, description="Seconds to wait for an MLflow that does not answer yet; 0: 300 in a pod, 10 elsewhere."
    )
    embed_limit: int = Field(
        2 << 30, ge=0, description="Bytes of weights above which the model refers to storage.root instead."
    )


class NotifyConfig(Section):
    """Who is told of a run's end."""

    webhook: str = Field(
        "", description="Address that a JSON of the outcome is posted to; empty: DES_WEBHOOK, or none."
    )
