"""``des register``: the gate and the registry."""

from __future__ import annotations

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import answer, show


def register(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Judge the model by the gate, then register a version of it."""
    from components import stages
    from des_core.run import pin
    from pipelines import summary

    run = pin(load(config, set_))
    show("gate", stages.gate(run).what)
    result = summary.of_run(run, unchanged=stages.register(run).unchanged)
    summary.tell(result)
    answer(as_json, result)
