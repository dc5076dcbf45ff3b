"""Models whose weights are given as arrays: a checkpoint's files without training, and des.json for it.

Dims: n rows of a table, K numbers per row.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import des_core
from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import BlockWriter, block_bytes
from des_core.checkpoint.manifest import DENSE, Layer, Manifest, Shape
from des_core.checkpoint.ordering import sorted_blocks
from des_core.config import Config
from des_core.contracts import FieldSpec, Reference, read_as
from des_core.engine.models import Model
from des_core.engine.weights import saving
from des_core.release.serve import serving
from des_core.release.serve.serving import Description

Array = np.ndarray[Any, np.dtype[Any]]


def checkpoint(
    root: str,
    run: str,
    step: int,
    fields: Sequence[FieldSpec],
    ids: Mapping[str, Array],
    rows: Mapping[str, Array],
    model: Model,
    base: Reference | None = None,
    gone: Mapping[str, Array] | None = None,
    state_width: int = 0,
) -> Reference:
    """The manifest of a checkpoint under ``root``: a whole one, or ``base`` and a delta.

    Args:
        ids, rows: int64 [n] and [n, K] by table.
        gone: ids that are known no more, by table.
        state_width: numbers of optimizer state per row; zeros.
    """
    width, folder = model.row_width, storage.join(root, "checkpoints", run)
    uri = manifests.manifest_uri(folder, step)
    dtype = str(next(iter(rows.values())).dtype) if rows else "float32"
    many = sum(map(len, ids.values()))
    with BlockWriter(uri.rpartition("/")[0], 0, width, state_width, dtype) as writer:
        for table, found in ids.items():
            row_bytes = rows[table].itemsize * (width + state_width) + 16
            for places in _blocks(found, block_bytes(many * row_bytes) // row_bytes):
                zeros = np.zeros((len(places), state_width), dtype)
                steps, counts = np.full(len(places), step, np.uint32), np.ones(len(places), np.uint32)
                writer.add_rows(table, found[places], steps, rows[table][places], counts, zeros)
        for table, found in (gone or {}).items():
            for places in _blocks(found, 1 << 16):
                writer.add_gone(table, found[places])
        written = writer.finish()
    layer = Layer(
        run=run,
        name=manifests.folder_name(step),
        step=step,
        rows=written.rows,
        gone=written.gone,
        size=written.size,
        directories=(written.directory,),
    )
    tables = tuple(sorted({field.table for field in read_as(fields, "rows")}))
    names = tuple(field.name for field in fields)
    dense = storage.write_bytes(storage.join(uri.rpartition("/")[0], DENSE), saving.dense_bytes(model))
    manifest = Manifest(
        run_key=run,
        trajectory=run,
        shape=Shape(model={}, optimizer={}, fields=names, tables=tables, precision="fp32"),
        workers=1,
        trainer={"step": step, "decays": []},
        layers=(*(manifests.read(base).layers if base else ()), layer),
        files={DENSE: dense},
    )
    return manifest.write(uri)


def _blocks(ids: Array, most: int) -> list[Array]:
    return [places for _, places in sorted_blocks(ids, np.zeros(len(ids), np.uint16), max(most, 1))]


def describe(folder: str, run_key: str, config: Config, fields: Sequence[FieldSpec], reference: Reference) -> None:
    """Write des.json of a model that refers to a checkpoint, by its place under a root."""
    root, _, place = reference.uri.rpartition("/checkpoints/")
    storage_config = config.storage.model_copy(update={"root": root})
    description = Description(
        code_version=des_core.__version__,
        run_key=run_key,
        task=config.source.task,
        config=config.model_copy(update={"storage": storage_config}).recorded,
        fields=tuple(fields),
        checkpoint=str(Reference(f"checkpoints/{place}", reference.sha256)),
    )
    description.write(os.path.join(folder, serving.DESCRIPTION))
