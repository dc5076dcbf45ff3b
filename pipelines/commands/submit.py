"""``des submit``: one run of the pipeline on Kubeflow."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from des_core import scratch
from pipelines.commands.options import AsJson, ConfigFile, Day, Experiment, Host, Namespace, Overrides
from pipelines.commands.output import answer, show

if TYPE_CHECKING:
    from des_core.config import Config
    from pipelines.client import Kubeflow, Version


def submit(
    config: ConfigFile,
    as_of: Day = None,
    host: Host = None,
    namespace: Namespace = None,
    experiment: Experiment = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the pipeline on Kubeflow, once."""
    from des_core.recurring import daily

    # A pod knows better which day yesterday was, when it comes to run.
    day = "yesterday" if as_of == "yesterday" else daily.parse_day(as_of, "--as-of") if as_of else ""
    loaded = load_for_pods(config, set_)
    kubeflow, version, found = upload(loaded, host, namespace, experiment)
    run_id = kubeflow.run(loaded.run.name, version, found, day)
    page = kubeflow.ui("runs", run_id)
    show_version(version)
    show("run", run_id)
    show("page", page)
    answer(as_json, {"run_id": run_id, "experiment_id": found, "page": page, **version_facts(version)})


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
