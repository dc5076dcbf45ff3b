"""``des ingest``: raw logs to the feature store."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import show_step


def ingest(
    config: ConfigFile,
    day: Annotated[str | None, typer.Option(metavar="DATE", help="Only this day of a path with {day}.")] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Read raw logs into the feature store."""
    from components import stages

    show_step("ingest", stages.ingest(load(config, set_), day), as_json)
