"""``des plan``: what every operator costs on the wire, and every worker and step in memory."""

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
    """Show bytes on the wire and in memory, worker by worker.

    Ingests the logs first where that has not been done.
    """
    from components import stages
    from components.launch.memory import limit_of
    from des_core.contracts import Dataset, Reference
    from des_core.engine.exchange.plan import plan_summary
    from pipelines import summary

    loaded = load(config, set_)
    reference = Reference.parse(stages.ingest(loaded).reference)
    many = workers or loaded.train.workers
    explained = plan_summary(loaded, Dataset.load(reference), reference, many)
    may_have, why = limit_of(loaded)(many)
    fits = not may_have or explained["memory"]["most"] <= may_have
    explained["memory"]["limit"] = {"bytes": round(may_have), "why": why, "fits": fits}
    summary.show_plan(explained)
    answer(as_json, explained)
