"""Raw records of a file -> CSV of ``sample,probability``, in the file's order, by a registered model.

Records are read as ingestion reads them, under the source settings that the model carries (or those of a config that
is given), except that nothing but the model's own columns is needed. A record that ingestion would put into quarantine
gets no line here either; the caller is told how many there were, and why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv

from des_core import storage
from des_core.addresses import sqlite_address
from des_core.config import Config, SourceConfig
from des_core.contracts import FieldSpec
from des_core.data import sources
from des_core.data.encoding import encode_checked
from des_core.data.joins import load_sides
from des_core.data.paths import digest_of
from des_core.errors import DataError, RegistryError

if TYPE_CHECKING:
    from des_core.release.serving import Scorer

BATCH = 8192


@dataclass(frozen=True)
class Scored:
    """How a file's records fared."""

    rows: int
    bad: int
    first_reason: str
    """Why the first bad one was left out."""


def tracking_uri(model: str, config: Config | None) -> str:
    """Where to look a model up: the config's registry, MLflow's own variable, or the run folder of the model's name.

    Raises:
        RegistryError: none of these is there.
    """
    if config is not None:
        return config.registry.tracking_uri
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return os.environ["MLFLOW_TRACKING_URI"]
    name = model.removeprefix("models:/").partition("@")[0].partition("/")[0]
    database = Path("runs", name, "mlflow.db").absolute()
    if database.exists():
        return sqlite_address(str(database))
    raise RegistryError(f"{model}: no registry known; give the run's config with -c FILE or set MLFLOW_TRACKING_URI")


def predict(folder: str, path: str, output: str, config: Config | None = None) -> Scored:
    """Score a file with the model in ``folder`` and write the CSV whole or not at all.

    Raises:
        DataError: the file is missing, lacks a column, or holds no good record; or it is the output too.
    """
    from des_core.release.serving import Scorer

    if storage.same(path, output):
        raise DataError(f"--output {output} is the file that is read; scores would replace it: name another file")
    digest = digest_of(path)[:16]
    scorer = Scorer(folder)
    source = _fitting(sources.source_of(config or scorer.description.config), path)
    rows, bad = 0, list[tuple[int, str]]()
    schema = pa.schema([("sample", pa.string()), ("probability", pa.float64())])
    options = pcsv.WriteOptions(include_header=False, quoting_style="none")
    with storage.writer(output) as file, pcsv.CSVWriter(file, schema, write_options=options) as writer:
        # Arrow would put names in quotes.
        file.write(b"sample,probability\n")
        for chunk in _chunks(source, path, scorer.description.fields):
            numbers, scores, faults = _score(scorer, chunk, source)
            samples = [f"{digest}:{row}" for row in numbers]
            writer.write_table(pa.table([samples, scores], schema=schema))
            rows += len(samples)
            bad += faults
        if not rows:
            raise DataError(f"{path}: no record to score" + (f"; line {bad[0][0]}: {bad[0][1]}" if bad else ""))
    return Scored(rows, len(bad), f"line {bad[0][0]}: {bad[0][1]}" if bad else "")


def _score(
    scorer: Scorer, chunk: sources.Chunk, source: SourceConfig
) -> tuple[list[int], np.ndarray[tuple[int], np.dtype[np.float64]], list[tuple[int, str]]]:
    """Row numbers and scores of a chunk's good records, and line and reason of the bad ones."""
    encoded = encode_checked(chunk.records, scorer.description.fields, source.timezone, source.missing)
    good = chunk.without(encoded.faults)
    keep = np.ones(chunk.records.num_rows, np.bool_)
    keep[list(encoded.faults)] = False
    features = encoded.features.filter(pa.array(keep))
    parts = [scorer.score_features(features.slice(at, BATCH)) for at in range(0, features.num_rows, BATCH)]
    scores = np.concatenate(parts) if parts else np.empty(0)
    wrong = np.flatnonzero(~np.isfinite(scores)).tolist()
    if wrong:
        good = good.without({row: scorer.blame(features, row) for row in wrong})
    return good.rows_R.tolist(), np.delete(scores, wrong), list(good.bad)


def _chunks(source: SourceConfig, path: str, fields: tuple[FieldSpec, ...]) -> Iterator[sources.Chunk]:
    """The file's records; side tables are read only where it lacks their columns."""
    sides = () if not source.join or _has_columns(source, path, fields) else load_sides(source)
    return sources.read(source, [path], fields, labelled=False, sides=sides)


def _has_columns(source: SourceConfig, path: str, fields: tuple[FieldSpec, ...]) -> bool:
    try:
        next(sources.read(source, [path], fields, labelled=False, sides=()), None)
    except DataError:
        return False
    return True


def _fitting(source: SourceConfig, path: str) -> SourceConfig:
    """The source, or for a file without names one without the label column, if the file has one column less."""
    names = sources.CRITEO_COLUMNS if source.format == "criteo" else source.header
    if isinstance(names, bool) or source.format not in ("csv", "criteo"):
        return source
    delimiter = "\t" if source.format == "criteo" else source.delimiter
    filesystem, inner = storage.resolve(path)
    with filesystem.open_input_stream(inner) as stream:
        first = stream.read(1 << 20).decode(errors="replace").partition("\n")[0]
    label = sources.CRITEO_COLUMNS[0] if source.format == "criteo" else source.label
    if label not in names or first.count(delimiter) + 2 != len(names):
        return source
    kept = tuple(name for name in names if name != label)
    return source.model_copy(update={"format": "csv", "delimiter": delimiter, "header": kept})
