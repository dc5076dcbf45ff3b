"""The one road to storage: local paths, s3:// and gs:// through pyarrow.fs.

Write, then commit: a local file is written beside its place, synced and renamed; an object store
makes an object visible only when its upload completes. A reader therefore never meets half a file,
and readers trust only what a manifest names with its sha256.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, BinaryIO, cast

from pyarrow import fs as pafs

from des_core import remote
from des_core.errors import NO_ROOM, DamagedError, StorageError, UnavailableError, UserError

AT_ONCE_BYTES = 8 << 20
"""An object up to this size is sent in one piece."""

CONNECT_S, REQUEST_S = 5.0, 60.0
"""An object store that does not answer this long is tried again, and after three times it is an error."""


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path inside it for a local path or an address; names are not decoded.

    Raises:
        StorageError: no such bucket, or no right to it.
        UnavailableError: the store does not answer.
        UserError: an address of another kind, or with a password in it.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return pafs.LocalFileSystem(), os.path.abspath(uri)
    if scheme == "file":
        return pafs.LocalFileSystem(), os.path.abspath(rest)
    bucket, _, key = rest.partition("/")
    if "@" in bucket or ":" in bucket:
        raise UserError(
            f"{scheme}://***@{bucket.rpartition('@')[2]}: an address is stored with every result; "
            "give keys and endpoint in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        )
    if scheme not in ("s3", "gs") or not bucket:
        raise UserError(f"{uri}: write a place in storage as a path, s3://BUCKET/PATH or gs://BUCKET/PATH")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if scheme == "gs":
        endpoint = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return _store(scheme, bucket, endpoint), f"{bucket}/{key}".rstrip("/")


@cache
def _store(scheme: str, bucket: str, endpoint: str) -> pafs.FileSystem:
    """One client per bucket, which was seen to be there; a store that does not answer yet is waited for."""
    return remote.wait_for(f"{scheme}://{bucket}", lambda: _open(scheme, bucket, endpoint), remote.patience_s())


def _open(scheme: str, bucket: str, endpoint: str) -> pafs.FileSystem:
    try:
        if scheme == "gs":
            # An emulator, as all of Google's clients find it, asks for no credentials.
            protocol, _, host = endpoint.rpartition("://")
            place: dict[str, Any] = (
                {"endpoint_override": host, "scheme": protocol or "http", "anonymous": True} if endpoint else {}
            )
            limit = timedelta(seconds=CONNECT_S if endpoint else REQUEST_S)
            filesystem = pafs.GcsFileSystem(retry_time_limit=limit, **place)
        else:
            known = bool(endpoint or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))
            region = None if known else pafs.resolve_s3_region(bucket)
            filesystem = pafs.S3FileSystem(
                region=region,
                endpoint_override=endpoint or None,
                connect_timeout=CONNECT_S,
                request_timeout=REQUEST_S,
                allow_delayed_open=True,
            )
        there = filesystem.get_file_info(bucket).type != pafs.FileType.NotFound
    except OSError as error:
        at = f" at {endpoint}" if endpoint else ""
        reason = " ".join(str(error).split())
        kind = UnavailableError if remote.passing(error) else StorageError
        raise kind(f"{scheme}://{bucket}{at} cannot be reached: {reason}; check address and rights") from None
    if not there:
        raise StorageError(f"{scheme}://{bucket}: no such bucket; create it or correct the address")
    return filesystem


@contextmanager
def _answering(filesystem: pafs.FileSystem, uri: str) -> Iterator[None]:
    """A store's failure becomes one line with the address; that of a disk, and a missing file, stay as they are.

    Raises:
        UnavailableError: a failure that passes: the store does not answer, or is overloaded.
        StorageError: any other.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(filesystem, pafs.LocalFileSystem):
            raise
        remote.raise_passing(uri, error)
        raise StorageError(f"{uri}: the store failed: {' '.join(str(error).split())}") from None


def join(root: str, *parts: str) -> str:
    """``root/part/part``, for a path or an address."""
    return "/".join([root.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    with _answering(filesystem, uri):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def same(uri: str, other: str) -> bool:
    """Whether two addresses mean one file, by links too."""
    (filesystem, path), (others, there) = resolve(uri), resolve(other)
    if not (isinstance(filesystem, pafs.LocalFileSystem) and isinstance(others, pafs.LocalFileSystem)):
        return type(filesystem) is type(others) and path == there
    if os.path.exists(path) and os.path.exists(there):
        return os.path.samefile(path, there)
    return os.path.realpath(path) == os.path.realpath(there)


def list_folder(uri: str) -> list[str]:
    """Names directly under a folder, sorted; empty if there is no such folder."""
    filesystem, path = resolve(uri)
    with _answering(filesystem, uri):
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def delete(uri: str) -> None:
    """Remove a file or a whole folder; nothing happens where there is none."""
    filesystem, path = resolve(uri)
    with _answering(filesystem, uri):
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(path)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(path)


class _Upload(io.RawIOBase):
    """An object on its way to a store.

    A dropped upload completes its object as far as it came. So a small object is sent at once when all of it is there.
    A larger one is sent as it is written, for a local disk may be smaller than it: it has a digest in a manifest,
    without which nobody believes it, and one that failed half-way is deleted. A process that is killed leaves none.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str, uri: str) -> None:
        super().__init__()
        self._filesystem, self._path, self._uri = filesystem, path, uri
        self._held = bytearray()
        self._stream: Any = None
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._size += len(view)
        if self._stream is None:
            self._held += view
            if len(self._held) > AT_ONCE_BYTES:
                self._begin()
        else:
            with _answering(self._filesystem, self._uri):
                self._stream.write(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def _begin(self) -> None:
        with _answering(self._filesystem, self._uri):
            self._stream = self._filesystem.open_output_stream(self._path)
            self._stream.write(bytes(self._held))
        self._held.clear()

    def finish(self) -> None:
        """Make the object visible."""
        if self._stream is None:
            self._begin()
        with _answering(self._filesystem, self._uri):
            self._stream.close()

    def drop(self) -> None:
        """Leave no half of an object behind."""
        if self._stream is not None:
            with suppress(OSError, StorageError):
                self._stream.close()
            with suppress(OSError, StorageError):
                self._filesystem.delete_file(self._path)


@contextmanager
def writer(uri: str) -> Iterator[BinaryIO]:
    """A binary file that appears at ``uri`` whole when the block ends well, and not at all otherwise."""
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        upload = _Upload(filesystem, path, uri)
        try:
            yield cast(BinaryIO, upload)
            upload.finish()
        except BaseException:
            upload.drop()
            raise
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.partial-{os.getpid()}"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.errno in NO_ROOM | {errno.EIO} and error.filename is None:
            # Python does not say of which file.
            raise OSError(error.errno, error.strerror or str(error), path) from None
        raise
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
    return write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """What ``write_json`` writes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def read_bytes(uri: str, sha256: str | None = None) -> bytes:
    """A file's bytes.

    Raises:
        StorageError: it is missing, or its bytes differ from ``sha256``.
    """
    filesystem, path = resolve(uri)
    try:
        with _answering(filesystem, uri), filesystem.open_input_stream(path, compression=None) as stream:
            data: bytes = stream.readall()
    except FileNotFoundError:
        raise StorageError(f"{uri} is missing; run the step that writes it again") from None
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{uri} has other bytes than its manifest says; run the step that writes it again")
    return data


def read_json(uri: str, sha256: str | None = None) -> Any:
    """A JSON file's value.

    Raises:
        StorageError: as ``read_bytes``; DamagedError where it is no JSON.
    """
    data = read_bytes(uri, sha256)
    try:
        return json.loads(data)
    except ValueError:
        raise DamagedError(f"{uri} is damaged (it is not JSON); delete it, and run the step that writes it") from None


def copy(uri: str, to: str) -> None:
    """Write a file's bytes to another place, in pieces of 4 MiB."""
    filesystem, path = resolve(uri)
    with (
        _answering(filesystem, uri),
        filesystem.open_input_stream(path, compression=None) as stream,
        writer(to) as file,
    ):
        while piece := stream.read(1 << 22):
            file.write(piece)


def digest_file(uri: str) -> str:
    """The sha256 of a file, read in pieces of 4 MiB."""
    filesystem, path = resolve(uri)
    digest = hashlib.sha256()
    with _answering(filesystem, uri), filesystem.open_input_stream(path, compression=None) as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
