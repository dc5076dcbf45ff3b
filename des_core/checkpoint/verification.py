"""Whether every byte that a checkpoint needs is there as it was written."""

from __future__ import annotations

from typing import NamedTuple

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.contracts import Reference
from des_core.errors import CheckpointError, StorageError


class Verified(NamedTuple):
    """What was read, and what is wrong with it."""

    blocks: int
    read_bytes: int
    faults: tuple[str, ...]
    """One line for each block or file that is missing or has other content."""


def verify(reference: Reference) -> Verified:
    """Read every block of every layer, one at a time.

    Raises:
        CheckpointError: the manifest itself cannot be read.
    """
    manifest = manifests.read(reference)
    blocks, read_bytes, faults = 0, 0, list[str]()
    for layer in manifest.layers:
        try:
            parts = manifests.readers(reference, layer)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for reader, listed in parts:
            for block in listed:
                blocks += 1
                try:
                    reader.message(block)
                except CheckpointError as error:
                    faults.append(str(error))
            read_bytes += reader.read_bytes
    folder = reference.uri.rpartition("/")[0]
    for name, sha256 in manifest.files.items():
        try:
            read_bytes += len(storage.read_bytes(storage.join(folder, name), sha256))
        except StorageError as error:
            faults.append(str(error))
    return Verified(blocks, read_bytes, tuple(faults))
