"""A checkpoint's weights as Parquet, for other tools: one file per table, read and written piece by piece.

    TABLE.parquet    field   the fields that share the table, joined by |
                     key     int64: the value's hash (hashing.py), or the place in its list of a bucketed number
                     weight  the linear weight, w
                     factors list of k numbers, v

Decay that rows have missed since they were last looked up is applied. Rows at zero are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.compaction import joined
from des_core.checkpoint.layers import Layers, Rows
from des_core.checkpoint.manifest import Manifest
from des_core.contracts import FieldSpec, Reference
from des_core.data.feed.batches import keys_of
from des_core.engine.weights.optimizer import Decay

GROUP = 1 << 15
"""Rows of a row group."""


def export_parquet(
    reference: Reference, fields: Sequence[FieldSpec], folder: str, tell: Callable[[str, int], None]
) -> dict[str, int]:
    """Write the tables of a checkpoint to a folder; rows written, by the file's name.

    Args:
        fields: of the run that wrote it.
        tell: is called after each table with its name and rows.

    Raises:
        CheckpointError: it is not whole, or of another version of DES.
    """
    manifest = manifests.read(reference)
    layers = Layers(reference, manifest, state=False)
    width, _, dtype = layers.form
    number = pa.from_numpy_dtype(np.dtype(dtype))
    factors = pa.list_(number, width - 1) if width > 1 else None
    columns = [("field", pa.dictionary(pa.int32(), pa.string())), ("key", pa.int64()), ("weight", number)]
    schema = pa.schema(columns + ([("factors", factors)] if factors else []))
    written = {}
    for table in manifest.shape.tables:
        names = "|".join(field.name for field in fields if field.table == table)
        rows = 0
        with (
            storage.writer(storage.join(folder, f"{table}.parquet")) as file,
            pq.ParquetWriter(file, schema, use_dictionary=["field"]) as parquet,
        ):
            for piece, _ in joined(layers.between(table), GROUP):
                records = _records(piece, table, names, manifest, schema)
                parquet.write_batch(records)
                rows += records.num_rows
        tell(table, rows)
        written[f"{table}.parquet"] = rows
    return written


def _records(piece: Rows, table: str, names: str, manifest: Manifest, schema: pa.Schema) -> pa.RecordBatch:
    rows_nK, decay = piece.rows_nK, Decay(manifest.trainer["decays"])
    if decay.pieces and len(rows_nK):
        rows_nK = rows_nK * decay.missed(piece.last, manifest.step + 1)[:, None].astype(rows_nK.dtype)
    kept = rows_nK.any(1) if len(rows_nK) else np.zeros(0, np.bool_)
    rows_nK = rows_nK[kept]
    keys = keys_of(piece.ids[kept], table)
    field = pa.DictionaryArray.from_arrays(np.zeros(len(keys), np.int32), [names])
    columns = [field, pa.array(keys), pa.array(np.ascontiguousarray(rows_nK[:, 0]))]
    if len(schema) > 3:
        flat = np.ascontiguousarray(rows_nK[:, 1:]).reshape(-1)
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), rows_nK.shape[1] - 1))
    return pa.record_batch(columns, schema=schema)
