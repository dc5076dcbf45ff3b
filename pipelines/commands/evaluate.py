"""``des evaluate``: weights to a report."""

from __future__ import annotations

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import show_step


def evaluate(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Score the test rows, and write the report and the predictions."""
    from components import stages
    from des_core.run import pin

    show_step("evaluate", stages.evaluate(pin(load(config, set_))), as_json)
