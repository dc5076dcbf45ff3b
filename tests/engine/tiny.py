"""A small feature store with every kind of field, made without ingestion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from des_core import storage
from des_core.config import Config, parse_config
from des_core.contracts import (
    DAY_MICROS,
    FILE,
    GROUP,
    LABEL,
    ROW,
    TIME,
    WEIGHT,
    Dataset,
    FieldSpec,
    FieldStats,
    Part,
    Reference,
    RowsFile,
    Segment,
)
from des_core.data.read.hashing import MISSING
from des_core.data.store.parts import footer_of
from des_core.run import Run, pin

FIELDS = (
    FieldSpec(name="user", column="user", kind="categorical", table="user"),
    FieldSpec(name="item", column="item", kind="categorical", table="item"),
    FieldSpec(name="seen", column="seen", kind="multi", pooling="mean", table="item"),
    FieldSpec(name="tags", column="tags", kind="multi", weight="tag_weights", pooling="sqrtn", table="tags"),
    FieldSpec(name="price", column="price", kind="numeric", transform="log1p", table="price"),
    FieldSpec(name="age", column="age", kind="numeric", transform="bucket", edges=(20.0, 40.0), table="age"),
    FieldSpec(name="depth", column="depth", kind="numeric", transform="log1p", table="depth", input="dense"),
    FieldSpec(name="width", column="width", kind="numeric", table="width", input="dense"),
)


def config(root: Path, **sections: dict[str, Any]) -> Config:
    """A run over a tiny store, with sections of the TOML overridden."""
    document: dict[str, Any] = {
        "run": {"name": "tiny", "seed": 5, "dir": str(root)},
        "source": {"format": "csv", "path": "unused.csv", "group": "user"},
        "fields": [{"name": "unused"}],
        "model": {"name": "deepfm", "factors": 4, "hidden": [6, 5], "init": 0.1},
        "train": {"batch": 96, "epochs": 2, "shuffle": True},
        "storage": {"root": str(root)},
        "registry": {"tracking_uri": f"sqlite:///{root}/mlflow.db"},
    }
    for name, section in sections.items():
        document[name] = document.get(name, {}) | section
    return parse_config(document)


def store(
    config: Config,
    rows: int = 1100,
    seed: int = 1,
    days: int = 1,
    fields: tuple[FieldSpec, ...] = FIELDS,
    longest: int = 0,
) -> Reference:
    """Write the store under the config's root: 80 % train, 10 % valid, 10 % test.

    Args:
        days: of logs; each brings new users and items, and most of the day before vanish.
        fields: those that the model reads.
        longest: values in one list of tags.
    """
    rng = np.random.default_rng(seed)
    day = np.arange(rows) * days // rows
    user, item = rng.zipf(1.3, rows) % 50 + 30 * day, rng.zipf(1.2, rows) % 80 + 70 * day
    price = np.where(rng.random(rows) < 0.1, np.nan, rng.exponential(5, rows))
    age = np.where(rng.random(rows) < 0.1, np.nan, rng.uniform(10, 60, rows))
    logit = np.sin(user) + np.cos(item * 1.7) + 1.5 * np.sin(user * item) - 0.05 * np.nan_to_num(price)
    tag_lists = [rng.integers(0, 9, rng.integers(1, 4)).tolist() for _ in range(rows)]
    if longest:
        tag_lists[5] = list(range(longest))
    columns = {
        "user": pa.array(user, pa.int64()),
        "item": pa.array(np.where(rng.random(rows) < 0.05, MISSING, item), pa.int64()),
        "seen": pa.array([rng.integers(0, 80, rng.integers(1, 6)).tolist() for _ in range(rows)], pa.list_(pa.int64())),
        "tags": pa.array(tag_lists, pa.list_(pa.int64())),
        WEIGHT + "tags": pa.array([rng.random(len(tags)).tolist() for tags in tag_lists], pa.list_(pa.float32())),
        "price": pa.array(price, pa.float32(), from_pandas=True),
        "age": pa.array(age, pa.float32(), from_pandas=True),
        "depth": pa.array(price * rng.random(rows), pa.float32(), from_pandas=True),
        "width": pa.array(rng.normal(size=rows), pa.float32()),
        LABEL: pa.array(rng.random(rows) < 1 / (1 + np.exp(-logit)), pa.float32()),
        TIME: pa.array(DAY_MICROS * (20_000 + day) + np.arange(rows), pa.int64()),
        GROUP: pa.array(user, pa.int64()),
        FILE: pa.array(np.zeros(rows), pa.int32()),
        ROW: pa.array(np.arange(rows), pa.int64()),
    }
    folder = storage.join(config.storage.root, "features")
    Path(folder, "all").mkdir(parents=True, exist_ok=True)
    # Small row groups would be another format, so several parts stand for several windows.
    columns[LABEL] = columns[LABEL].cast(pa.float32())
    pq.write_table(pa.table(columns), f"{folder}/all/data.parquet")
    train, valid = rows * 8 // 10, rows * 9 // 10
    stats = {
        field.name: FieldStats(
            lookups_per_sample=3.0 if field.kind == "multi" else 1.0, missing_share=0.0, cardinality=c
        )
        for field, c in zip(FIELDS, (50, 80, 80, 9, 2, 4, 0, 0), strict=True)
    }
    dataset = Dataset(
        spec=config.features_digest,
        task=config.source.task,
        fields=fields,
        has_group=True,
        has_time=True,
        parts={
            "all": Part(
                files=(
                    RowsFile(
                        path="all/data.parquet",
                        sha256=storage.digest_file(f"{folder}/all/data.parquet"),
                        footer=footer_of(f"{folder}/all/data.parquet"),
                        rows=rows,
                    ),
                )
            )
        },
        splits={
            "train": (Segment(part="all", start=0, stop=train),),
            "valid": (Segment(part="all", start=train, stop=valid),),
            "test": (Segment(part="all", start=valid, stop=rows),),
        },
        files=("0123456789abcdef",),
        stats=stats,
    )
    return dataset.write(storage.join(folder, "manifest.json"))


def run(root: Path, **sections: dict[str, Any]) -> Run:
    """A pinned run over a tiny store."""
    settings = config(root, **sections)
    return pin(settings, store(settings))
