"""A checkpoint's manifest: the layers that its rows come from, the dense part, and where training stood.

    checkpoints/RUN/step-0000000120/{weights,state,waiting,gone}-*.arrow  blocks-*.json    a layer (blocks.py)
    checkpoints/RUN/step-0000000120/{dense,dense-state}.safetensors     dense weights; their optimizer's state
    checkpoints/RUN/step-0000000120/measured.json                       what clocks decide; not digested
    checkpoints/RUN/step-0000000120/manifest.json                       Manifest, written last
    checkpoints/RUN/last.json                                           reference of the newest manifest

A whole layer holds all rows, a delta those that were looked up since the save before it, and the ids that are gone. The
manifest names every layer that counts, the whole one first, which may lie in folders of other steps and of other runs:
a day's run goes on from its champion's layers. So a file is needed for as long as any manifest names it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

from pydantic import field_validator

from des_core import log, storage
from des_core.checkpoint.blocks import Block, BlockReader, Directory, directory_name
from des_core.contracts import Record, Reference
from des_core.errors import CheckpointError, StorageError

FORMAT = 4

DENSE, DENSE_STATE = "dense.safetensors", "dense-state.safetensors"


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


class Layer(Record):
    """The blocks of one save."""

    run: str
    """Folder of its run beside that of the manifest's run."""
    name: str
    """Folder of its step, like ``step-0000000120``."""
    step: int
    rows: int
    gone: int = 0
    size: int
    """Bytes of its blocks' files."""
    directories: tuple[str, ...]
    """sha256 of ``blocks-WORKER.json``, by worker."""

    @field_validator("run", "name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[\w.-]+", name) or set(name) == {"."}:
            raise ValueError(f"{name!r} is no folder's name")
        return name


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
    layers: tuple[Layer, ...]
    """The whole one, then deltas, the newest last."""
    files: dict[str, str]
    """sha256 by name of the dense parts, beside the manifest."""

    @property
    def step(self) -> int:
        """Steps trained."""
        return int(self.trainer["step"])


class Last(Record):
    """``last.json``: the newest checkpoint."""

    checkpoint: str

    @property
    def reference(self) -> Reference:
        """Of its manifest."""
        return Reference.parse(self.checkpoint)


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:010d}"


def manifest_uri(folder: str, step: int) -> str:
    """Address of the manifest of a step's checkpoint in the folder of its run."""
    return storage.join(folder, folder_name(step), "manifest.json")


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
    found = manifests(folder)
    return reference(found[-1]) if found else None


def manifests(folder: str) -> list[str]:
    """Addresses of the manifests in the folder of a run, the newest step last."""
    uris = [storage.join(folder, name, "manifest.json") for name in storage.list_folder(folder) if _is_step(name)]
    return [uri for uri in uris if storage.exists(uri)]


def _is_step(name: str) -> bool:
    return name.startswith("step-")


def measured(reference: Reference) -> dict[str, Any]:
    """The measurements that lie beside a manifest; empty where they are missing or damaged."""
    uri = storage.join(reference.uri.rpartition("/")[0], "measured.json")
    try:
        found = storage.read_json(uri) if storage.exists(uri) else {}
    except StorageError:
        return {}
    return found if isinstance(found, dict) else {}


def read(reference: Reference, shape: Shape | None = None) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        CheckpointError: another version of DES wrote it, it is for another shape of model, or it is not whole; the
            message names the checkpoints before it that can be read.
    """
    try:
        document = reference.read()
    except StorageError as error:
        raise CheckpointError(f"{error}{_others(reference)}") from None
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        fix = "convert it: des checkpoint convert" if found == 3 else "train from the start"
        raise CheckpointError(f"{reference.uri} has format {found}, this version of DES reads {FORMAT}; {fix}")
    try:
        manifest = Manifest.load(reference)
    except StorageError as error:
        raise CheckpointError(f"{error}{_others(reference)}") from None
    difference = manifest.shape.differs_from(shape) if shape is not None else ""
    if difference:
        name = reference.uri.split("/")[-2]
        raise CheckpointError(
            f"checkpoint {name} was {difference}; set it back, or start from another checkpoint ({reference.uri})"
        )
    return manifest


def _others(reference: Reference) -> str:
    """The newest other checkpoint of the run, for a message."""
    uris = [uri for uri in manifests(run_folder(reference)) if uri != reference.uri]
    return f"; the checkpoint before it is {uris[-1]}" if uris else ""


def run_folder(reference: Reference) -> str:
    """Address of the folder with all checkpoints of a manifest's run."""
    return reference.uri.rsplit("/", 2)[0]


def layer_folder(reference: Reference, layer: Layer) -> str:
    """Address of a layer that a manifest names."""
    return storage.join(reference.uri.rsplit("/", 3)[0], layer.run, layer.name)


def readers(reference: Reference, layer: Layer) -> list[tuple[BlockReader, tuple[Block, ...]]]:
    """The blocks of each worker that wrote a layer, and what reads them; raises as ``directories``."""
    folder = layer_folder(reference, layer)
    return [(BlockReader(folder, directory), directory.blocks) for directory in directories(reference, layer)]


def directories(reference: Reference, layer: Layer) -> list[Directory]:
    """Where the blocks of each worker that wrote a layer lie.

    Raises:
        CheckpointError: a directory is missing, or has other bytes than the manifest says.
    """
    folder = layer_folder(reference, layer)
    found = []
    for worker, sha256 in enumerate(layer.directories):
        uri = storage.join(folder, directory_name(worker))
        try:
            found.append(Directory.load(Reference(uri, sha256)))
        except StorageError as error:
            raise CheckpointError(
                f"{error}: {reference.uri} needs its layer of step {layer.step}{_others(reference)}"
            ) from None
    return found


def prune(folder: str, keep: set[str]) -> None:
    """Delete the checkpoints of a run whose manifests are not in ``keep``, manifests first.

    Layers stay that a manifest in ``keep`` names.
    """
    gone = [uri for uri in manifests(folder) if uri not in keep]
    needed = {name for uri in keep if storage.exists(uri) for name in layers_in(folder, [reference(uri)])}
    for uri in gone:
        storage.delete(uri)
    for name in storage.list_folder(folder):
        here = storage.join(folder, name)
        if _is_step(name) and storage.join(here, "manifest.json") not in keep and name not in needed:
            storage.delete(here)


def layers_in(folder: str, kept: Iterable[Reference]) -> set[str]:
    """Names of the folders in the folder of a run whose layers some manifests name."""
    run = folder.rstrip("/").rpartition("/")[2]
    return {layer.name for one in kept for layer in read(one).layers if layer.run == run}
