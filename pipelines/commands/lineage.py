"""``des lineage``: the versions that led to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson, Overrides, RegistryConfig, load_registry
from pipelines.commands.output import answer


def lineage(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="models:/NAME/VERSION or models:/NAME@ALIAS.")],
    config: RegistryConfig = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """List the versions that led to a model, back to the first."""
    from des_core.release.registry import registry
    from pipelines import summary

    links = registry.chain(model, load_registry(model, config, set_)[1])
    summary.show_chain(links)
    answer(as_json, {"model": model, "chain": [link.model_dump(mode="json") for link in links]})
