"""Every error a user can meet, as one tree. Exit code 2 is the user's to mend, 1 anything else.

A message is one line; it names the file, key, row or value, and the fix.
"""

from __future__ import annotations

import errno


class DesError(Exception):
    """Root of the tree; ``exit_code`` is what a command leaves with."""

    exit_code = 1


class UserError(DesError):
    """Something the user gave is wrong, and the message says how to mend it."""

    exit_code = 2


class ConfigError(UserError):
    """A key or value of the run's TOML, or of ``--set``."""


class DataError(UserError):
    """A raw log: missing, empty, or not as the config says."""


class UnusableLogsError(DataError):
    """A raw log that is itself at fault: empty, broken or with too many bad records."""


class NoLogsError(DataError):
    """No raw log at all where days are expected: they may still come."""


class CheckpointError(UserError):
    """A checkpoint that does not fit the run, or is not whole."""


class RegistryError(UserError):
    """MLflow refuses, or has no such model."""


class BusyError(DesError):
    """Another run of the same name is at work; later it may go."""


class UnavailableError(DesError):
    """A server that did not answer for as long as it may be waited for; it may answer later."""


class WorkerError(DesError):
    """A worker died, froze or lost its peers."""


class StorageError(DesError):
    """A file that a manifest promises is missing or has other bytes."""


class DamagedError(StorageError):
    """A file of ours that is not as it was written: other bytes, or not of its form."""


OTHER_PLACE = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG))
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
TOO_MANY = frozenset((errno.EMFILE, errno.ENFILE))


def of_system(error: OSError) -> DesError | None:
    """One line for what a disk or its rights refuse; None for anything else, which nobody foresaw."""
    what = " ".join((error.strerror or str(error)).split())[:300]
    told = f"{error.filename}: {what}" if error.filename else what
    if error.errno in OTHER_PLACE:
        return UserError(f"{told}; choose another place or change its rights")
    if error.errno in NO_ROOM:
        return StorageError(f"{told}; make room and start it again, what is done is kept")
    if error.errno in TOO_MANY:
        return StorageError(f"{told}; raise the limit (ulimit -n)")
    if error.errno == errno.ENOENT and error.filename:
        return StorageError(f"{told}; was it deleted meanwhile?")
    if error.errno == errno.EIO:
        return StorageError(f"{told}; the disk or the network file system is at fault")
    return None
