"""Sketches of a part's fields: made as its rows are written, or from its file, and kept beside it.

    features/SPEC/PART/sketches-START-STOP.arrow    rows START to STOP, all of one file; says whose they are, and can be
                                                    made again

Dims: R rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit, uint64

from des_core import storage
from des_core.contracts import ROW_GROUP, FieldSpec, Part, RowsFile
from des_core.data.read.hashing import Array, hash_text, splitmix64
from des_core.data.read.parsing import one_chunk
from des_core.data.store.parts import RowGroups
from des_core.data.store.statistics import Sketch, Sketcher, merged


class Sketching:
    """Sketches rows [start, stop) of a part while all rows from ``start`` on are written in order."""

    def __init__(self, name: str, fields: Sequence[FieldSpec], start: int, stop: int) -> None:
        self._stream = hash_text(pa.array([name])).view(np.uint64)[0]
        self._fields = fields
        self._sketchers = [Sketcher(field) for field in fields]
        self._start, self._stop, self._row = start, stop, start

    def add(self, table: pa.Table) -> None:
        """Take in the next rows."""
        table = table.slice(0, max(self._stop - self._row, 0))
        if table.num_rows:
            draws_R = _draws(self._stream, self._row, table.num_rows)
            for field, sketcher in zip(self._fields, self._sketchers, strict=True):
                sketcher.add(one_chunk(table.column(field.name)), draws_R)
            self._row += table.num_rows

    def save(self, root: str, file: RowsFile, name: str) -> list[Sketch]:
        """Put the sketches beside the part's rows."""
        results = [sketcher.result() for sketcher in self._sketchers]
        if self._row > self._start:
            _write(_uri(root, name, self._start, self._row), results, _origin(file, self._fields))
        return results


def sketches(root: str, part: Part, name: str, fields: Sequence[FieldSpec], start: int, stop: int) -> list[Sketch]:
    """Each field's sketch over rows [start, stop) of a part: those beside its files, or new ones from their rows."""
    found = []
    for file, first, last in pieces_of(part, start, stop):
        known = _read(_uri(root, name, first, last), _origin(file, fields))
        found.append(known or _of_rows(root, part, name, file, fields, first, last))
    if len(found) == 1:
        return found[0]
    return [merged(field, [sketch[place] for sketch in found]) for place, field in enumerate(fields)]


def pieces_of(part: Part, start: int, stop: int) -> Iterator[tuple[RowsFile, int, int]]:
    """Rows [start, stop) of a part, file by file."""
    before = 0
    for file in part.files:
        first, last = max(start, before), min(stop, before + file.rows)
        before += file.rows
        if first < last:
            yield file, first, last


def _of_rows(
    root: str, part: Part, name: str, file: RowsFile, fields: Sequence[FieldSpec], start: int, stop: int
) -> list[Sketch]:
    sketching = Sketching(name, fields, start, stop)
    groups = RowGroups(root, part, [field.name for field in fields])
    for group in range(start // ROW_GROUP, -(-stop // ROW_GROUP)):
        sketching.add(groups.read(group).slice(max(start - group * ROW_GROUP, 0)))
    return sketching.save(root, file, name)


def _uri(root: str, name: str, start: int, stop: int) -> str:
    return storage.join(root, name, f"sketches-{start}-{stop}.arrow")


def _origin(file: RowsFile, fields: Sequence[FieldSpec]) -> str:
    """What sketches are of: the rows' digest and the fields."""
    return json.dumps({"rows": file.sha256, "fields": [field.model_dump(mode="json") for field in fields]})


@njit(nogil=True, cache=True)
def _draws(stream: Any, first: int, size: int) -> Array:
    """Counter hashes of rows [first, first + size)."""
    out = np.empty(size, np.uint64)
    for i in range(size):
        out[i] = splitmix64(stream ^ splitmix64(uint64(first + i)))
    return out


_SCALARS = {
    "rows": pa.int64(),
    "missing": pa.int64(),
    "lookups": pa.int64(),
    "mean": pa.float64(),
    "squares": pa.float64(),
}
_ARRAYS = {
    "keys": pa.int64(),
    "counts": pa.int64(),
    "registers": pa.uint8(),
    "draws": pa.uint64(),
    "sampled": pa.float32(),
}


def _write(uri: str, results: Sequence[Sketch], origin: str) -> None:
    columns = {name: pa.array([getattr(sketch, name) for sketch in results], kind) for name, kind in _SCALARS.items()}
    for name, kind in _ARRAYS.items():
        columns[name] = pa.array([getattr(sketch, name) for sketch in results], pa.list_(kind))
    table = pa.table(columns).replace_schema_metadata({"origin": origin})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    storage.write_bytes(uri, hashlib.sha256(data).digest() + data)


def _read(uri: str, origin: str) -> list[Sketch] | None:
    """The sketches at ``uri``, or None if there are none of that origin, or damaged ones: they can be made again."""
    if not storage.exists(uri):
        return None
    try:
        data = storage.read_bytes(uri)
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        table = pa.ipc.open_file(pa.BufferReader(data[32:])).read_all()
    except pa.ArrowException:
        return None
    if (table.schema.metadata or {}).get(b"origin") != origin.encode():
        return None
    return [
        Sketch(
            **{name: table.column(name)[row].as_py() for name in _SCALARS},
            **{name: table.column(name)[row].values.to_numpy() for name in _ARRAYS},
        )
        for row in range(table.num_rows)
    ]
