"""``des generate``: synthetic logs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import AsJson
from pipelines.commands.output import answer, show


def generate(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for {day}.csv and truth/.")],
    days: Annotated[int, typer.Option(min=1, max=366, help="Days from 2026-01-01.")] = 3,
    rows_per_day: Annotated[int, typer.Option(min=1, help="Rows of each day.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same logs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write synthetic raw click logs."""
    from des_core.data.read import synthetic

    files = synthetic.generate(str(out), days, rows_per_day, seed)
    show("logs", f"{len(files)} days of {rows_per_day:,} rows in {out}")
    answer(as_json, {"out": str(out), "files": files, "days": days, "rows_per_day": rows_per_day, "seed": seed})
