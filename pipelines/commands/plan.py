"""``des plan``: what every operator costs on the wire."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import answer


def plan(
    config: ConfigFile,
    workers: Annotated[int | None, typer.Option(min=1, help="Default: train.workers.")] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show the bytes of each exchange, and who owns which fields.

    Ingests the logs first where that has not been done.
    """
    from components import stages
    from des_core.contracts import Dataset, Reference
    from des_core.engine.exchange.plan import plan_summary
    from pipelines import summary

    loaded = load(config, set_)
    reference = Reference.parse(stages.ingest(loaded).reference)
    explained = plan_summary(loaded, Dataset.load(reference), reference, workers or loaded.train.workers)
    summary.show_plan(explained)
    answer(as_json, explained)
