"""``des day``: days in quarantine."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import answer, show

app = typer.Typer(help="List and accept days in quarantine, which windows leave out.", no_args_is_help=True)


@app.command(name="list")
def list_days(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """List the days in quarantine, and why they are there."""
    from des_core.recurring import daily

    held = daily.held_days(load(config, set_))
    for day, record in held.items():
        show(day, "; ".join(record.reasons))
    if not held:
        show("days", "none is in quarantine")
    answer(as_json, {"quarantined": {day: list(record.reasons) for day, record in held.items()}})


@app.command()
def accept(
    day: Annotated[str, typer.Argument(metavar="DATE", help="A day in quarantine.")],
    config: ConfigFile,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Let the next window train on a day in quarantine."""
    from des_core.recurring import daily

    daily.accept(load(config, set_), daily.parse_day(day, "the day"))
    show("accepted", f"{day}: the next run's window takes it in")
    answer(as_json, {"accepted": day})
