"""``des train``: the feature store to weights."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import show, show_step


def train(
    config: ConfigFile,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show where a step's time goes.")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train on the feature store, with local workers."""
    from components import stages
    from des_core.run import PROFILE, pin

    run = pin(load(config, set_))
    if profile:
        os.environ[PROFILE] = "1"
    done = stages.train(run, resume)
    if profile:
        from des_core.release.report import profile as pages
        from pipelines import summary

        phases, page = pages.write(run)
        summary.show_profile(phases)
        done.numbers["profile"] = page
        show("profile", page)
    show_step("train", done, as_json)
