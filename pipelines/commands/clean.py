"""``des clean``: delete what [retention] does not keep."""

from __future__ import annotations

import os
import uuid
from typing import Annotated

import typer

from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import answer, show


def clean(
    config: ConfigFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Delete what [retention] does not keep.

    Of runs, checkpoints and features; weights stay that a kept version of the model names.
    """
    from des_core.log import byte_text
    from des_core.recurring import lease, retention

    loaded = load(config, set_)
    holder = f"clean-{uuid.uuid4().hex[:8]}"
    with lease.held(loaded, holder, os.getpid()):
        try:
            found = retention.plan(loaded)
            for one in found.doomed:
                show(one.kind, f"{one.uri}: {byte_text(one.size)}, {one.why}")
            if not dry_run:
                retention.apply(loaded, found)
        finally:
            lease.release(loaded, holder)
    verb = "would be deleted" if dry_run else "deleted"
    show("clean", f"{len(found.doomed):,} folders, {byte_text(found.size)} {verb}")
    facts = {"deleted": not dry_run, "bytes": found.size, "versions": list(found.versions)}
    answer(as_json, facts | {"folders": [one._asdict() for one in found.doomed]})
