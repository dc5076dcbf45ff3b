"""The champion's scores of the very rows that the candidate was tested on.

It sees them through its own field definitions. Where the run's feature store holds all of its columns, it reads them
there; where its fields were defined differently, the raw logs are ingested again with its definitions into a scratch
folder, and the samples that both have are joined by their ids. A champion that needs a column which the logs no longer
have cannot be compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from des_core import storage
from des_core.config import Config, FieldConfig, StorageConfig
from des_core.contracts import Dataset, FieldSpec, Reference
from des_core.errors import UserError
from des_core.release import registry
from des_core.release.gate import Champion
from des_core.run import Run

STORED = ("name", "column", "kind", "separator", "weight", "derive")
"""What decides a field's columns in the feature store: statistics and pooling are applied when they are read."""


def score(run: Run) -> tuple[Reference, bool]:
    """``champion.json`` of the run, and whether it was there already.

    It is kept where it scored this report's rows with the present champion, and where the run is registered: its
    verdict is then a fact, and the champion may well be the run's own model.
    """
    report = str(run.reference("report.json"))
    present, own, _ = registry.standing(run)
    if storage.exists(run.path("champion.json")):
        kept = run.reference("champion.json")
        record = Champion.load(kept)
        if record.report == report and (own or record.version == present):
            return kept, True
    return _scored(run, report, present).write(run.path("champion.json")), False


def _scored(run: Run, report: str, present: str) -> Champion:
    if not present:
        return Champion(status="none", report=report)
    with tempfile.TemporaryDirectory(prefix="des-champion-") as scratch:
        try:
            version = _predict(run, scratch)
        except UserError as error:
            return Champion(status="not_comparable", version=present, reason=str(error), report=report)
        finally:
            storage.delete(_scratch(run.config))
    return Champion(status="scored", version=version, report=report)


def _predict(run: Run, scratch: str) -> str:
    """Write ``champion.parquet`` and return the champion's version."""
    # Loads torch, which only a run with a champion needs.
    from des_core.release.serving import Scorer

    found = registry.champion(run.config, scratch)
    if found is None:
        raise UserError("it is gone from the registry")
    scorer = Scorer(found.folder)
    dataset = _seen_by(run, scorer.description.fields)
    samples, _, predictions = scorer.score_dataset(dataset, "test")
    table = pa.table({"sample": pa.array(samples, pa.string()), "probability": np.asarray(predictions, np.float64)})
    with storage.writer(run.path("champion.parquet")) as file:
        pq.write_table(table, file, compression="zstd")
    return found.version


def _seen_by(run: Run, fields: Sequence[FieldSpec]) -> Reference:
    """A feature store with the columns of these fields: the run's own where it has them."""
    here = {_stored(field) for field in Dataset.load(run.dataset).fields}
    if all(_stored(field) in here for field in fields):
        return run.dataset
    from des_core.data import features

    return features.ingest(_with_fields(run.config, fields))


def _stored(field: FieldSpec) -> tuple[str, ...]:
    return tuple(str(getattr(field, key)) for key in STORED)


def _with_fields(config: Config, fields: Sequence[FieldSpec]) -> Config:
    """The same logs and split, with other fields and a feature store of their own."""
    keys = set(FieldConfig.model_fields)
    declared = tuple(FieldConfig(**field.model_dump(include=keys)) for field in fields)
    return config.model_copy(update={"fields": declared, "storage": StorageConfig(root=_scratch(config))})


def _scratch(config: Config) -> str:
    return storage.join(config.storage.root, "champion-features")
