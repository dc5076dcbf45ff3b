"""A chain of layers made one whole layer, without a trainer: what is written depends on the chain alone.

So two compactions at once write the same bytes to the same places. The chain stays until nobody refers to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import PREFIXES, BlockWriter, Written, block_bytes
from des_core.checkpoint.layers import Layers, Rows, Waiting
from des_core.checkpoint.manifest import Last, Layer, Manifest
from des_core.contracts import Reference

Array = np.ndarray[Any, np.dtype[Any]]

SUFFIX = "-whole"
"""Of the folder's name beside that of the chain's newest layer."""


def compact(reference: Reference, tell: Callable[[str, int], None]) -> Reference:
    """The checkpoint of the same step whose rows are in one layer; the present one where they are already.

    Memory is bounded by a block of each layer. Where the checkpoint is the newest of its run, the new one takes its
    place as such.

    Args:
        tell: is called after each table with its name and rows.

    Raises:
        CheckpointError: it is not whole, or of another version of DES.
    """
    manifest = manifests.read(reference)
    if len(manifest.layers) == 1:
        return reference
    here, name = reference.uri.rsplit("/", 2)[0], reference.uri.split("/")[-2] + SUFFIX
    there = storage.join(here, name)
    written = _written(reference, manifest, there, tell)
    layer = Layer(
        run=here.rpartition("/")[2],
        name=name,
        step=manifest.step,
        rows=written.rows,
        size=written.size,
        directories=(written.directory,),
    )
    for file, sha256 in manifest.files.items():
        data = storage.read_bytes(storage.join(reference.uri.rpartition("/")[0], file), sha256)
        storage.write_bytes(storage.join(there, file), data)
    return publish(reference, manifest.model_copy(update={"layers": (layer,), "workers": 1}), there)


def publish(old: Reference, manifest: Manifest, there: str) -> Reference:
    """Complete a checkpoint in the folder ``there`` that was made of ``old``, whose place as the newest it takes."""
    storage.write_json(storage.join(there, "measured.json"), manifests.measured(old))
    made = manifest.write(storage.join(there, "manifest.json"))
    run = manifests.run_folder(old)
    if manifests.last(run) == old:
        Last(checkpoint=str(made)).write(storage.join(run, "last.json"))
    return made


def _written(reference: Reference, manifest: Manifest, there: str, tell: Callable[[str, int], None]) -> Written:
    layers = Layers(reference, manifest)
    width, zeros, dtype = layers.form
    number_bytes = np.dtype(dtype).itemsize
    with BlockWriter(there, 0, width, zeros, dtype) as writer:
        row_bytes = (width + zeros) * number_bytes + 16
        most = max(block_bytes(sum(layer.rows for layer in manifest.layers) * row_bytes) // row_bytes, 1)
        for table in manifest.shape.tables:
            rows = 0
            for piece, waiting in joined(layers.between(table, 0, PREFIXES - 1), most):
                rows += len(piece.ids)
                writer.add_rows(table, piece.ids, piece.last, piece.rows_nK, piece.counts, piece.state_nZ)
                writer.add_waiting(table, waiting.ids, waiting.last, waiting.counts)
            tell(table, rows)
        return writer.finish()


def joined(pieces: Iterable[tuple[Rows, Waiting]], most: int) -> Iterable[tuple[Rows, Waiting]]:
    """Neighbouring pieces together until they hold ``most`` rows or waiting ids."""
    held: list[tuple[Rows, Waiting]] = []
    many = 0
    for piece in pieces:
        many += len(piece[0].ids) + len(piece[1].ids)
        held.append(piece)
        if many >= most:
            yield _one(held)
            held, many = [], 0
    if many:
        yield _one(held)


def _one(held: list[tuple[Rows, Waiting]]) -> tuple[Rows, Waiting]:
    rows = [rows for rows, _ in held if len(rows.ids)] or [held[0][0]]
    waiting = [waiting for _, waiting in held if len(waiting.ids)] or [held[0][1]]
    names = ("ids", "last", "rows_nK", "counts", "state_nZ")
    return (
        Rows(*(np.concatenate([getattr(one, name) for one in rows]) for name in names)),
        Waiting(*(np.concatenate([getattr(one, name) for one in waiting]) for name in names[:2] + names[3:4])),
    )
