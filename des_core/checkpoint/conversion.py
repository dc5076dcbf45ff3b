"""Checkpoints of format 3 (.npy files of each worker's rows in slot order) -> the present form.

One worker's files at a time, mapped from disk; from an object store they are copied to a scratch folder first.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import safetensors.numpy

from des_core import scratch, storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import BlockWriter, Written, block_bytes
from des_core.checkpoint.compaction import publish
from des_core.checkpoint.manifest import DENSE, DENSE_STATE, Layer, Manifest
from des_core.checkpoint.ordering import sorted_blocks
from des_core.contracts import Reference
from des_core.errors import CheckpointError, StorageError

Array = np.ndarray[Any, np.dtype[Any]]

OLD_FORMAT = 3
SUFFIX = "-converted"
KEYS = ("ids", "tables", "counts", "last")
ROWS = (*KEYS, "rows", "state")


def convert(reference: Reference) -> Reference:
    """The checkpoint in the present form, beside the old one, which stays; it itself where it has that form already.

    Raises:
        CheckpointError: it has neither form, or is not whole.
    """
    try:
        old = reference.read()
    except StorageError as error:
        raise CheckpointError(str(error)) from None
    found = old.get("format") if isinstance(old, dict) else None
    if found == manifests.FORMAT:
        return reference
    if found != OLD_FORMAT:
        raise CheckpointError(
            f"{reference.uri} has format {found}; formats {OLD_FORMAT} and {manifests.FORMAT} can be read: train again"
        )
    here, name = reference.uri.rpartition("/")[0], reference.uri.split("/")[-2] + SUFFIX
    there = storage.join(here.rpartition("/")[0], name)
    tables = tuple(old["shape"]["tables"])
    parts = [_part(here, there, worker, old["files"], tables) for worker in range(old["workers"])]
    layer = Layer(
        run=here.split("/")[-2],
        name=name,
        step=old["trainer"]["step"],
        rows=sum(part.rows for part in parts),
        size=sum(part.size for part in parts),
        directories=tuple(part.directory for part in parts),
    )
    kept = {key: old[key] for key in ("run_key", "trajectory", "shape", "workers", "trainer")}
    files = _dense(here, there, old["files"][DENSE])
    manifest = Manifest.model_validate(kept | {"layers": (layer,), "files": files})
    return publish(reference, manifest, there)


def _part(here: str, there: str, worker: int, digests: dict[str, str], tables: tuple[str, ...]) -> Written:
    """One worker's rows and waiting ids."""
    with _arrays(here, worker, digests, ROWS) as (ids, numbers, counts, last, rows_SK, state_SZ):
        form = (rows_SK.shape[1], state_SZ.shape[1], str(rows_SK.dtype))
        row_bytes = (form[0] + form[1]) * rows_SK.dtype.itemsize + 16
        most = max(block_bytes(len(ids) * row_bytes) // row_bytes, 1)
        with BlockWriter(there, worker, *form) as writer:
            for table, at in sorted_blocks(ids, numbers, most):
                writer.add_rows(tables[table], ids[at], last[at], rows_SK[at], counts[at], state_SZ[at])
            waiting = tuple(f"candidate_{name}" for name in KEYS)
            with _arrays(here, worker, digests, waiting) as (ids, numbers, counts, last):
                for table, at in sorted_blocks(ids, numbers, most):
                    writer.add_waiting(tables[table], ids[at], last[at], counts[at])
            return writer.finish()


@contextmanager
def _arrays(here: str, worker: int, digests: dict[str, str], names: tuple[str, ...]) -> Iterator[list[Array]]:
    """A worker's arrays, mapped; verified first."""
    with scratch.folder("convert") as folder:
        found = []
        for name in names:
            file = f"{name}-{worker:05d}.npy"
            uri = storage.join(here, file)
            if not storage.exists(uri) or storage.digest_file(uri) != digests.get(file):
                raise CheckpointError(f"{uri} is missing or has other bytes than its manifest says; train again")
            filesystem, path = storage.resolve(uri)
            if "://" in uri:
                path = os.path.join(folder, file)
                with filesystem.open_input_stream(storage.resolve(uri)[1]) as stream, open(path, "wb") as copy:
                    shutil.copyfileobj(stream, copy, 1 << 22)
            found.append(np.load(path, mmap_mode="r", allow_pickle=False))
        yield found


def _dense(here: str, there: str, sha256: str) -> dict[str, str]:
    """The dense weights and their optimizer's state, apart."""
    tensors = safetensors.numpy.load(storage.read_bytes(storage.join(here, DENSE), sha256))
    parts = {
        name: {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        for name, prefix in ((DENSE, "model."), (DENSE_STATE, "optimizer."))
    }
    return {
        name: storage.write_bytes(storage.join(there, name), safetensors.numpy.save(part))
        for name, part in parts.items()
    }
