"""Every error that a user can meet, as one tree of classes.

A message is one line; it names the file, key, row or value, and the fix. What a program decides by is the class, never
the message. Between processes the class travels as its ``code``, a word that stays the same from version to version;
docs/operations.md lists the codes.
"""

from __future__ import annotations

import errno


class DesError(Exception):
    """Root of the tree, and any failure without a class of its own."""

    code = "failed"
    exit_code = 1
    """What a command leaves with: 2 where the user can mend it, 1 anything else."""
    transient = False
    """Whether the same command may succeed later although nobody has changed anything."""


class UserError(DesError):
    """Something that the user gave is wrong, and the message says how to mend it."""

    code = "mistake"
    exit_code = 2


class ConfigError(UserError):
    """A key or value of the run's TOML, or of ``--set``."""

    code = "config"


class DataError(UserError):
    """A raw log is missing, empty, or not as the config says."""

    code = "data"


class UnusableLogsError(DataError):
    """A raw log is itself at fault: empty, broken, or with too many bad records."""

    code = "unusable-logs"


class NoLogsError(DataError):
    """There is no raw log at all where days are expected; they may still arrive."""

    code = "no-logs"


class NotFiniteError(UserError):
    """The loss of a batch is not a finite number."""

    code = "not-finite"


class CheckpointError(UserError):
    """A checkpoint does not fit the run, or is not whole."""

    code = "checkpoint"


class RegistryError(UserError):
    """MLflow refuses a request, or has no such model."""

    code = "registry"


class BusyError(DesError):
    """Another run of the same name is active."""

    code = "busy"
    transient = True


class UnavailableError(DesError):
    """A server did not answer for as long as it is waited for."""

    code = "unavailable"
    transient = True


class WorkerError(DesError):
    """A training or scoring worker failed."""

    code = "worker"
    transient = True


class PeerLostError(WorkerError):
    """A worker lost the connection to another one, whose own failure is the cause."""

    code = "peer-lost"


class KilledError(WorkerError):
    """A worker was killed from outside."""

    code = "killed"


class OutOfMemoryError(WorkerError):
    """A worker was killed because its memory limit was too low."""

    code = "out-of-memory"
    transient = False


class DeadlineError(WorkerError):
    """A job ran for longer than the config allows."""

    code = "deadline"
    transient = False


class QueueTimeoutError(WorkerError):
    """A job waited in its queue for longer than the config allows."""

    code = "queue-timeout"


class PodStartError(WorkerError):
    """A job's pods could not start: no image, no room, no volume."""

    code = "pod-start"
    transient = False


class StorageError(DesError):
    """A file that a manifest promises is missing or has other bytes, or the disk refuses."""

    code = "storage"


class DamagedError(StorageError):
    """A file that DES wrote is not as it was written: other bytes, or not of its form."""

    code = "damaged"


def error_classes(root: type[DesError] = DesError) -> list[type[DesError]]:
    """The classes of this file, parents first."""
    own = [root] if root.__module__ == __name__ else []
    return own + [each for child in root.__subclasses__() for each in error_classes(child)]


def error_of(code: str, message: str) -> DesError:
    """The error that another process reported."""
    return next((each for each in error_classes() if each.code == code), DesError)(message)


OTHER_PLACE = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG))
NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
TOO_MANY = frozenset((errno.EMFILE, errno.ENFILE))


def of_system(error: OSError) -> DesError | None:
    """The error of one line for a refusal by the disk or its access rights; None for any other error."""
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
