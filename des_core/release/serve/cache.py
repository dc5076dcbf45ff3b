"""Copies of weights files of an object store on this machine: fetched once, bounded.

    DES_CACHE/DIRECTORY/FILE    DIRECTORY: sha256 of the ``blocks-WORKER.json`` that names the file's blocks
                                DES_CACHE: by default des-cache in the temporary folder

Versions of a model share files, so a new one fetches only what its last layer adds. Who opens a copy verifies it block
by block (weight_files.py). More than DES_CACHE_BYTES (8 GiB) are not kept: the files that were used longest ago go
first, but none that is wanted now. One that a process has mapped stays readable to it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from typing import BinaryIO

from des_core import storage
from des_core.processes import is_alive

LIMIT_BYTES = 8 << 30
PIECE = 1 << 22


def fetch(uri: str, name: str) -> BinaryIO:
    """A copy of a file, open to be read; it is fetched where there is none.

    Args:
        name: of the copy, ``DIRECTORY/FILE``.

    Raises:
        FileNotFoundError: the file is missing.
    """
    path = os.path.join(folder(), name)
    with suppress(FileNotFoundError):
        os.utime(path)
        return open(path, "rb")
    filesystem, inner = storage.resolve(uri)
    with filesystem.open_input_stream(inner) as stream, storage.writer(path) as file:
        shutil.copyfileobj(stream, file, PIECE)
        file.flush()
        # Here, for another process may make room before the copy has its name.
        number = os.open(file.name, os.O_RDONLY)
    return open(number, "rb")


def has(name: str) -> bool:
    """Whether there is a copy."""
    return os.path.exists(os.path.join(folder(), name))


def drop(name: str) -> None:
    """Delete a copy."""
    with suppress(FileNotFoundError):
        os.remove(os.path.join(folder(), name))


def folder() -> str:
    """The folder of the copies."""
    return os.environ.get("DES_CACHE") or os.path.join(tempfile.gettempdir(), "des-cache")


def make_room(wanted: Mapping[str, int]) -> None:
    """Delete copies, those used longest ago first, until the wanted ones are within the limit.

    Args:
        wanted: sizes by name.
    """
    if not wanted:
        return
    limit = int(os.environ.get("DES_CACHE_BYTES") or LIMIT_BYTES)
    found: list[tuple[float, int, str]] = []
    used = sum(wanted.values())
    for place, _, names in os.walk(folder()):
        for name in names:
            path = os.path.join(place, name)
            owner = name.rpartition(".partial-")[2]
            with suppress(FileNotFoundError):
                if ".partial-" in name:
                    if not (owner.isdecimal() and is_alive(int(owner))):
                        os.remove(path)
                elif os.path.relpath(path, folder()) not in wanted:
                    found.append((os.stat(path).st_mtime, os.stat(path).st_size, path))
                    used += found[-1][1]
    for _, size, path in sorted(found):
        if used <= limit:
            return
        with suppress(FileNotFoundError):
            os.remove(path)
        with suppress(OSError):
            os.rmdir(os.path.dirname(path))
        used -= size
