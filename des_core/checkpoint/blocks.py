"""Blocks of rows in Arrow files, each block with its own digest, so that a range of ids is read and verified alone.

A block is one record batch: rows of one table whose ids lie in a range of prefixes, in ascending order of the ids as
unsigned numbers. A prefix is the 16 high bits of an id; a bucket, the unit of placement, is 256 prefixes. What one
worker writes in one save::

    weights-WORKER-PART.arrow    id, last, row             last: the newest step that looked the id up
    state-WORKER-PART.arrow      count, state              the rows of the weights' blocks, in their order
    waiting-WORKER-PART.arrow    id, last, count           ids that wait for admission
    gone-WORKER-PART.arrow       id                        ids that are known no more since the save before
    blocks-WORKER.json           Directory                 where each block lies, and its sha256

Files are uncompressed, so that a server maps them, and hold at most FILE_BYTES. Any Arrow tool reads them.

Source: Arrow columnar format, IPC file format.
Dims: n rows of a block, K numbers per row, Z numbers of optimizer state.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from des_core import storage
from des_core.contracts import Record
from des_core.errors import CheckpointError

Array = np.ndarray[Any, np.dtype[Any]]
Kind = Literal["weights", "state", "waiting", "gone"]

PREFIX_BITS = 16
PREFIXES = 1 << PREFIX_BITS
FILE_BYTES = 256 << 20
LEAST_BYTES, MOST_BYTES = 4 << 10, 1 << 20
"""A block holds about so much; between the two it is a 64th of a worker's share, so that one whose range ends inside
a block reads little in vain."""


class Block(NamedTuple):
    """Where a block lies: ``size`` bytes from ``offset`` on, the whole IPC message."""

    kind: str
    table: str
    first: int
    last: int
    """Prefixes of its ids, both inclusive."""
    rows: int
    file: str
    offset: int
    size: int
    sha256: str


class Directory(Record):
    """``blocks-WORKER.json``: the blocks of one worker, weights and state side by side."""

    width: int
    """Numbers per row, K."""
    state_width: int
    """Numbers of optimizer state per row, Z."""
    dtype: Literal["float32", "float64"]
    blocks: tuple[Block, ...]


class Written(Record):
    """What a worker wrote in one save."""

    directory: str
    """sha256 of ``blocks-WORKER.json``."""
    rows: int
    gone: int
    size: int
    """Bytes of all its files."""


def directory_name(worker: int) -> str:
    """Name of the file that says where a worker's blocks lie."""
    return f"blocks-{worker:05d}.json"


def prefixes(ids: Array) -> Array:
    """The 16 high bits of ids, int64."""
    return (ids.view(np.uint64) >> np.uint64(64 - PREFIX_BITS)).astype(np.int64)


def block_bytes(share: int) -> int:
    """Bytes that a block should have where a worker writes ``share`` bytes of rows and state."""
    return min(max(share // 64, LEAST_BYTES), MOST_BYTES)


def schema_of(kind: str, width: int, state_width: int, dtype: str) -> pa.Schema:
    """The columns of a kind of block."""
    number = pa.float32() if dtype == "float32" else pa.float64()
    identity, step = pa.field("id", pa.uint64(), False), pa.field("last", pa.uint32(), False)
    count = pa.field("count", pa.uint32(), False)
    columns = {
        "weights": [identity, step, pa.field("row", pa.list_(number, width), False)],
        "state": [count, *([pa.field("state", pa.list_(number, state_width), False)] if state_width else [])],
        "waiting": [identity, step, count],
        "gone": [identity],
    }
    return pa.schema(columns[kind])


class _Counted:
    """A file that knows how many bytes went into it, and the sha256 of those since it was last asked."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.position = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self.position += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: the storage flushes when the file is whole."""

    def close(self) -> None:
        """Nothing: the storage closes the file."""

    def take_sha256(self) -> str:
        digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
        return digest


class _File:
    """One open Arrow file."""

    def __init__(self, uri: str, schema: pa.Schema) -> None:
        self._stack = ExitStack()
        self._counted = _Counted(self._stack.enter_context(storage.writer(uri)))
        self._batches = pa.ipc.new_file(pa.PythonFile(self._counted, mode="w"), schema)
        # The file's head is written with its first batch, which holds no row, so that a block is its message alone.
        self._batches.write_batch(pa.RecordBatch.from_pylist([], schema=schema))
        self._counted.take_sha256()
        self.schema = schema

    @property
    def size(self) -> int:
        return self._counted.position

    def write(self, columns: list[pa.Array]) -> tuple[int, int, str]:
        """Offset, size and sha256 of a new block."""
        start = self._counted.position
        self._batches.write_batch(pa.record_batch(columns, schema=self.schema))
        return start, self._counted.position - start, self._counted.take_sha256()

    def close(self) -> None:
        self._batches.close()
        self._stack.close()

    def drop(self, error: BaseException) -> None:
        """Leave nothing behind."""
        self._stack.__exit__(type(error), error, error.__traceback__)


class BlockWriter:
    """Writes a worker's blocks and their directory; as a context manager, whole files or none.

    Args:
        folder: address of the layer.
        worker: number in the files' names.
        width, state_width: numbers per row and of its state.
        dtype: float32 or float64, of both.
    """

    def __init__(self, folder: str, worker: int, width: int, state_width: int, dtype: str) -> None:
        self._folder, self._worker = folder, worker
        self._form = (width, state_width, dtype)
        self._files: dict[str, _File] = {}
        self._parts: dict[str, int] = {}
        self._blocks: list[Block] = []
        self._size = 0

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        for file in self._files.values():
            if error is not None:
                file.drop(error)
        self._files = {}

    def add_rows(self, table: str, ids: Array, last: Array, rows_nK: Array, counts: Array, state_nZ: Array) -> None:
        """One block of rows, their ids ascending as unsigned numbers, and of their state."""
        state = [pa.array(counts)]
        if state_nZ.shape[1]:
            state.append(_lists(state_nZ))
        self._add("weights", table, ids, [pa.array(ids.view(np.uint64)), pa.array(last), _lists(rows_nK)])
        self._add("state", table, ids, state)

    def add_waiting(self, table: str, ids: Array, last: Array, counts: Array) -> None:
        """One block of ids that wait for admission, ascending."""
        self._add("waiting", table, ids, [pa.array(ids.view(np.uint64)), pa.array(last), pa.array(counts)])

    def add_gone(self, table: str, ids: Array) -> None:
        """One block of ids that are known no more, ascending."""
        self._add("gone", table, ids, [pa.array(ids.view(np.uint64))])

    def finish(self) -> Written:
        """Complete the files, write the directory, and say what was written."""
        for kind in list(self._files):
            self._complete(kind)
        width, state_width, dtype = self._form
        directory = Directory(
            width=width,
            state_width=state_width,
            dtype=dtype,
            blocks=tuple(self._blocks),
        )
        reference = directory.write(storage.join(self._folder, directory_name(self._worker)))
        rows, gone = (sum(block.rows for block in self._blocks if block.kind == kind) for kind in ("weights", "gone"))
        return Written(directory=reference.sha256, rows=rows, gone=gone, size=self._size)

    def _add(self, kind: str, table: str, ids: Array, columns: list[pa.Array]) -> None:
        if not len(ids):
            return
        if kind in self._files and self._files[kind].size >= FILE_BYTES:
            self._complete(kind)
        name = f"{kind}-{self._worker:05d}-{self._parts.get(kind, 0):03d}.arrow"
        if kind not in self._files:
            self._files[kind] = _File(storage.join(self._folder, name), schema_of(kind, *self._form))
        offset, size, sha256 = self._files[kind].write(columns)
        first, last = prefixes(ids[[0, -1]]).tolist()
        self._blocks.append(Block(kind, table, first, last, len(ids), name, offset, size, sha256))

    def _complete(self, kind: str) -> None:
        file = self._files.pop(kind)
        try:
            file.close()
        except BaseException as error:
            file.drop(error)
            raise
        self._size += file.size
        self._parts[kind] = self._parts.get(kind, 0) + 1


def _lists(numbers_nW: Array) -> pa.Array:
    flat = np.ascontiguousarray(numbers_nW).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), numbers_nW.shape[1])


class BlockReader:
    """Reads single blocks and verifies each; counts the bytes.

    Args:
        folder: address of the layer.
        directory: of one worker's blocks in it.
    """

    def __init__(self, folder: str, directory: Directory) -> None:
        self._folder = folder
        self._name, self._file = "", pa.BufferReader(b"")
        self.form = (directory.width, directory.state_width, directory.dtype)
        self.read_bytes = 0

    def batch(self, block: Block) -> pa.RecordBatch:
        """The columns of a block.

        Raises:
            CheckpointError: it is missing, or has other bytes than its directory says.
        """
        data = self.message(block)
        return pa.ipc.read_record_batch(pa.ipc.read_message(data), schema_of(block.kind, *self.form))

    def message(self, block: Block) -> pa.Buffer:
        """The bytes of a block, verified; raises as ``batch``."""
        uri = storage.join(self._folder, block.file)
        try:
            if self._name != block.file:
                filesystem, path = storage.resolve(uri)
                self._file, self._name = filesystem.open_input_file(path), block.file
            data: bytes = self._file.read_at(block.size, block.offset)
        except FileNotFoundError:
            raise CheckpointError(f"{uri} is missing, with the {where(block)}; start from another checkpoint") from None
        self.read_bytes += block.size
        if len(data) != block.size or hashlib.sha256(data).hexdigest() != block.sha256:
            raise CheckpointError(
                f"{uri}: the {where(block)} (bytes {block.offset} to {block.offset + block.size}) have other content "
                "than was written; start from another checkpoint"
            )
        return pa.py_buffer(data)


def where(block: Block) -> str:
    """What a block holds, for messages."""
    return f"{block.kind} of table {block.table}, prefixes {block.first} to {block.last}"


def numbers(column: pa.Array) -> Array:
    """A column's numbers: [n], or [n, W] of lists; a view."""
    lists = pa.types.is_fixed_size_list(column.type)
    values: Array = (column.flatten() if lists else column).to_numpy()
    return values.reshape(len(column), column.type.list_size) if lists else values
