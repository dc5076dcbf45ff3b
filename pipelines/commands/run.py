"""``des run``: raw logs to a registered model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from des_core.errors import DesError, UserError
from pipelines.commands.options import AsJson, ConfigFile, Day, Overrides, load
from pipelines.commands.output import answer, show

if TYPE_CHECKING:
    from des_core.config import Config


def run(
    config: ConfigFile,
    as_of: Day = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="DATE", help="With --to: the first of several days.")
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="DATE", help="The last of these days.")] = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run all steps, from raw logs to a registered model.

    On whole logs, or on the window of one day or of several days in turn.
    """
    from des_core.recurring import daily
    from pipelines import summary

    if (from_ is None) != (to is None) or (as_of and from_):
        raise UserError("give --from and --to together, or --as-of alone")
    loaded = load(config, set_)
    if from_ is None or to is None:
        day = daily.yesterday(loaded) if as_of == "yesterday" else as_of and daily.parse_day(as_of, "--as-of")
        result = _run_once(loaded, day or "")
        summary.tell(result)
        answer(as_json, result)
        return
    days = daily.days_between(daily.parse_day(from_, "--from"), daily.parse_day(to, "--to"))
    if not days:
        raise UserError(f"--from {from_} is later than --to {to}; give the earlier day first")
    results = []
    for day in days:
        show("day", day)
        results.append(_run_once(loaded, day))
        summary.tell(results[-1])
    summary.show_days(results)
    answer(as_json, {"days": results})


def _run_once(config: Config, day: str) -> dict[str, Any]:
    """The result of a run on whole logs (no day) or of a day."""
    from components import finished
    from pipelines import local, summary

    known = finished.finished_run(config, day)
    if known is not None:
        return summary.of_run(known, unchanged=True)
    done = local.run(config, day, summary.step_teller(sys.stdout))
    if "register" not in done:
        return {"name": config.run.name, "as_of": day, "verdict": "absent", "reasons": [done["resolve"]["what"]]}
    run = finished.finished_run(config, day)
    if run is None:
        raise DesError(
            f"all steps of {config.run.name} are done, but its results are not found under {config.storage.root}; "
            "were they changed meanwhile? Start it again"
        )
    return summary.of_run(run, unchanged=done["register"]["unchanged"] == "True")
