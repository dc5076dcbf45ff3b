"""The one data file and the first weights, which every system of a case reads.

A feature store as ingestion would leave it, keys in Parquet: rank r of a field is drawn with odds 1 / r^s among R, and
ranks are permuted into row numbers, so that frequent rows lie anywhere. DES takes a row number as a key, hashes it and
looks it up; other systems take it as the row's place in a table of R rows, a perfect index that costs nothing.

Decoding Parquet is outside the clock for everyone: each process holds its own columns (DES) or its own samples
(others) in memory before a block begins. First factors are DES's own draws by (seed, id), stored by row number.

Dims: T batches, G samples of a batch, b at home, F fields, R rows per table, J lookups per field and sample.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.peers.case import DENSE_RATE, EPS, ROWS_RATE, SEED, Case, Part
from des_core import storage
from des_core.config import Config, parse_config
from des_core.contracts import FILE, LABEL, ROW, ROW_GROUP, Dataset, FieldSpec, FieldStats, Reference, RowsFile, Segment
from des_core.contracts import Part as StorePart
from des_core.data.store.parts import footer_of

CLICKS = 0.25
HELD = 64
"""Samples of the valid and of the test split, which a store must have."""


def names(case: Case) -> list[str]:
    """Names of the fields."""
    return [f"f{number:03}" for number in range(case.fields)]


def config_of(case: Case, folder: Path) -> Config:
    """The run of DES."""
    kind = {"kind": "multi"} if case.bag > 1 else {}
    rule = {"learning_rate": ROWS_RATE, "eps": EPS}
    model = {"factors": case.factors, "hidden": case.hidden, "init": case.init}
    return parse_config(
        {
            "run": {"name": "peers", "seed": SEED, "dir": str(folder)},
            "source": {"format": "parquet", "path": "made-by-the-benchmark"},
            "fields": [{"name": name, **kind} for name in names(case)],
            "model": {"name": case.model, **model},
            "train": {"batch": case.batch, "workers": case.workers, "exchange": case.exchange, "device": "cpu"},
            "optimizer": {
                "rows": {"name": case.rule, **rule},
                "dense": {"name": "adagrad", "learning_rate": DENSE_RATE, "eps": EPS},
            },
            "storage": {"root": str(folder)},
            "registry": {"tracking_uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


def write_store(case: Case, root: Path) -> Path:
    """The folder under ``root`` that holds the case's data and first factors, made unless it is there."""
    samples = case.batch * case.batches
    law = f"{case.fields}x{case.table_rows}-j{case.bag}-s{case.zipf}-{samples}"
    folder = root / f"{law}-{config_of(case, root).features_digest[:8]}"
    manifest, factors = folder / "features" / "manifest.json", _factors(case, folder)
    if not manifest.exists():
        (folder / "features" / "all").mkdir(parents=True, exist_ok=True)
        log = folder / "features" / "all" / "data.parquet"
        _write_log(case, samples, log)
        _manifest(case, samples, config_of(case, folder), log).write(str(manifest))
    if case.vector and not factors.exists():
        _write_factors(case, factors)
    return folder


def reference(folder: Path) -> Reference:
    """The data manifest of a store."""
    uri = str(folder / "features" / "manifest.json")
    return Reference(uri, storage.digest_file(uri))


def read_home(case: Case, folder: Path, rank: int, workers: int) -> tuple[list[Tensor], list[Tensor]]:
    """Per batch the row numbers [F, b * J] of a worker's home, int64, and its labels [b]."""
    file = pq.ParquetFile(folder / "features" / "all" / "data.parquet")
    samples, home = case.batch * case.batches, case.batch // workers
    rows_TFL = np.empty((case.batches, case.fields, home * case.bag), np.int64)
    mine = slice(rank * home, (rank + 1) * home)
    for number, name in enumerate(names(case)):
        column = file.read([name]).column(0).combine_chunks().slice(0, samples)
        values = column.flatten() if case.bag > 1 else column
        rows_TFL[:, number] = (
            values.to_numpy().reshape(case.batches, case.batch, case.bag)[:, mine].reshape(case.batches, -1)
        )
    labels_TG = file.read([LABEL]).column(0).to_numpy()[:samples].reshape(case.batches, case.batch)
    return list(torch.from_numpy(rows_TFL)), list(torch.from_numpy(labels_TG[:, mine].copy()))


def first_factors(case: Case, folder: Path, field: int) -> Tensor:
    """First factors [R, k] of a field's rows, by row number."""
    every = np.load(_factors(case, folder), mmap_mode="r")
    return torch.from_numpy(np.array(every[field * case.table_rows : (field + 1) * case.table_rows]))


def write_first(case: Case, folder: Path, part: Part, field: int, rows_RP: Tensor, first: int = 0) -> None:
    """Give rows [first, first + R) of one part of a field's table their first values: factors, and zeros."""
    rows_RP.zero_()
    if part.name != "w" and case.vector:
        skip = part.width - case.vector
        factors_Rk = first_factors(case, folder, field)[first : first + len(rows_RP)]
        rows_RP[:, skip : part.width] = factors_Rk


def dense_file(case: Case, folder: Path) -> Path:
    """Where DES leaves its first dense weights for the others."""
    hidden = "-".join(map(str, case.hidden))
    return folder / f"dense-{case.model}-{case.factors}-{hidden}.pt"


def unique_at_home(case: Case, folder: Path) -> float:
    """Distinct rows that a home slice reads in a step, U: the mean over a few batches."""
    few = min(case.batches, 4)
    rows = [read_home(case, folder, rank, case.workers)[0][:few] for rank in range(case.workers)]
    return float(np.mean([sum(len(field.unique()) for field in batch_FL) for home in rows for batch_FL in home]))


def _factors(case: Case, folder: Path) -> Path:
    return folder / f"factors-{case.factors}-{case.init:.4f}.npy"


def _write_log(case: Case, samples: int, path: Path) -> None:
    """Keys by Zipf's law, column by column."""
    draw = np.random.default_rng(SEED)
    odds_R = np.cumsum(np.arange(1, case.table_rows + 1, dtype=np.float64) ** -case.zipf)
    total = samples + 2 * HELD
    columns = {}
    for name in names(case):
        row_of_rank = draw.permutation(case.table_rows)
        ranks = np.searchsorted(odds_R, draw.random(total * case.bag) * odds_R[-1])
        keys = pa.array(row_of_rank[ranks])
        edges = pa.array(np.arange(0, total * case.bag + 1, case.bag, dtype=np.int32))
        columns[name] = pa.ListArray.from_arrays(edges, keys) if case.bag > 1 else keys
    columns[LABEL] = pa.array((draw.random(total) < CLICKS).astype(np.float32))
    columns |= {FILE: pa.array(np.zeros(total, np.int32)), ROW: pa.array(np.arange(total))}
    pq.write_table(pa.table(columns), path, row_group_size=ROW_GROUP, compression="zstd")


def _manifest(case: Case, samples: int, config: Config, log: Path) -> Dataset:
    kind = "multi" if case.bag > 1 else "categorical"
    seen = FieldStats(lookups_per_sample=case.bag, missing_share=0.0, cardinality=case.table_rows)
    return Dataset(
        spec=config.features_digest,
        task="click",
        fields=tuple(FieldSpec(name=name, column=name, kind=kind, table=name) for name in names(case)),
        has_group=False,
        has_time=False,
        parts={
            "all": StorePart(
                files=(
                    RowsFile(path="all/data.parquet", sha256="", footer=footer_of(str(log)), rows=samples + 2 * HELD),
                )
            )
        },
        splits={
            "train": (Segment(part="all", start=0, stop=samples),),
            "valid": (Segment(part="all", start=samples, stop=samples + HELD),),
            "test": (Segment(part="all", start=samples + HELD, stop=samples + 2 * HELD),),
        },
        files=("0" * 16,),
        stats=dict.fromkeys(names(case), seen),
    )


def _write_factors(case: Case, path: Path) -> None:
    """DES's own first values, table after table."""
    # Only here, so that other systems' processes do without numba.
    from des_core.data.feed.batches import ids_of
    from des_core.engine.weights.table import first_values

    shape = (case.fields * case.table_rows, case.factors)
    partial = path.with_suffix(".partial.npy")
    every = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    keys = np.arange(case.table_rows, dtype=np.int64)
    for number, name in enumerate(names(case)):
        place = slice(number * case.table_rows, (number + 1) * case.table_rows)
        every[place] = first_values(ids_of(keys, name), case.factors, SEED, case.init)
    every.flush()
    partial.rename(path)
