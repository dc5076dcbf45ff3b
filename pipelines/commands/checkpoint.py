"""``des checkpoint``: the checkpoints in a run's storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from des_core.errors import CheckpointError, StorageError
from des_core.log import byte_text
from pipelines.commands.options import AsJson, ConfigFile, Overrides, load
from pipelines.commands.output import answer, show

if TYPE_CHECKING:
    from des_core.config import Config
    from des_core.contracts import Reference

app = typer.Typer(help="List, check, compact and export checkpoints.", no_args_is_help=True)

Which = Annotated[
    str | None,
    typer.Argument(metavar="RUN/STEP", help="As des checkpoint list shows it; default: the newest of the latest run."),
]


@app.command(name="list")
def list_checkpoints(config: ConfigFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """List the checkpoints of all runs in storage.root, the newest of each run last."""
    from des_core import storage
    from des_core.checkpoint import manifest as manifests

    root = _root(load(config, set_))
    found = []
    for run in storage.list_folder(root):
        for uri in manifests.manifests(storage.join(root, run)):
            name = "/".join(uri.split("/")[-3:-1])
            try:
                manifest = manifests.read(manifests.reference(uri))
            except (CheckpointError, StorageError) as error:
                show(name, str(error))
                found.append({"checkpoint": name, "error": str(error)})
                continue
            facts = _facts(manifest)
            show(name, f"step {facts['step']:,}, {facts['rows']:,} rows written, {_size(facts)}")
            found.append({"checkpoint": name} | facts)
    answer(as_json, {"checkpoints": found})


@app.command(name="show")
def show_checkpoint(config: ConfigFile, which: Which = None, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a checkpoint holds: its layers, its shape, where training stood."""
    from des_core.checkpoint import manifest as manifests

    reference = _chosen(load(config, set_), which)
    manifest = manifests.read(reference)
    trainer = manifest.trainer
    show("checkpoint", str(reference))
    show("training", f"step {manifest.step:,}, epoch {trainer['epoch'] + 1}, {manifest.workers} workers")
    show("model", ", ".join(f"{key}={value}" for key, value in manifest.shape.model.items()))
    for layer in manifest.layers:
        gone = f", {layer.gone:,} ids gone" if layer.gone else ""
        show(f"{layer.run}/{layer.name}", f"{layer.rows:,} rows{gone}, {byte_text(layer.size)}")
    answer(as_json, {"reference": str(reference)} | manifest.model_dump(mode="json"))


@app.command()
def verify(config: ConfigFile, which: Which = None, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Read every block of a checkpoint and compare it with its digest."""
    from des_core.checkpoint.verification import verify as read_all

    reference = _chosen(load(config, set_), which)
    found = read_all(reference)
    for fault in found.faults:
        show("fault", fault)
    if found.faults:
        others = f"; {len(found.faults) - 1} more faults are listed above" if len(found.faults) > 1 else ""
        raise CheckpointError(f"{found.faults[0]}{others}")
    show("verified", f"{found.blocks:,} blocks, {byte_text(found.read_bytes)}: {reference.uri}")
    answer(as_json, {"reference": str(reference), "blocks": found.blocks, "bytes": found.read_bytes})


@app.command()
def compact(config: ConfigFile, which: Which = None, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Write one whole layer in place of a chain of deltas, beside it."""
    from des_core.checkpoint.compaction import compact as merge

    _done("compacted", merge(_chosen(load(config, set_), which), _tell), as_json)


@app.command()
def convert(config: ConfigFile, which: Which = None, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Write a checkpoint of an earlier version of DES in the present form, beside it."""
    from des_core.checkpoint.conversion import convert as rewrite

    _done("converted", rewrite(_chosen(load(config, set_), which)), as_json)


@app.command()
def export(
    config: ConfigFile,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FOLDER", help="Where the Parquet files go.")],
    which: Which = None,
    set_: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write the weights as one Parquet file per table, with field, key, weight and factors, for other tools."""
    from des_core.contracts import Dataset
    from des_core.engine.weights.exporting import export_parquet
    from des_core.run import dataset_of

    loaded = load(config, set_)
    reference = _chosen(loaded, which)
    fields = Dataset.load(dataset_of(loaded, reference.uri.split("/")[-3])).row_fields
    written = export_parquet(reference, fields, output, _tell)
    show("exported", f"{sum(written.values()):,} rows of {len(written)} tables to {output}")
    answer(as_json, {"reference": str(reference), "output": output, "rows": written})


def _done(verb: str, made: Reference, as_json: bool) -> None:
    from des_core.checkpoint import manifest as manifests

    facts = _facts(manifests.read(made))
    show(verb, f"{made.uri}: {facts['rows']:,} rows, {_size(facts)}")
    answer(as_json, {"reference": str(made)} | facts)


def _tell(table: str, rows: int) -> None:
    from des_core import log

    log.emit("table", name=table, rows=rows)


def _root(config: Config) -> str:
    from des_core import storage

    return storage.join(config.storage.root, "checkpoints")


def _chosen(config: Config, which: str | None) -> Reference:
    """The manifest that RUN/STEP means.

    Raises:
        CheckpointError: there is none.
    """
    from des_core import storage
    from des_core.checkpoint import manifest as manifests

    root = _root(config)
    if which is None:
        latest = storage.join(config.storage.root, "latest")
        if not storage.exists(latest):
            raise CheckpointError(f"{latest}: no run has been evaluated here; name one: des checkpoint list -c FILE")
        which = storage.read_bytes(latest).decode().strip()
    folder = storage.join(root, which.strip("/"))
    uri = storage.join(folder, "manifest.json")
    if "/" in which.strip("/") and storage.exists(uri):
        return manifests.reference(uri)
    newest = manifests.last(folder) if ".." not in which.split("/") else None
    if newest is None:
        raise CheckpointError(f"{which}: no checkpoint of this name under {root}; see des checkpoint list -c FILE")
    return newest


def _facts(manifest: Any) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "rows": sum(layer.rows for layer in manifest.layers),
        "bytes": sum(layer.size for layer in manifest.layers),
        "layers": len(manifest.layers),
        "workers": manifest.workers,
    }


def _size(facts: dict[str, Any]) -> str:
    layers = "whole" if facts["layers"] == 1 else f"whole and {facts['layers'] - 1} deltas"
    return f"{byte_text(facts['bytes'])}, {layers}"
