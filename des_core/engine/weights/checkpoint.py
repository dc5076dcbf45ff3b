"""Everything a run needs to go on as if it had never stopped, written whole or not at all.

A checkpoint is a folder; each worker writes the rows it owns, worker 0 the dense part, and the manifest
last. Rows are keyed by id, which stands for (table, key), never by slot, so any number of workers may
read them: each takes the ids in its own buckets. Randomness is counters of seed, step and epoch, so the
cursor is its whole state.

    step-0000000120/{ids,tables,counts,last,rows,state}-00000.npy   rows and their counters
                    {candidate_ids,candidate_tables,...}-00000.npy  values met but not admitted
                    worker-00000.json  dense.safetensors  manifest.json
                    measured.json                                   what clocks and this machine decide; not digested
    last.json       reference of the newest manifest
"""

from __future__ import annotations

import hashlib
import io
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
from torch import Tensor, nn

from des_core import log, storage
from des_core.contracts import Record, Reference
from des_core.data.feed.batches import BUCKET_BITS
from des_core.engine.weights.optimizer import DenseRule
from des_core.engine.weights.table import Table
from des_core.errors import CheckpointError, StorageError

Array = np.ndarray[Any, np.dtype[Any]]

FORMAT = 3
KEYS = ("ids", "tables", "counts", "last")
ROWS = (*KEYS, "rows", "state")
CANDIDATES = tuple(f"candidate_{name}" for name in KEYS)


class Shape(Record):
    """What must agree between a checkpoint and the run that reads it, by the config's own names."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    fields: tuple[str, ...]
    tables: tuple[str, ...]
    precision: str

    def differs_from(self, run: Shape) -> str:
        """The first difference as ``written for KEY=a, the run has b``; empty if there is none."""
        for section in ("model", "optimizer"):
            mine, its = getattr(self, section), getattr(run, section)
            for key in mine:
                if mine[key] != its.get(key):
                    return f"written for {section}.{key}={mine[key]}, the run has {its.get(key)}"
        for key in ("fields", "tables", "precision"):
            if getattr(self, key) != getattr(run, key):
                return f"written for {key}={getattr(self, key)}, the run has {getattr(run, key)}"
        return ""


class Manifest(Record):
    """What a checkpoint holds; written last."""

    format: int = FORMAT
    run_key: str
    trajectory: str
    """Digest of all that decides the weights at a step; runs that share it may continue each other."""
    shape: Shape
    workers: int
    trainer: dict[str, Any]
    """Step, epoch, cursor, learning rates' factor, best epoch, history."""
    files: dict[str, str]
    """sha256 by name."""


class Last(Record):
    """``last.json``: the newest checkpoint."""

    checkpoint: str

    @property
    def reference(self) -> Reference:
        """Of its manifest."""
        return Reference.parse(self.checkpoint)


def save(
    folder: str,
    peers: Any,
    table: Table,
    model: nn.Module,
    dense: DenseRule,
    head: dict[str, Any],
    measured: dict[str, Any],
) -> str:
    """Write a checkpoint with all workers and return its manifest's address.

    Args:
        head: the manifest's fields other than ``workers`` and ``files``.
        measured: goes beside the manifest, so that equal runs have equal digests.
    """
    manifest = manifest_uri(folder, head["trainer"]["step"])
    uri = manifest.rpartition("/")[0]
    if peers.rank == 0:
        storage.delete(manifest)
    peers.barrier()
    arrays = {name: getattr(table, name) for name in KEYS}
    arrays |= {
        "rows": table.rows_SK[: table.used].cpu().numpy(),
        "state": table.state_SZ[: table.used].cpu().numpy(),
    }
    arrays |= {name: getattr(table.candidates, key) for name, key in zip(CANDIDATES, KEYS, strict=True)}
    mine = {
        name: write_array(storage.join(uri, name), array)
        for name, array in ((f"{kind}-{peers.rank:05d}.npy", array) for kind, array in arrays.items())
    }
    if peers.rank == 0:
        address = storage.join(uri, "dense.safetensors")
        mine["dense.safetensors"] = storage.write_bytes(address, dense_bytes(model, dense))
    storage.write_json(storage.join(uri, f"worker-{peers.rank:05d}.json"), mine)
    peers.barrier()
    if peers.rank == 0:
        files: dict[str, str] = {}
        for worker in range(peers.workers):
            files |= storage.read_json(storage.join(uri, f"worker-{worker:05d}.json"))
        storage.write_json(storage.join(uri, "measured.json"), measured)
        written = Manifest(workers=peers.workers, files=files, **head).write(manifest)
        Last(checkpoint=str(written)).write(storage.join(folder, "last.json"))
    peers.barrier()
    return manifest


def manifest_uri(folder: str, step: int) -> str:
    """Address of the manifest of a step's checkpoint."""
    return storage.join(folder, f"step-{step:010d}", "manifest.json")


def reference(uri: str) -> Reference:
    """A manifest with its present digest."""
    return Reference(uri, hashlib.sha256(storage.read_bytes(uri)).hexdigest())


def last(folder: str) -> Reference | None:
    """The newest whole checkpoint of a folder; where its pointer is damaged, the newest manifest that can be read."""
    pointer = storage.join(folder, "last.json")
    if not storage.exists(pointer):
        return None
    try:
        return Last.read(pointer).reference
    except StorageError as error:
        log.emit("damaged", pointer=pointer, why=str(error))
    for name in sorted(storage.list_folder(folder), reverse=True):
        manifest = storage.join(folder, name, "manifest.json")
        if name.startswith("step-") and storage.exists(manifest):
            return reference(manifest)
    return None


def measured(reference: Reference) -> dict[str, Any]:
    """The measurements that ``save`` wrote beside a manifest; empty where they are missing or damaged."""
    uri = storage.join(reference.uri.rpartition("/")[0], "measured.json")
    try:
        found = storage.read_json(uri) if storage.exists(uri) else {}
    except StorageError:
        return {}
    return found if isinstance(found, dict) else {}


def prune(folder: str, keep: set[str]) -> None:
    """Delete the checkpoints whose manifests are not in ``keep``, manifests first."""
    for name in storage.list_folder(folder):
        manifest = storage.join(folder, name, "manifest.json")
        if name.startswith("step-") and manifest not in keep:
            storage.delete(manifest)
            storage.delete(storage.join(folder, name))


def read_manifest(reference: Reference, shape: Shape) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: it was written for another shape of model, or is not whole.
    """
    try:
        manifest = Manifest.load(reference)
    except StorageError as error:
        raise CheckpointError(str(error)) from None
    check_format(reference, manifest)
    difference = manifest.shape.differs_from(shape)
    if difference:
        name = reference.uri.split("/")[-2]
        raise CheckpointError(
            f"checkpoint {name} was {difference}; set it back, or start from another checkpoint ({reference.uri})"
        )
    return manifest


def check_format(reference: Reference, manifest: Manifest) -> None:
    """Raises ``CheckpointError`` where another version of DES wrote a checkpoint."""
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{reference.uri} has format {manifest.format}, this version of DES reads {FORMAT}; train from the start"
        )


def load_rows(
    reference: Reference,
    manifest: Manifest,
    table: Table,
    owner_TH: Array,
    worker: int,
    tables: Array | None = None,
) -> None:
    """Fill a table with the rows whose buckets ``worker`` owns, from the files of all workers.

    Args:
        tables: number here of each table of the checkpoint, -1 for one that is left behind; None: they are the same.
    """
    folder = reference.uri.rpartition("/")[0]
    for writer in range(manifest.workers):
        for names, restore in ((ROWS, table.restore), (CANDIDATES, table.restore_candidates)):
            arrays = [read_array(folder, f"{name}-{writer:05d}.npy", manifest) for name in names]
            known = np.ones(len(arrays[0]), np.bool_)
            if tables is not None:
                renamed = tables[arrays[1]]
                known, arrays[1] = renamed >= 0, np.maximum(renamed, 0).astype(arrays[1].dtype)
            buckets = (arrays[0].view(np.uint64) >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
            mine = known & (owner_TH[arrays[1], buckets] == worker)
            restore(*(array[mine] for array in arrays))


def load_dense(reference: Reference, manifest: Manifest, model: nn.Module, optimizer: DenseRule | None = None) -> None:
    """Fill the dense weights, batch norm's statistics and, if given, their optimizer."""
    name = "dense.safetensors"
    folder = reference.uri.rpartition("/")[0]
    load_dense_bytes(storage.read_bytes(storage.join(folder, name), manifest.files[name]), model, optimizer)


def load_dense_bytes(data: bytes, model: nn.Module, optimizer: DenseRule | None = None) -> None:
    """``load_dense`` from the bytes of dense.safetensors."""
    tensors = safetensors.torch.load(data)
    model.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    if optimizer is None:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, number, slot = key.split(".")
            state.setdefault(int(number), {})[slot] = tensor
    optimizer.restore(state)


def dense_bytes(model: nn.Module, optimizer: DenseRule | None = None) -> bytes:
    """dense.safetensors: dense weights, batch norm's statistics and, if given, the optimizer's state."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for number, slots in (optimizer.state if optimizer else {}).items():
        tensors |= {f"optimizer.{number}.{name}": slot for name, slot in slots.items()}
    data: bytes = safetensors.torch.save(
        {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    )
    return data


def write_array(uri: str, array: Array) -> str:
    """Stream an array as .npy and return its sha256."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256()
    head = io.BytesIO()
    np.lib.format.write_array_header_2_0(head, np.lib.format.header_data_from_array_1_0(array))
    with storage.writer(uri) as file:
        _put(file, head.getvalue(), digest)
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, len(flat), 1 << 24):
            _put(file, flat[start : start + (1 << 24)].data, digest)
    return digest.hexdigest()


def _put(file: BinaryIO, data: bytes | memoryview, digest: Any) -> None:
    file.write(data)
    digest.update(data)


def read_array(folder: str, name: str, manifest: Manifest) -> Array:
    try:
        data = storage.read_bytes(storage.join(folder, name), manifest.files[name])
    except StorageError as error:
        raise CheckpointError(str(error)) from None
    array: Array = np.load(io.BytesIO(data), allow_pickle=False)
    return array
