"""What ``des submit`` and ``des schedule create`` both do first: read the config for pods, and upload its pipeline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des_core import scratch
from pipelines.commands.output import show

if TYPE_CHECKING:
    from des_core.config import Config
    from pipelines.client import Kubeflow, Version


def load_for_pods(path: Path, overrides: list[str] | None) -> Config:
    """The config as the steps' pods see it, if they can reach all that it names."""
    from des_core.config import load_config
    from pipelines import settings

    return settings.as_seen(load_config(path, tuple(overrides or ()), in_pods=True))


def upload(
    config: Config, host: str | None, namespace: str | None, experiment: str | None
) -> tuple[Kubeflow, Version, str]:
    """Kubeflow, the version of the pipeline there, and the experiment's id."""
    from pipelines import client
    from pipelines.training import compile_to

    kubeflow = client.connect(host, namespace)
    with scratch.folder("pipeline") as folder:
        package = os.path.join(folder, f"{config.run.name}.yaml")
        compile_to(config, package)
        return kubeflow, kubeflow.upload(config, package), kubeflow.experiment(experiment or config.run.name)


def show_version(version: Version) -> None:
    """Print the pipeline's version, and whether it was there before."""
    show("version", version.name + ("" if version.uploaded else " (was there)"))


def version_facts(version: Version) -> dict[str, Any]:
    """The pipeline's version for a command's answer."""
    facts = version._asdict()
    return {"version": facts.pop("name"), **facts}
