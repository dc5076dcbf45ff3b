"""A trained model that scores raw records, through the same hashing and the same forward code as training.

A registered model is ``des.json``: format and code version, config, fields with their frozen statistics, and a
reference of the checkpoint that training ended with. Its manifest names the dense part and every block of weights with
their digests (des_core/checkpoint). Nothing is merged or converted, and nothing copied; but of a checkpoint within
``registry.embed_limit`` the files that scoring reads lie beside des.json too, in the places that they have under
storage.root, so that a small model needs no storage. Unseen values contribute zero, as in evaluation.

Dims: B records, U unique ids, O fields with rows, K numbers per row.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from des_core import storage
from des_core.checkpoint import manifest as manifests
from des_core.checkpoint.manifest import DENSE, Manifest
from des_core.config import Config
from des_core.contracts import FILE, LABEL, ROW, Dataset, FieldSpec, Record, Reference, deep_names, read_as
from des_core.data.feed.batches import Stream, columns_of, dense_values, everything, sample_ids
from des_core.data.store.features import encode
from des_core.engine.dense_layers import Home
from des_core.engine.lookup import known_only, shard_of
from des_core.engine.models import Model, build
from des_core.engine.operators import totals_alone
from des_core.engine.weights import index, saving
from des_core.engine.weights.optimizer import Decay
from des_core.errors import CheckpointError, DataError, StorageError, UserError
from des_core.release.serve import weight_files
from des_core.release.serve.rows import Rows
from des_core.release.serve.weight_files import FIX, Part
from des_core.run import Run, relative_to_root

Array = np.ndarray[Any, np.dtype[Any]]

DESCRIPTION = "des.json"
BATCH = 8192
ROOT = "DES_STORAGE_ROOT"
"""Variable with the address that storage.root has on this machine, where it is another than in training."""
FORMAT = 4
"""Of des.json: it changes with what a model refers to."""


class Description(Record):
    """``des.json``: all that scoring needs beside the weights."""

    format: int = FORMAT
    code_version: str
    run_key: str
    task: Literal["click", "rating"]
    config: Config
    fields: tuple[FieldSpec, ...]
    checkpoint: str
    """Reference of the checkpoint's manifest, its path relative to storage.root."""


def write(run: Run, folder: str) -> None:
    """Describe the trained model of a run in a local folder; a small one's weights are copied there.

    Raises:
        StorageError: the run has no whole training.json.
        CheckpointError: its checkpoint is not whole.
    """
    from des_core import __version__

    reference = Reference.parse(storage.read_json(run.path("training.json"))["checkpoint"])
    manifest = manifests.read(reference)
    checkpoint = relative_to_root(run.config, reference)
    dataset = Dataset.load(run.dataset)
    inside = not os.path.isabs(checkpoint) and "://" not in checkpoint
    if inside and sum(layer.size for layer in manifest.layers) <= run.config.registry.embed_limit:
        weight_files.copy(reference, manifest, run.config.storage.root, folder)
    description = Description(
        code_version=__version__,
        run_key=run.key,
        task=dataset.task,
        config=run.config.recorded,
        fields=dataset.fields,
        checkpoint=checkpoint,
    )
    description.write(os.path.join(folder, DESCRIPTION))


def read(folder: str) -> Description:
    """The description of a registered model in a local folder.

    Raises:
        StorageError: it is missing or damaged.
        UserError: another version of DES wrote it.
    """
    uri = os.path.join(folder, DESCRIPTION)
    described = storage.read_json(uri)
    found = described.get("format") if isinstance(described, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{uri}: the model has format {found}, this version of DES reads {FORMAT}; train and register it again"
        )
    return Description.read(uri)


def _located(description: Description, folder: str, root: str) -> Reference:
    """The checkpoint's manifest: beside des.json, or under the first root that has it.

    Raises:
        CheckpointError: none has.
    """
    named = Reference.parse(description.checkpoint)
    if os.path.isabs(named.uri) or "://" in named.uri:
        return named
    roots = [folder, root, os.environ.get(ROOT, ""), description.config.storage.root]
    uris = [storage.join(root, named.uri) for root in dict.fromkeys(filter(None, roots))]
    found = next(filter(storage.exists, uris), "")
    if not found:
        raise CheckpointError(
            f"the model's checkpoint is missing ({', '.join(uris[1:] or uris)}); bring it back, say by {ROOT} where "
            "storage.root is now, or train and register the model again"
        )
    return Reference(found, named.sha256)


class Scored(NamedTuple):
    """Scores of records, and per field with rows how many values they had and how many of these no row."""

    scores_B: Array
    values_O: Array
    unknown_O: Array


class Scorer:
    """A registered model, loaded for scoring in one process.

    Args:
        folder: a local folder with des.json.
        root: where storage.root is now, if known; else the variable DES_STORAGE_ROOT or des.json say it.
        beside: a model in this process, whose files are not verified again where they are this one's too.
        memory: most bytes of weights' files to keep in the process's memory; 0: the system decides.

    Raises:
        StorageError: des.json is missing or damaged.
        UserError: it is of another format.
        CheckpointError: weights are missing, or have other bytes than were written.
    """

    def __init__(self, folder: str, root: str = "", beside: Scorer | None = None, memory: int = 0) -> None:
        self.description = description = read(folder)
        self._fields = read_as(description.fields, "rows")
        self._inputs = read_as(description.fields, "dense")
        self.columns = {
            column: field.name for field in description.fields for column in (field.column, field.weight) if column
        }
        """Columns that records must have, and a field that each is for."""
        self.names = [field.name for field in self._fields]
        """Fields whose values own rows, O."""
        reference = _located(description, folder, root)
        manifest = manifests.read(reference)
        self._model = self._network(reference, manifest)
        self._parts: dict[str, Part] = {}
        self.rows = self._mapped(reference, manifest, {} if beside is None else beside._parts, memory)
        if self.rows.dtype == np.float64:
            self._model.double()
        self._decay, self._steps = Decay(manifest.trainer["decays"]), manifest.step
        self._ownership = everything(self._fields)
        self._fields_O = torch.arange(len(deep_names(self._fields)))
        self._wide = len(self._fields) - len(self._fields_O)
        tables = [field.table for field in self._fields]
        self._tables_O = np.array([manifest.shape.tables.index(table) for table in tables], np.int64)
        # Whoever sends records must not be able to choose ids that meet in one place.
        self._secret = np.uint64(int.from_bytes(os.urandom(8), "little") | 1)

    def _network(self, reference: Reference, manifest: Manifest) -> Model:
        """The dense part; its sizes are compared with the file before memory is taken for them."""
        path, description = storage.join(reference.uri.rpartition("/")[0], DENSE), self.description
        try:
            data = storage.read_bytes(path, manifest.files.get(DENSE, ""))
        except StorageError as error:
            raise CheckpointError(f"{error}, or train and register the model again") from None
        head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        there = {key: tuple(head[key]["shape"]) for key in head if key != "__metadata__"}
        names = deep_names(self._fields)
        wanted = (description.config.model, names, len(self._inputs), description.config.run.seed)
        with torch.device("meta"):
            sizes = {name: tuple(tensor.shape) for name, tensor in build(*wanted).state_dict().items()}
        if sizes != there:
            odd = next(name for name in sorted({*sizes, *there}) if sizes.get(name) != there.get(name))
            raise CheckpointError(
                f"{path} does not fit des.json: {odd} has shape {there.get(odd)} and should have {sizes.get(odd)}; "
                "train and register the model again"
            )
        model = build(*wanted)
        if any(head[key]["dtype"] == "F64" for key in there):
            model.double()
        saving.load_dense_bytes(data, model)
        return model.eval()

    def _mapped(self, reference: Reference, manifest: Manifest, known: dict[str, Part], memory: int) -> Rows:
        """The rows of the checkpoint, in mapped files."""
        unknown = {field.table for field in self._fields} - set(manifest.shape.tables)
        if unknown:
            raise CheckpointError(f"{reference.uri} has no table {sorted(unknown)[0]!r}, which des.json names; {FIX}")
        layers = weight_files.mapped(reference, manifest, known)
        self._parts = {sha256: part for layer in layers for sha256, part in layer.items()}
        self.verified_bytes = sum(
            file.size for sha256, part in self._parts.items() if sha256 not in known for file in part.files
        )
        """Bytes of weights' files that were opened for this model."""
        parts = [list(layer.values()) for layer in layers]
        return Rows(parts, manifest.shape.tables, self._model.row_width, memory)

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
        ids_U, inverse_L, first_U, _ = index.dedupe(lookups.ids, self._secret)
        found = self.rows.find(ids_U, self._tables_O[lookups.piece[first_U]])
        values_O = np.bincount(lookups.piece, minlength=len(self.names))
        unknown_O = np.bincount(lookups.piece[(found.block_U < 0)[inverse_L]], minlength=len(self.names))
        lookups = known_only(lookups, inverse_L, found.block_U)
        rows_UK = self.rows.rows(found)
        if self._decay.pieces:
            # Storage holds rows as their last step left them.
            rows_UK *= self._decay.missed(self.rows.last(found), self._steps + 1)[:, None].astype(rows_UK.dtype)
        rows = torch.from_numpy(rows_UK)
        inputs_BM = torch.from_numpy(dense_values(features, self._inputs)).to(rows.dtype)
        shard = shard_of(lookups, inverse_L, rows, features.num_rows, self._fields_O, inputs_BM, self._wide)
        # In training's order of additions: what is read by no operator is not formed on the way.
        operators = self._model.by_name.values()
        by_field, squares = any(op.by_field for op in operators), any(op.squares for op in operators)
        shard = replace(shard, by_field=by_field, squares=squares)
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
