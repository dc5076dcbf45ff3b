"""Options that several commands take, and the config that they name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from des_core.errors import UserError
from des_core.secrets import remember

if TYPE_CHECKING:
    from des_core.config import Config

ConfigFile = Annotated[Path, typer.Option("-c", "--config", metavar="FILE", help="The run's TOML.")]
RegistryConfig = Annotated[
    Path | None, typer.Option("-c", "--config", metavar="FILE", help="A TOML that names the registry.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the config; may be repeated."),
]
Model = Annotated[str, typer.Option("--model", metavar="URI", help="models:/NAME@champion or models:/NAME/VERSION.")]
Day = Annotated[str | None, typer.Option("--as-of", metavar="DATE", help="One day of a recurring run, or yesterday.")]
Host = Annotated[
    str | None, typer.Option("--host", metavar="URL", help="Kubeflow Pipelines; default: KFP_HOST. Token: KFP_TOKEN.")
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", metavar="NS", help="Namespace of the runs' pods; default: KFP_NAMESPACE.")
]
Experiment = Annotated[
    str | None, typer.Option("--experiment", metavar="NAME", help="Experiment that lists the runs; default: run.name.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]

crash_folder = tempfile.gettempdir()
"""Where the traceback of an unexpected error goes: the run's folder, once that is known."""


def load(path: Path, overrides: list[str] | None) -> Config:
    """The config of a TOML file with its overrides."""
    global crash_folder
    from des_core.config import load_config

    config = load_config(path, tuple(overrides or ()))
    remember(config.notify.webhook)
    crash_folder = config.run.dir
    return config


def load_registry(model: str, path: Path | None, overrides: list[str] | None) -> tuple[Config | None, str]:
    """The config, if one is given, and the tracking URI of the registry that holds a model."""
    from des_core.release.serve import prediction

    if overrides and path is None:
        raise UserError("--set changes a config: give one with -c FILE")
    config = None if path is None else load(path, overrides)
    return config, prediction.tracking_uri(model, config)
