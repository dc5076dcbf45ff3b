"""A trained model that scores raw records, through the same hashing and the same forward code as training.

The exported folder holds ``des.json`` (format and code version, config, fields with their frozen
statistics), ``index.npy`` (index entries, then the ids in row order), ``rows.npy`` (weights, no optimizer
state; both are memory-mapped) and ``dense.safetensors``. Weights above ``registry.embed_limit`` stay under
storage.root, and des.json carries their addresses. Unseen values contribute zero, as in evaluation.

Dims: B records, U unique ids, O fields with rows, K numbers per row, C index entries, S rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.layers import Layers
from des_core.checkpoint.manifest import Manifest
from des_core.config import Config
from des_core.contracts import FILE, LABEL, ROW, Dataset, FieldSpec, Record, Reference, read_as
from des_core.data.feed.batches import Stream, columns_of, dense_values, everything, sample_ids
from des_core.data.store.features import encode
from des_core.engine.dense_layers import Home
from des_core.engine.lookup import known_only, shard_of
from des_core.engine.models import Model, build
from des_core.engine.operators import totals_alone
from des_core.engine.weights import index, saving
from des_core.engine.weights.optimizer import Decay
from des_core.errors import DamagedError, DataError, StorageError, UserError
from des_core.release.serve import cache
from des_core.run import Run

Array = np.ndarray[Any, np.dtype[Any]]

DENSE, DESCRIPTION = "dense.safetensors", "des.json"
WEIGHTS = ("index.npy", "rows.npy")
BATCH = 8192
FORMAT = 3
"""Of the exported folder: it changes with the index's layout."""


class Description(Record):
    """``des.json``: all that scoring needs beside the weights."""

    format: int = FORMAT
    code_version: str
    run_key: str
    task: Literal["click", "rating"]
    config: Config
    fields: tuple[FieldSpec, ...]
    capacity: int
    """Index entries, C: the first C numbers of index.npy."""
    rows: int
    sha256: dict[str, str]
    """Digest of each weights file."""
    uri: dict[str, str] = {}
    """Addresses of weights files that are not in the folder."""


def export(run: Run) -> str:
    """Write the trained model of a run to its ``model`` folder and return the folder's address.

    Raises:
        StorageError: the run has no whole training.json or checkpoint.
    """
    training = storage.read_json(run.path("training.json"))
    reference = Reference.parse(training["checkpoint"])
    manifest = manifests.read(reference)
    ids, rows = _merged(reference, manifest)
    dataset = Dataset.load(run.dataset)
    model = build(run.config.model, len(dataset.row_fields), len(dataset.dense_fields), run.config.run.seed)
    saving.load_dense(reference, manifest, model.double() if rows.dtype == np.float64 else model)
    write(run.path("model"), run.key, run.config, dataset.task, dataset.fields, ids, rows, model)
    return run.path("model")


def write(
    folder: str,
    run_key: str,
    config: Config,
    task: Literal["click", "rating"],
    fields: tuple[FieldSpec, ...],
    ids: Array,
    rows: Array,
    model: Model,
) -> None:
    """Write a model to a folder: distinct ids [S], their rows [S, K] and the dense part."""
    from des_core import __version__

    entries = np.zeros(index.capacity_for(len(ids)), np.uint64)
    index.place(entries, ids, 0, len(ids))
    arrays = {"index.npy": np.concatenate([entries.view(np.int64), ids]), "rows.npy": rows}
    digests = {name: write_array(storage.join(folder, name), array) for name, array in arrays.items()}
    digests[DENSE] = storage.write_bytes(storage.join(folder, DENSE), saving.dense_bytes(model))
    large = sum(array.nbytes for array in arrays.values()) > config.registry.embed_limit
    description = Description(
        code_version=__version__,
        run_key=run_key,
        task=task,
        config=config.recorded,
        fields=fields,
        capacity=len(entries),
        rows=len(ids),
        sha256=digests,
        uri={name: storage.join(folder, name) for name in WEIGHTS} if large else {},
    )
    description.write(storage.join(folder, "des.json"))


def _merged(reference: Reference, manifest: Manifest) -> tuple[Array, Array]:
    """Ids, ascending, and rows at the last step, without rows that are zero."""
    layers, decay = Layers(reference, manifest, state=False), Decay(manifest.trainer["decays"])
    ids, rows = [np.empty(0, np.int64)], []
    for table in manifest.shape.tables:
        for piece, _ in layers.between(table):
            weights = np.array(piece.rows_nK)
            if decay.pieces and len(weights):
                weights *= decay.missed(piece.last, manifest.step + 1)[:, None].astype(weights.dtype)
            kept = weights.any(1)
            ids.append(piece.ids[kept])
            rows.append(weights[kept])
    merged = np.concatenate(ids)
    order = np.argsort(merged)
    return merged[order], np.concatenate([part for part in rows if len(part)] or rows[:1])[order]


def write_array(uri: str, array: Array) -> str:
    """Stream an array as .npy and return its sha256."""
    array = np.ascontiguousarray(array)
    digest = hashlib.sha256()
    head = io.BytesIO()
    np.lib.format.write_array_header_2_0(head, np.lib.format.header_data_from_array_1_0(array))
    with storage.writer(uri) as file:
        _put(file, head.getvalue(), digest)
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, len(flat), 1 << 24):
            _put(file, flat[start : start + (1 << 24)].data, digest)
    return digest.hexdigest()


def _put(file: BinaryIO, data: bytes | memoryview, digest: Any) -> None:
    file.write(data)
    digest.update(data)


class Scored(NamedTuple):
    """Scores of records, and per field with rows how many values they had and how many of these no row."""

    scores_B: Array
    values_O: Array
    unknown_O: Array


class Scorer:
    """An exported model, loaded for scoring in one process.

    Args:
        folder: a local folder that ``export`` wrote, or a copy of one.
        private: weights that lie in storage are copied even from this machine, so that nobody who writes there takes
            mapped memory away from a process that lives long.

    Raises:
        StorageError: a file is missing or changed.
    """

    def __init__(self, folder: str, private: bool = False) -> None:
        uri = os.path.join(folder, DESCRIPTION)
        described = storage.read_json(uri)
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            found = described.get("format") if isinstance(described, dict) else None
            raise UserError(
                f"{uri}: the model has format {found}, this version of DES reads {FORMAT}; train and register it again"
            )
        self.description = description = Description.read(uri)
        self._folder, self._private = folder, private
        self._fields = read_as(description.fields, "rows")
        self._inputs = read_as(description.fields, "dense")
        self.columns = {
            column: field.name for field in description.fields for column in (field.column, field.weight) if column
        }
        """Columns that records must have, and a field that each is for."""
        self.names = [field.name for field in self._fields]
        """Fields whose values own rows, O."""
        self._model = self._network()
        self._entries, self._ids = self._index()
        self._rows_SK = self._array("rows.npy", (description.rows, self._model.row_width), "f")
        if self._rows_SK.dtype == np.float64:
            self._model.double()
        self._ownership = everything(self._fields)
        self._fields_O = torch.arange(len(self._fields))
        # Whoever sends records must not be able to choose ids that meet in one place.
        self._secret = np.uint64(int.from_bytes(os.urandom(8), "little") | 1)

    def _network(self) -> Model:
        """The dense part; its sizes are compared with the file before memory is taken for them."""
        path, description = os.path.join(self._folder, DENSE), self.description
        data = storage.read_bytes(path, description.sha256.get(DENSE, ""))
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        there = {key: tuple(head[key]["shape"]) for key in head if key != "__metadata__"}
        wanted = (description.config.model, len(self._fields), len(self._inputs), description.config.run.seed)
        with torch.device("meta"):
            sizes = {name: tuple(tensor.shape) for name, tensor in build(*wanted).state_dict().items()}
        if sizes != there:
            odd = next(name for name in sorted({*sizes, *there}) if sizes.get(name) != there.get(name))
            raise DamagedError(
                f"{path} does not fit des.json: {odd} has shape {there.get(odd)} and should have {sizes.get(odd)}; "
                "export the model again"
            )
        model = build(*wanted)
        saving.load_dense_bytes(data, model)
        return model.eval()

    def _index(self) -> tuple[Array, Array]:
        """Index entries [C] and ids [S]; no entry points elsewhere, and some are free, or a search would not end."""
        rows, capacity = self.description.rows, self.description.capacity
        packed = self._array("index.npy", (capacity + rows,), "i")
        entries, ids = packed[:capacity].view(np.uint64), packed[capacity:]
        fits = rows >= 0 and capacity == index.capacity_for(rows)
        if not fits or np.count_nonzero(entries) != rows or int((entries & np.uint64(0xFFFFFFFF)).max()) > rows:
            raise DamagedError(f"{self._folder}: index.npy is no index of {rows:,} rows; export the model again")
        return entries, ids

    def _array(self, name: str, shape: tuple[int, ...], kind: str) -> Array:
        """The numbers of a weights file, read from disk as they are needed."""
        path = self._weights(name)
        try:
            # A plain array, for views of a memmap cost more.
            array: Array = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except ValueError as error:
            raise DamagedError(f"{path} is no array of numbers ({error}); export the model again") from None
        if array.shape != shape or array.dtype.kind != kind or array.dtype.itemsize < 4:
            raise DamagedError(
                f"{path} holds {array.dtype} {array.shape} and should hold {shape} by des.json; export the model again"
            )
        return array

    def _weights(self, name: str) -> str:
        """Local path of a weights file, verified; one that stayed in storage is fetched once."""
        local, wanted = os.path.join(self._folder, name), self.description.sha256.get(name, "")
        address = self.description.uri.get(name, "")
        if address and not os.path.exists(local):
            if "://" in address or self._private:
                return cache.fetch(address, wanted)
            local = address
        if not os.path.exists(local):
            raise StorageError(f"{local} is missing; the model {self._folder} is not whole")
        if storage.digest_file(local) != wanted:
            raise DamagedError(f"{local} has other bytes than des.json says; export the model again")
        return local

    def score(self, records: pa.Table) -> Array:
        """Probabilities (rating: predictions) of raw records, float64 [B].

        Raises:
            DataError: a column that the model reads is absent, or a value does not parse; no value is shown.
        """
        return self.scored(records).scores_B

    def scored(self, records: pa.Table) -> Scored:
        """As ``score``, with what the model did not know."""
        source = self.description.config.source
        for column, field in self.columns.items():
            if column not in records.column_names:
                raise DataError(f"field {field}: the records have no column {column!r}; it may hold null, but not lack")
        scores, values_O, unknown_O = [np.empty(0)], np.zeros(len(self.names), int), np.zeros(len(self.names), int)
        for at in range(0, records.num_rows, BATCH):
            piece = records.slice(at, BATCH)
            features = encode(
                piece,
                self.description.fields,
                source.timezone,
                source.missing,
                quoted=False,
                time_formats={source.time: source.time_format},
            )
            part = self._forward(features)
            wrong = not_finite(part.scores_B)
            if len(wrong):
                raise DataError(f"record {at + wrong[0] + 1}: {self.blame(features, int(wrong[0]))}")
            scores.append(part.scores_B)
            values_O += part.values_O
            unknown_O += part.unknown_O
        return Scored(np.concatenate(scores), values_O, unknown_O)

    def blame(self, features: pa.Table, row: int) -> str:
        """Why a row has no finite score: its number that is furthest out. No value is shown."""
        numbers = [field.name for field in self.description.fields if field.kind == "numeric"]
        sizes = {name: abs(features.column(name)[row].as_py() or 0.0) for name in numbers}
        worst = max(sizes, key=lambda name: sizes[name], default="")
        return "its score is not a finite number" + (f"; field {worst} is too large for the model" if worst else "")

    def score_features(self, features: pa.Table) -> Array:
        """Probabilities (rating: predictions) of feature columns, float64 [B]."""
        return self._forward(features).scores_B

    @torch.inference_mode()
    def _forward(self, features: pa.Table) -> Scored:
        lookups = self._ownership.lookups(features)
        ids_U, inverse_L, _, _ = index.dedupe(lookups.ids, self._secret)
        slots_U = index.find(self._entries, self._ids, ids_U)
        values_O = np.bincount(lookups.piece, minlength=len(self.names))
        unknown_O = np.bincount(lookups.piece[(slots_U < 0)[inverse_L]], minlength=len(self.names))
        lookups = known_only(lookups, inverse_L, slots_U)
        rows_UK = (
            np.ascontiguousarray(self._rows_SK[np.maximum(slots_U, 0)])
            if len(self._ids)
            else np.zeros((len(slots_U), self._model.row_width), self._rows_SK.dtype)
        )
        rows = torch.from_numpy(rows_UK)
        inputs_BM = torch.from_numpy(dense_values(features, self._inputs)).to(rows.dtype)
        shard = shard_of(lookups, inverse_L, rows, features.num_rows, self._fields_O, inputs_BM)
        totals = totals_alone(self._model.by_name, shard)
        home = Home(start=0, stop=features.num_rows, samples=features.num_rows, inputs_BM=inputs_BM)
        logits_B = self._model(totals, home)
        scores_B = torch.sigmoid(logits_B) if self.description.task == "click" else logits_B
        return Scored(scores_B.double().numpy(), values_O, unknown_O)

    def score_dataset(self, dataset: Reference, split: str) -> tuple[list[str], Array, Array]:
        """Sample ids ``DIGEST:ROW``, labels and predictions of a split of a feature store with the same fields."""
        files = Dataset.load(dataset).files
        wanted = [column for field in self.description.fields for column in columns_of(field)]
        samples: list[str] = []
        labels, scores = [], []
        for batch in Stream(dataset, split, [*wanted, LABEL, FILE, ROW]).batches(BATCH):
            scores.append(self.score_features(batch))
            labels.append(batch.column(LABEL).to_numpy())
            ids = sample_ids(batch, files).to_pylist()
            wrong = not_finite(scores[-1])
            if len(wrong):
                raise DataError(f"sample {ids[wrong[0]]}: {self.blame(batch, int(wrong[0]))}")
            samples += ids
        return samples, np.concatenate(labels), np.concatenate(scores)


def not_finite(scores_B: Array) -> Array:
    """Positions of the scores that are no numbers to go on with."""
    return np.flatnonzero(~np.isfinite(scores_B))
