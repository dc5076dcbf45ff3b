"""One part of the feature store: Parquet files, its bad rows, its sketches, and a manifest written last.

    features/SPEC/PART/rows-DIGEST.parquet    row groups of ROW_GROUP rows; the digest names its own bytes. The rows of
                                              a part's files are one order; all files but the last have equally many
    features/SPEC/PART/quarantine.csv         file, line, reason of the bad records; absent if there are none
    features/SPEC/PART/manifest.json          PartManifest: what made the part, and what it holds
    features/SPEC/PART/sketches-ROWS.arrow    what those rows' fields hold (sketches.py)

Nothing in a file tells when or where it was written: the same log gives the same bytes.
"""

from __future__ import annotations

import hashlib
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from des_core import log, remote, storage
from des_core.contracts import ROW, ROW_GROUP, TIME, Form, Part, Record, Reference, RowsFile
from des_core.errors import DamagedError, StorageError


class PartManifest(Record):
    """A whole part: trusted only if ``spec`` and ``sources`` are those of the run."""

    format: Literal[3] = 3
    spec: str
    """``Config.features_digest`` of the config that made it."""
    sources: tuple[str, ...]
    """Sha256 of every raw file and side table, in order."""
    files: int
    """How many of ``sources`` are raw files; ``_file`` counts them from 0."""
    part: Part
    outside: int = 0
    """Good rows whose time lies outside the day that their file is of."""
    held_out: int = 0
    """Rows at the end that were set apart for validation."""
    lacks: tuple[str, ...] = ()
    """Columns that a raw file did not have; their fields are newer."""
    forms: dict[str, Form] = {}
    """Field, or ``_group`` -> what its values are (forms.py)."""
    texts: dict[str, tuple[tuple[int, str], ...]]
    """Field -> keys and texts of frequent values."""

    def write(self, uri: str) -> Reference:
        """Write this record with its own digest, for nothing else names it before a run does."""
        content = self.model_dump(mode="json")
        return Reference(uri, storage.write_json(uri, content | {"digest": self.written_sha256}))

    @classmethod
    def read(cls, uri: str) -> PartManifest:
        """A part's manifest.

        Raises:
            StorageError: missing, damaged, or of another version.
        """
        document = storage.read_json(uri)
        digest = document.pop("digest", "") if isinstance(document, dict) else ""
        manifest = cls._checked(uri, document)
        if manifest.written_sha256 != digest:
            raise DamagedError(f"{uri} has other content than was written")
        return manifest


def manifest_uri(root: str, name: str) -> str:
    """Address of a part's manifest under the feature store ``root``."""
    return storage.join(root, name, "manifest.json")


def whole_part(root: str, name: str) -> PartManifest | None:
    """A part's manifest if the part is complete by its footer, whatever spec and sources it was made from."""
    uri = manifest_uri(root, name)
    if not storage.exists(uri):
        return None
    try:
        manifest = PartManifest.read(uri)
    except DamagedError as error:
        log.emit("damaged", manifest=uri, why=str(error))
        return None
    return manifest if all(is_whole(root, file) for file in manifest.part.files) else None


def is_whole(root: str, file: RowsFile) -> bool:
    """Whether a file is there, complete by its footer."""
    uri = storage.join(root, file.path)
    if not storage.exists(uri):
        return False
    if footer_of(uri) == file.footer:
        return True
    log.emit("damaged", part=uri, why="its footer has other bytes than its manifest says; it is made again")
    return False


def current_part(root: str, name: str, spec: str, sources: tuple[str, ...]) -> PartManifest | None:
    """A part's manifest if the part is whole, and made by this spec of files with these digests."""
    manifest = whole_part(root, name)
    return manifest if manifest is not None and (manifest.spec, manifest.sources) == (spec, sources) else None


class Digested:
    """A file that knows the sha256 of what was written to it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: the storage flushes when the file is whole."""

    def close(self) -> None:
        """Nothing: the storage closes the file."""

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def write_rows(root: str, name: str, tables: Iterable[pa.Table], look: Callable[[pa.Table], None]) -> RowsFile:
    """Write a file of a part's rows, at least one, each page with its checksum.

    Args:
        look: is shown each row group on its way.
    """
    incoming = storage.join(root, name, f"incoming-{uuid.uuid4().hex}.parquet")
    rows = 0
    with storage.writer(incoming) as file:
        digested = Digested(file)
        # Pages come in small pieces.
        buffered = pa.BufferedOutputStream(pa.PythonFile(digested, mode="w"), 1 << 20)
        writer = None
        for table in _row_groups(tables):
            if writer is None:
                writer = _parquet_writer(buffered, table.schema)
            writer.write_table(table, row_group_size=ROW_GROUP)
            look(table)
            rows += table.num_rows
        if writer is not None:
            writer.close()
        buffered.flush()
    path = f"{name}/rows-{digested.hexdigest()[:16]}.parquet"
    footer = footer_of(incoming)
    filesystem, source = storage.resolve(incoming)
    filesystem.move(source, storage.resolve(storage.join(root, path))[1])
    return RowsFile(path=path, sha256=digested.hexdigest(), footer=footer, rows=rows)


def open_rows(root: str, rows: RowsFile) -> pq.ParquetFile:
    """A file's rows for reading; what is read is checked, page by page.

    Raises:
        StorageError: the file is missing, or its footer has other bytes than the manifest says. Reading raises
            OSError where a page has other bytes than were written.
    """
    uri = storage.join(root, rows.path)
    filesystem, path = storage.resolve(uri)
    try:
        file = filesystem.open_input_file(path)
        if hashlib.sha256(_footer(file)).hexdigest() != rows.footer:
            raise OSError("its footer has other bytes than its manifest says")
        return pq.ParquetFile(file, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise damaged(uri, error) from None


class RowGroups:
    """Row groups of a part, counted over all of its files; what is read is checked.

    Args:
        columns: to read.
    """

    OPEN = 16
    """Files that are kept open."""

    def __init__(self, root: str, part: Part, columns: Sequence[str]) -> None:
        self._root, self._part, self._columns = root, part, list(columns)
        self._starts = [0, *accumulate(-(-file.rows // ROW_GROUP) for file in part.files)]
        self._opened: dict[int, pq.ParquetFile] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, group: int, threads: bool = False) -> pa.Table:
        """One row group.

        Raises:
            StorageError: its file is missing, or has other bytes than were written.
        """
        place = bisect_right(self._starts, group) - 1
        if place not in self._opened:
            if len(self._opened) >= self.OPEN:
                self._opened.pop(next(iter(self._opened))).close(force=True)
            self._opened[place] = open_rows(self._root, self._part.files[place])
        try:
            return self._opened[place].read_row_group(
                group - self._starts[place], columns=self._columns, use_threads=threads
            )
        except (OSError, pa.ArrowException) as error:
            raise damaged(storage.join(self._root, self._part.files[place].path), error) from None


def damaged(uri: str, error: Exception) -> StorageError:
    """The error of a part that cannot be read as it was written.

    Raises:
        UnavailableError: nothing is known of the part, because the store does not answer.
    """
    remote.raise_passing(uri, error)
    why = " ".join(str(error).split())[:200]
    return StorageError(f"{uri} is damaged or missing ({why}); delete its folder and run des ingest again")


def footer_of(uri: str) -> str:
    """sha256 of a Parquet file's footer, which holds the file's length and the places and codecs of its rows."""
    filesystem, path = storage.resolve(uri)
    with filesystem.open_input_file(path) as file:
        return hashlib.sha256(_footer(file)).hexdigest()


def _footer(file: pa.NativeFile) -> bytes:
    """The bytes from where a Parquet file's metadata begin to its end."""
    size = file.size()
    length = int.from_bytes(file.read_at(4, max(size - 8, 0)), "little")
    return bytes(file.read_at(min(length + 8, size), max(size - 8 - length, 0)))


def _parquet_writer(file: pa.NativeFile, schema: pa.Schema) -> pq.ParquetWriter:
    # Places and times hardly repeat, and neighbours are close to each other: a dictionary would only be in the way.
    # What a dictionary and its short indices leave to compress is 6 % with zstd, which doubles the time to read.
    repeated = [name for name in schema.names if name not in (ROW, TIME)]
    paths = [f"{name}.list.element" if pa.types.is_list(schema.field(name).type) else name for name in repeated]
    return pq.ParquetWriter(
        file,
        schema,
        compression="snappy",
        use_dictionary=paths,
        column_encoding={ROW: "DELTA_BINARY_PACKED", TIME: "DELTA_BINARY_PACKED"},
        write_statistics=False,
        write_page_checksum=True,
    )


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of ROW_GROUP rows, the last one shorter."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        while rows + table.num_rows >= ROW_GROUP:
            cut = ROW_GROUP - rows
            yield pa.concat_tables([*held, table.slice(0, cut)])
            held, rows, table = [], 0, table.slice(cut)
        if table.num_rows:
            held.append(table)
            rows += table.num_rows
    if held:
        yield pa.concat_tables(held)
