"""A checkpoint's weights as mapped files on this machine, each block verified before a row of it is served.

A file is mapped where it lies, or, where storage is an object store, as a copy that is fetched first (cache.py). A
lookup then reads one or two pages of it. Of a checkpoint's files only weights and gone ids are opened, never training
state. What one process has verified and mapped, it need not verify again: the next version's checkpoint is the same
files, known by the digest of their directory, and a new layer.

Files are written once, under another name, and renamed; they are deleted by unlinking, which takes nothing from a
process that has mapped them. A file that somebody truncates in its place ends every process that has it mapped.

Source: Linux, mmap(2) and madvise(2), MADV_RANDOM; Arrow columnar format, IPC file format.
Dims: K numbers per row.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from des_core import log, storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.blocks import Block, Directory, directory_name, schema_of, where
from des_core.checkpoint.manifest import Manifest
from des_core.contracts import Reference
from des_core.errors import CheckpointError
from des_core.release.serve import cache

SERVED = ("weights", "gone")
"""Kinds of blocks that scoring reads."""

AT_ONCE = 8
"""Files that are fetched and verified at a time, each block by block."""

FIX = "bring it back, or train and register the model again"


class MappedBlock(NamedTuple):
    """Where a block's columns lie in memory."""

    block: Block
    ids: int
    """Address of the ids, uint64."""
    last: int
    """Address of the last steps, uint32; 0 for ids that are gone."""
    numbers: int
    """Address of the rows; 0 for ids that are gone."""


class Part(NamedTuple):
    """What one worker wrote in one save, mapped."""

    width: int
    """Numbers per row, K."""
    dtype: str
    blocks: list[MappedBlock]
    files: list[pa.Buffer]


def mapped(reference: Reference, manifest: Manifest, known: Mapping[str, Part]) -> list[dict[str, Part]]:
    """The parts of each layer by the digest of their directory, the whole layer first.

    Args:
        known: parts that are mapped already.

    Raises:
        CheckpointError: a file is missing or has other bytes than the checkpoint's manifest says.
    """
    layers: list[dict[str, Part]] = []
    wanted: list[_File] = []
    for layer in manifest.layers:
        parts = {sha256: known[sha256] for sha256 in layer.directories if sha256 in known}
        if len(parts) < len(layer.directories):
            folder = manifests.layer_folder(reference, layer)
            for sha256, directory in zip(layer.directories, manifests.directories(reference, layer), strict=True):
                if sha256 not in parts:
                    parts[sha256] = Part(directory.width, directory.dtype, [], [])
                    wanted += _files(folder, sha256, directory, parts[sha256])
        layers.append(parts)
    cache.make_room({file.copy: file.size for file in wanted if not file.is_local})
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="verify") as pool:
        for file, (buffer, blocks) in zip(wanted, pool.map(_File.open, wanted), strict=True):
            file.part.files.append(buffer)
            file.part.blocks.extend(blocks)
    return layers


def copy(reference: Reference, manifest: Manifest, root: str, target: str) -> None:
    """Copy what scoring reads of a checkpoint under ``root`` to the same places under the folder ``target``."""
    uris = [reference.uri, storage.join(reference.uri.rpartition("/")[0], manifests.DENSE)]
    for layer in manifest.layers:
        folder = manifests.layer_folder(reference, layer)
        for worker, directory in enumerate(manifests.directories(reference, layer)):
            names = {block.file for block in directory.blocks if block.kind in SERVED}
            uris += [storage.join(folder, name) for name in (directory_name(worker), *sorted(names))]
    for uri in uris:
        filesystem, path = storage.resolve(uri)
        place = storage.join(target, uri.removeprefix(root.rstrip("/") + "/"))
        try:
            with filesystem.open_input_stream(path) as stream, storage.writer(place) as file:
                shutil.copyfileobj(stream, file, 1 << 22)
        except FileNotFoundError:
            raise CheckpointError(f"{uri} is missing, and the model's checkpoint names it; train again") from None


class _File:
    """One file of a part, still to be opened."""

    def __init__(self, uri: str, copy: str, blocks: list[Block], directory: Directory, part: Part) -> None:
        self.part = part
        self.copy = copy
        """Its name among the copies."""
        self.size = max(block.offset + block.size for block in blocks)
        self._uri, self._blocks, self._directory = uri, blocks, directory
        self.is_local = isinstance(storage.resolve(self._uri)[0], pafs.LocalFileSystem)

    def open(self) -> tuple[pa.Buffer, list[MappedBlock]]:
        """The mapped file and its blocks, all of them verified; a copy with a fault is fetched again."""
        if self.is_local:
            return self._opened()
        if cache.has(self.copy):
            try:
                return self._opened()
            except CheckpointError as error:
                log.emit("damaged", copy=self.copy, why=str(error), next="it is fetched again")
                cache.drop(self.copy)
        try:
            return self._opened()
        except CheckpointError:
            cache.drop(self.copy)
            raise

    def _opened(self) -> tuple[pa.Buffer, list[MappedBlock]]:
        with self._file() as file:
            for block in self._blocks:
                data = os.pread(file.fileno(), block.size, block.offset)
                if hashlib.sha256(data).hexdigest() != block.sha256:
                    raise CheckpointError(
                        f"{self._uri}: the {where(block)} (bytes {block.offset} to {block.offset + block.size}) have "
                        f"other content than was written; {FIX}"
                    )
            return self._map(file)

    def _file(self) -> BinaryIO:
        try:
            if self.is_local:
                return open(storage.resolve(self._uri)[1], "rb")
            return cache.fetch(self._uri, self.copy)
        except FileNotFoundError:
            raise CheckpointError(f"{self._uri} is missing, with the {where(self._blocks[0])}; {FIX}") from None

    def _map(self, file: BinaryIO) -> tuple[pa.Buffer, list[MappedBlock]]:
        # Not by its name, which may be another file's by now.
        with pa.memory_map(f"/proc/self/fd/{file.fileno()}") as mapping:
            buffer = mapping.read_buffer()
        advise(buffer, mmap.MADV_RANDOM, 0, buffer.size)
        form = (self._directory.width, self._directory.state_width, self._directory.dtype)
        return buffer, [self._placed(buffer, block, schema_of(block.kind, *form)) for block in self._blocks]

    def _placed(self, buffer: pa.Buffer, block: Block, schema: pa.Schema) -> MappedBlock:
        """Where a block's columns lie."""
        try:
            message = pa.ipc.read_message(buffer.slice(block.offset, block.size))
            batch = pa.ipc.read_record_batch(message, schema)
        except pa.ArrowException as error:
            raise CheckpointError(f"{self._uri}: the {where(block)} are no block of Arrow ({error}); {FIX}") from None
        columns = [batch.column("id")]
        if block.kind == "weights":
            columns += [batch.column("last"), batch.column("row").flatten()]
        places = [column.buffers()[1].address for column in columns]
        inside = all(buffer.address <= place < buffer.address + buffer.size for place in places)
        if batch.num_rows != block.rows or not inside:
            raise CheckpointError(f"{self._uri}: the {where(block)} are not as their directory says; {FIX}")
        return MappedBlock(block, *places, *[0] * (3 - len(places)))


def _files(folder: str, sha256: str, directory: Directory, part: Part) -> list[_File]:
    """The files of a directory that scoring reads."""
    blocks: dict[str, list[Block]] = {}
    for block in directory.blocks:
        if block.kind in SERVED:
            blocks.setdefault(block.file, []).append(block)
    return [
        _File(storage.join(folder, name), f"{sha256}/{name}", found, directory, part) for name, found in blocks.items()
    ]


_LIBC = ctypes.CDLL(None, use_errno=True)


def advise(buffer: pa.Buffer, advice: int, start: int, size: int) -> None:
    """Tell the system how a piece of a mapped file will be used (madvise); it may not care."""
    _LIBC.madvise(ctypes.c_void_p(buffer.address + start), ctypes.c_size_t(size), advice)
