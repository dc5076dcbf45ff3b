"""``des predict``: scores of raw records."""

from __future__ import annotations

from typing import Annotated

import typer

from des_core import scratch
from pipelines.commands.options import AsJson, Model, Overrides, RegistryConfig, load_registry
from pipelines.commands.output import answer, show


def predict(
    model: Model,
    input_: Annotated[str, typer.Option("--input", metavar="FILE", help="Raw records, in the logs' format.")],
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="CSV of sample,probability to write.")],
    keep: Annotated[str, typer.Option(metavar="COLUMNS", help="Columns to carry through, like user_id,time.")] = "",
    config: RegistryConfig = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score raw records with a registered model."""
    from des_core.release.registry import registry
    from des_core.release.serve import prediction

    loaded, uri = load_registry(model, config, set_)
    with scratch.folder("model") as folder:
        found = registry.fetch(model, uri, folder)
        scored = prediction.predict(found.folder, input_, output, loaded, tuple(filter(None, keep.split(","))))
    show("predict", f"{scored.rows:,} rows scored by {found.name} version {found.version}")
    if scored.bad:
        show("left out", f"{scored.bad:,} bad rows, the first at {scored.first_reason}")
    show("scores", output)
    numbers = {"rows": scored.rows, "bad_rows": scored.bad, "output": output}
    answer(as_json, {"model": found.name, "version": int(found.version), **numbers})
