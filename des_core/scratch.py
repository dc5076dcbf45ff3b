"""Temporary folders under one parent; those of processes that were killed are deleted by the next start.

TMPDIR/des-USER/PID-WHAT-RANDOM
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from des_core.processes import is_alive


def make(what: str) -> str:
    """A new empty folder of this process, which the caller deletes."""
    base = _base()
    for name in os.listdir(base):
        owner = name.partition("-")[0]
        if owner.isdecimal() and not is_alive(int(owner)):
            shutil.rmtree(os.path.join(base, name), ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{os.getpid()}-{what}-", dir=base)


@contextmanager
def folder(what: str) -> Iterator[str]:
    """A new empty folder that is deleted after the block."""
    path = make(what)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _base() -> str:
    """The parent folder, which no other user can write to."""
    base = os.path.join(tempfile.gettempdir(), f"des-{os.getuid()}")
    with suppress(FileExistsError):
        os.mkdir(base, 0o700)
    status = os.lstat(base)
    if status.st_uid != os.getuid() or not os.path.isdir(base) or os.path.islink(base):
        # Another user has taken the name: do without the common folder.
        return tempfile.mkdtemp(prefix="des-")
    return base
