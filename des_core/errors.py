"""Every error a user can meet, as one tree. Exit code 2 is the user's to mend, 1 anything else.

A message is one line; it names the file, key, row or value, and the fix.
"""

from __future__ import annotations


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
