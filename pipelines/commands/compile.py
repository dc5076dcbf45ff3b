"""``des compile``: the pipeline as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import answer, show


def compile_(
    config: ConfigFile,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The YAML to write.")],
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the pipeline for Kubeflow as YAML."""
    from pipelines.training import compile_to

    loaded = load(config, set_)
    compile_to(loaded, str(output))
    show("pipeline", str(output))
    answer(as_json, {"pipeline": str(output), "config_digest": loaded.digest})
