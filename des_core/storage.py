"""The one road to storage: local paths, s3:// and gs:// through pyarrow.fs.

Write, then commit: a local file is written beside its place, synced and renamed; an object store
makes an object visible only when its upload completes. A reader therefore never meets half a file,
and readers trust only what a manifest names with its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from pyarrow import fs as pafs

from des_core.errors import StorageError


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path inside it for a local path or a ``scheme://`` address."""
    if "://" in uri:
        filesystem, path = pafs.FileSystem.from_uri(uri)
        return filesystem, path
    return pafs.LocalFileSystem(), os.path.abspath(uri)


def join(root: str, *parts: str) -> str:
    """``root/part/part``, for a path or an address."""
    return "/".join([root.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def list_folder(uri: str) -> list[str]:
    """Names directly under a folder, sorted; empty if there is no such folder."""
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def delete(uri: str) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    filesystem, path = resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == pafs.FileType.File:
        filesystem.delete_file(path)


@contextmanager
def writer(uri: str) -> Iterator[BinaryIO]:
    """A binary file that appears at ``uri`` whole when the block ends well, and not at all otherwise."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        # A dropped upload stream completes its object as far as it came: nothing is sent before all is written.
        with tempfile.TemporaryFile() as file:
            yield cast(BinaryIO, file)
            file.seek(0)
            with filesystem.open_output_stream(path) as stream:
                shutil.copyfileobj(file, stream, 1 << 22)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def write_bytes(uri: str, data: bytes) -> str:
    """Write ``data`` atomically and return its sha256."""
    with writer(uri) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def write_json(uri: str, value: Any) -> str:
    """Write canonical, indented JSON atomically and return its sha256."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return write_bytes(uri, (text + "\n").encode())


def read_bytes(uri: str, sha256: str | None = None) -> bytes:
    """A file's bytes.

    Raises:
        StorageError: it is missing, or its bytes differ from ``sha256``.
    """
    filesystem, path = resolve(uri)
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            data: bytes = stream.readall()
    except FileNotFoundError:
        raise StorageError(f"{uri} is missing; run the step that writes it again") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise StorageError(f"{uri} has other bytes than its manifest says; run the step that writes it again")
    return data


def read_json(uri: str, sha256: str | None = None) -> Any:
    """A JSON file's value; raises as ``read_bytes``."""
    return json.loads(read_bytes(uri, sha256))


def digest_file(uri: str) -> str:
    """The sha256 of a file, read in pieces of 4 MiB."""
    filesystem, path = resolve(uri)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
