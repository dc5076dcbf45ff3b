"""A run whose files are all there, written by hand: for tests of what comes after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from des_core import storage
from des_core.config import Config, load_config
from des_core.contracts import Dataset, FieldSpec, FieldStats, Part, Reference, RowsFile, Segment
from des_core.data.store import predictions
from des_core.run import Day, Run, features_uri, pin
from des_core.verdict import Champion
from tests import columns

TOML = """
[run]
name = "shop"

[source]
path = "logs.csv"
label = "click"

[[fields]]
name = "user"

[[fields]]
name = "tags"
kind = "multi"

[[fields]]
name = "price"
kind = "numeric"
transform = "log1p"

[model]
name = "fm"

[train]
workers = 2
"""


def config_of(folder: Path, *overrides: str) -> Config:
    """A small click run under ``folder``."""
    path = folder / "shop.toml"
    path.write_text(TOML)
    (folder / "logs.csv").write_text("click,user,tags,price\n1,ann,a|b,3\n0,bob,,\n1,cid,b,7.5\n")
    return load_config(path, (f"run.dir={folder}/runs/shop", *overrides))


def dataset_of(config: Config) -> Dataset:
    """A data manifest as ingestion writes it."""
    fields = tuple(
        FieldSpec(table=field.table or field.name, column=field.column or field.name, **_kept(field.model_dump()))
        for field in config.fields
    )
    stats = {
        "user": FieldStats(
            lookups_per_sample=1.0, missing_share=0.0, cardinality=41_207, top=((1, 812, "ann"), (2, 640, "<b>bob</b>"))
        ),
        "tags": FieldStats(lookups_per_sample=2.4, missing_share=0.083, cardinality=96, top=((3, 9_000, "new"),)),
        "price": FieldStats(lookups_per_sample=1.0, missing_share=0.31, cardinality=800),
    }
    return Dataset(
        spec=config.features_digest,
        task=config.source.task,
        fields=fields,
        has_group=False,
        has_time=False,
        parts={"all": Part(files=(RowsFile(path="all.parquet", sha256="0" * 64, rows=40_000),), bad_rows=7)},
        splits={
            "train": (Segment(part="all", start=0, stop=32_000),),
            "valid": (Segment(part="all", start=32_000, stop=36_000),),
            "test": (Segment(part="all", start=36_000, stop=40_000),),
        },
        files=("0123456789abcdef",),
        stats=stats,
    )


def finished_run(
    folder: Path, *overrides: str, samples: int = 4_000, skill: float = 1.4, seed: int = 1, day: Day | None = None
) -> Run:
    """A run after evaluation, whose predictions are as good as ``skill`` says."""
    config = config_of(folder, *overrides)
    dataset_of(config).write(features_uri(config))
    run = pin(config, day=day)
    labels, scores = predictions_of(samples, skill, seed)
    sha256 = write_predictions(run, labels, scores)
    manifest = storage.join(run.checkpoints, "step-0000000096", "manifest.json")
    checkpoint = str(Reference(manifest, storage.write_json(manifest, {"run_key": run.key})))
    training = {"workers": 2, "steps": 96, "valid": [], "samples_per_s": 41_250.0, "checkpoint": checkpoint}
    storage.write_json(run.path("training.json"), training)
    storage.write_json(run.path("report.json"), report_of(run, labels, scores, sha256))
    return run


def predictions_of(samples: int, skill: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from logits, and probabilities that know ``skill`` of them."""
    random = np.random.default_rng(seed)
    logits = random.normal(-1.0, 1.5, samples)
    labels = (random.random(samples) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    guess = -1.0 + (logits + 1.0) * min(skill, 1.0) + random.normal(0, abs(1.5 - skill) + 0.1, samples)
    return labels, 1 / (1 + np.exp(-guess))


def write_predictions(run: Run, labels: np.ndarray, scores: np.ndarray) -> str:
    """Predictions of rows 0, 1, ... of one raw file, and the digest of their manifest."""
    folder = run.path("predictions")
    with predictions.part(folder, 0) as part:
        rows = np.arange(len(labels))
        columns_ = [np.zeros(len(labels), np.int32), rows, labels.astype(np.float32), scores]
        part.add(pa.table(columns_, schema=predictions.SCHEMA))
    record = predictions.Predictions(
        samples=len(labels), files=("0123456789abcdef",), parts={predictions.part_name(0): part.sha256}
    )
    return record.write(storage.join(folder, predictions.MANIFEST)).sha256


def _booked(predicted: float, counted: float, ms: float) -> dict[str, float]:
    return {"predicted_bytes_per_step": predicted, "counted_bytes_per_step": counted, "ms_per_step": ms}


def write_champion(run: Run, **changes: Any) -> Reference:
    """``champion.json`` of this run's report; by default of none."""
    record: dict[str, Any] = {"status": "none", "report": str(run.reference("report.json"))} | changes
    return Champion.model_validate(record).write(run.path("champion.json"))


def report_of(run: Run, labels: np.ndarray, scores: np.ndarray, predictions_sha256: str) -> dict[str, Any]:
    """A report as the evaluator writes it."""
    click = run.config.source.task == "click"
    test = columns.judge(run.config.source.task, labels, scores)
    ledger = {
        "fm": ("sum", 278_528.0, 278_528.0, 1.21),
        "dense gradients": ("all_reduce", 4.0, 4.0, 0.35),
        "metrics": ("all_reduce", 4.0, 4.0, 0.35),
    }
    return {
        "split": "test",
        "task": run.config.source.task,
        **test,
        "valid": test,
        "measured": columns.measured(run.config.source.task, labels, scores).model_dump(mode="json"),
        "roc": columns.roc(labels, scores) if click else [],
        "calibration_bins": columns.calibration_bins(labels, scores),
        "scores": columns.histogram(labels, scores) if click else None,
        "workers": 2,
        "steps": 96,
        "seconds": 2.3,
        "samples_per_s": 41_250.0,
        "peak_rss_mb": 512.0,
        "memory": {"predicted_mb": [540.0, 530.0], "measured_mb": [512.0, 498.5]},
        "evaluate_memory": {"predicted_mb": [600.0, 590.0], "measured_mb": [570.0, 561.0]},
        "device": "cpu",
        "history": [{"step": s, "epoch": s // 32, "loss": 0.45 + 0.24 * float(np.exp(-s / 30))} for s in range(1, 97)],
        "epochs": [
            {"epoch": n, "step": 32 * n, "score": a, "auc": a if click else None, "rmse": None if click else 1 - a}
            for n, a in ((1, 0.731), (2, 0.748), (3, 0.7461))
        ],
        "table": [
            {
                "step": s,
                "rows": 42_000 * (1 - float(np.exp(-s / 40))),
                "candidates": 1_200.0,
                "admitted": 43_000.0,
                "evicted": 911.0,
                "bytes": 4_400_000.0,
                "bytes_per_row": 104.5,
                "load": 0.4,
            }
            for s in range(1, 97)
        ],
        "exchange": {
            name: {
                "kind": k,
                **_booked(p, c, t),
                "forward": _booked(p / 2, c / 2, t),
                "backward": _booked(p / 2, c / 2, 0),
            }
            for name, (k, p, c, t) in ledger.items()
        },
        "plan": {
            "choice": {"fm": "sum"},
            "upper": "home",
            "placement": [
                {"worker": 0, "fields": ["user"], "lookups_share": 0.25, "bytes_share": 0.75, "rows": 1234},
                {"worker": 1, "fields": ["tags", "price"], "lookups_share": 0.75, "bytes_share": 0.25, "rows": 411},
            ],
        },
        "checkpoint": "",
        "checkpoints": {"saves": 3.0, "pause_s": 0.02, "write_s": 0.7, "written_bytes": 3.1e6, "read_bytes": 0.0},
        "training_sha256": run.reference("training.json").sha256,
        "predictions_sha256": predictions_sha256,
        "trained_samples": 96_000,
        "model": run.config.model.model_dump(mode="json") | {"dense_parameters": 1},
        "run": {"name": run.config.run.name, "key": run.key, "config_digest": run.config.digest},
        "dataset": {"reference": str(run.dataset), "rows": {}, "bad_rows": 7, "fields": {}, "definitions": []},
    }


def _kept(field: dict[str, Any]) -> dict[str, Any]:
    return {key: field[key] for key in field if key not in ("table", "column")}
