"""Copies of large weights files on this machine, by their digest: fetched once, verified at every use, bounded.

    DES_CACHE/SHA256    DES_CACHE: by default des-cache in the temporary folder

More than DES_CACHE_BYTES (8 GiB) are not kept: the files that were used longest ago go first. One that a process has
mapped stays readable to it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress

from des_core import log, storage
from des_core.errors import DamagedError, StorageError
from des_core.processes import is_alive

LIMIT_BYTES = 8 << 30
PIECE = 1 << 22


def fetch(uri: str, sha256: str) -> str:
    """Path of a local copy of a file, which has this digest.

    Raises:
        StorageError: the file is missing, or has another digest.
    """
    path = os.path.join(folder(), sha256)
    with suppress(FileNotFoundError):
        if storage.digest_file(path) == sha256:
            os.utime(path)
            return path
        log.emit("damaged", copy=path, why="it has other bytes than its name says; it is fetched again")
        os.remove(path)
    filesystem, inner = storage.resolve(uri)
    size = filesystem.get_file_info(inner).size
    if size is None:
        raise StorageError(f"{uri} is missing; bring it back, or train and register the model again")
    os.makedirs(folder(), exist_ok=True)
    make_room(size)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner) as stream, storage.writer(path) as file:
        while piece := stream.read(PIECE):
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != sha256:
            raise DamagedError(f"{uri} has other bytes than des.json says; export the model again")
    return path


def folder() -> str:
    """The folder of the copies."""
    return os.environ.get("DES_CACHE") or os.path.join(tempfile.gettempdir(), "des-cache")


def make_room(size: int) -> None:
    """Delete copies, those used longest ago first, until ``size`` bytes more are within the limit."""
    limit = int(os.environ.get("DES_CACHE_BYTES") or LIMIT_BYTES)
    found: list[tuple[float, int, str]] = []
    with os.scandir(folder()) as entries:
        for entry in entries:
            owner = entry.name.rpartition(".partial-")[2]
            if ".partial-" in entry.name and not (owner.isdecimal() and is_alive(int(owner))):
                os.remove(entry.path)
                continue
            with suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
    used = sum(size_ for _, size_, _ in found)
    for _, held, path in sorted(found):
        if used + size <= limit:
            return
        if ".partial-" not in path:
            with suppress(FileNotFoundError):
                os.remove(path)
            used -= held
