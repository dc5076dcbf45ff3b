"""Raw records of a file -> CSV of ``sample,probability`` and kept columns, in the file's order, by a registered model.

Records are read as ingestion reads them, under the source settings that the model carries (or those of a config that
is given), except that nothing but the model's own columns is needed. A record that ingestion would put into quarantine
gets no line here either; the caller is told how many there were, and why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from des_core import storage
from des_core.addresses import sqlite_address
from des_core.config import Config, SourceConfig
from des_core.contracts import FieldSpec
from des_core.data.read import sources
from des_core.data.read.hashing import as_text
from des_core.data.read.joins import load_sides
from des_core.data.read.parsing import one_chunk
from des_core.data.read.paths import digest_of
from des_core.data.store.encoding import encode_checked
from des_core.errors import DataError, RegistryError

if TYPE_CHECKING:
    from des_core.release.serve.serving import Scorer

BATCH = 8192


@dataclass(frozen=True)
class FileScores:
    """Result of scoring a file."""

    rows: int
    bad: int
    first_reason: str
    """Why the first bad one was left out."""


def tracking_uri(model: str, config: Config | None) -> str:
    """The registry to look a model up in: the config's, MLflow's own variable, or the run folder of the model's name.

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


def predict(folder: str, path: str, output: str, config: Config | None = None, keep: Sequence[str] = ()) -> FileScores:
    """Score a file with the model in ``folder`` and write the CSV whole or not at all.

    Args:
        keep: columns of the file that go into the output, after the scores.

    Raises:
        DataError: the file is missing, lacks a column, or holds no good record; or it is the output too.
    """
    from des_core.release.serve.serving import Scorer

    if storage.same(path, output):
        raise DataError(f"--output {output} is the file that is read; scores would replace it: name another file")
    digest = digest_of(path)[:16]
    scorer = Scorer(folder, config.storage.root if config is not None else "")
    source = _fitting(sources.source_of(config or scorer.description.config), path)
    rows, bad = 0, list[tuple[int, str]]()
    for name in keep:
        if name in ("sample", "probability") or keep.count(name) > 1:
            raise DataError(f"--keep {name}: the output has a column of that name already; leave it out")
    with storage.writer(output) as file:
        file.write(_lines([pa.array([name]) for name in ("sample", "probability", *keep)]))
        for chunk in _chunks(source, path, scorer.description.fields, keep):
            good, scores = _score(scorer, chunk, source)
            samples = pc.binary_join_element_wise(digest, pa.array(good.rows_R).cast(pa.string()), ":")
            kept = [_texts(path, name, good.records.column(name)) for name in keep]
            file.write(_lines([samples, pa.array(scores).cast(pa.string()), *kept]))
            rows += len(samples)
            bad += good.bad
        if not rows:
            raise DataError(f"{path}: no record to score" + (f"; line {bad[0][0]}: {bad[0][1]}" if bad else ""))
    return FileScores(rows, len(bad), f"line {bad[0][0]}: {bad[0][1]}" if bad else "")


def _texts(path: str, name: str, column: pa.ChunkedArray) -> pa.Array:
    """A column as a log in text has it."""
    try:
        return as_text(one_chunk(column)).cast(pa.string())
    except (pa.ArrowException, TypeError):
        raise DataError(f"{path}: --keep {name}: a column of type {column.type} is no text; leave it out") from None


def _lines(columns: Sequence[pa.Array]) -> bytes:
    """Lines of CSV; a value is put in quotes only where it must be, and a missing one is empty."""
    cells = []
    for column in columns:
        texts = pc.fill_null(column, "")
        quoted = pc.binary_join_element_wise('"', pc.replace_substring(texts, '"', '""'), '"', "")
        cells.append(pc.if_else(pc.match_substring_regex(texts, '[",\r\n]'), quoted, texts))
    lines = pc.binary_join_element_wise(*cells, ",").to_pylist()
    return "".join(f"{line}\n" for line in lines).encode()


def _score(
    scorer: Scorer, chunk: sources.Chunk, source: SourceConfig
) -> tuple[sources.Chunk, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """A chunk's good records, with all bad ones beside them, and the scores of the good ones."""
    encoded = encode_checked(
        chunk.records,
        scorer.description.fields,
        source.timezone,
        source.missing,
        time_formats={source.time: source.time_format},
    )
    good = chunk.without(encoded.faults)
    keep = np.ones(chunk.records.num_rows, np.bool_)
    keep[list(encoded.faults)] = False
    features = encoded.features.filter(pa.array(keep))
    parts = [scorer.score_features(features.slice(at, BATCH)) for at in range(0, features.num_rows, BATCH)]
    scores = np.concatenate(parts) if parts else np.empty(0)
    wrong = np.flatnonzero(~np.isfinite(scores)).tolist()
    if wrong:
        good = good.without({row: scorer.blame(features, row) for row in wrong})
    return good, np.delete(scores, wrong)


def _chunks(
    source: SourceConfig, path: str, fields: tuple[FieldSpec, ...], keep: Sequence[str]
) -> Iterator[sources.Chunk]:
    """The file's records; side tables are read only where it lacks their columns."""
    sides = () if not source.join or _has_columns(source, path, fields) else load_sides(source)
    return sources.read(source, [path], fields, labelled=False, sides=sides, more=keep)


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
