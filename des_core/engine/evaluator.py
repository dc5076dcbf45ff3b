"""Distributed scoring of valid and test, and the numbers of a run's report.

Each worker scores its home slices; predictions meet on worker 0, where metrics are exact because they
see all samples at once.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from des_core import log, metrics, storage
from des_core.contracts import FILE, GROUP, LABEL, ROW, Dataset, Reference
from des_core.data.feed.batches import Stream, sample_ids
from des_core.data.read.hashing import MISSING
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.plan import home_edges
from des_core.engine.process import main
from des_core.engine.training_report import memory_beside
from des_core.engine.worker import Worker, worker_of
from des_core.errors import UserError
from des_core.run import Run

Array = np.ndarray[Any, np.dtype[Any]]

SCORING_BATCH = 8192


def predict(worker: Worker, split: str) -> Array:
    """Predictions of a split in stored order, float64, on worker 0 (empty elsewhere)."""
    workers = worker.peers.workers
    stream = worker.stream(split)
    scored: list[torch.Tensor] = []
    done = 0
    with worker.peers.uncounted():
        for batch in stream.batches(SCORING_BATCH):
            scored.append(worker.score(batch).double())
            done += batch.num_rows
            if worker.peers.rank == 0:
                log.emit("evaluate", split=split, done=done, of=stream.samples, to=sys.stdout)
        mine = torch.cat(scored) if scored else torch.zeros(0, dtype=torch.float64, device=worker.peers.device)
        parts = worker.peers.gather(mine)
    if not parts:
        return np.empty(0)
    scores = _in_order([part.cpu().numpy() for part in parts], stream.samples, workers)
    wrong = np.flatnonzero(~np.isfinite(scores))
    if len(wrong):
        sample = samples_of(worker.run.dataset, split)[int(wrong[0])]
        raise UserError(
            f"{len(wrong)} {split} rows have no finite prediction, the first is sample {sample}; "
            "is a number far larger there than where it was trained? give its field transform = 'log1p' or 'bucket'"
        )
    return scores


def _in_order(parts: list[Array], samples: int, workers: int) -> Array:
    """Weave the workers' home slices back into the stored order."""
    out = np.empty(samples)
    taken = [0] * workers
    for start in range(0, samples, SCORING_BATCH):
        size = min(SCORING_BATCH, samples - start)
        edges = home_edges(size, workers)
        for home in range(workers):
            count = edges[home + 1] - edges[home]
            out[start + edges[home] : start + edges[home + 1]] = parts[home][taken[home] : taken[home] + count]
            taken[home] += count
    return out


def columns(dataset: Reference, split: str, names: list[str]) -> dict[str, Array]:
    """Whole columns of a split in stored order."""
    table = pa.concat_tables(Stream(dataset, split, names).batches(1 << 20))
    return {name: table.column(name).to_numpy() for name in names}


def samples_of(dataset: Reference, split: str) -> pa.Array:
    """Sample ids ``DIGEST:ROW`` of a split in stored order."""
    table = pa.concat_tables(Stream(dataset, split, [FILE, ROW]).batches(1 << 20))
    return sample_ids(table, Dataset.load(dataset).files)


def evaluate(run: Run, peers: Collectives, resume: bool) -> None:
    """Score valid and test with the trained weights; worker 0 writes report.json and predictions.parquet."""
    training = storage.read_json(run.path("training.json"))
    worker = worker_of(run, peers)
    worker.load(Reference.parse(training["checkpoint"]))
    splits = ("valid", "test") if worker.dataset.rows("valid") else ("test",)
    results = {split: predict(worker, split) for split in splits}
    memory = memory_beside(worker, worker.need().evaluate)
    if peers.rank == 0:
        _write(run, worker, training, results, memory)


def _write(
    run: Run, worker: Worker, training: dict[str, Any], results: dict[str, Array], memory: dict[str, list[float]]
) -> None:
    dataset = worker.dataset
    wanted = [LABEL, *[GROUP] * dataset.has_group]
    truth = {split: columns(run.dataset, split, wanted) for split in results}
    judged = {
        split: metrics.judge(dataset.task, truth[split][LABEL], results[split], truth[split].get(GROUP), MISSING)
        for split in results
    }
    labels, predictions = truth["test"][LABEL], results["test"]
    table = pa.table(
        {
            "sample": samples_of(run.dataset, "test"),
            "label": pa.array(labels, pa.float32()),
            "probability": pa.array(predictions, pa.float64()),
        }
    )
    with storage.writer(run.path("predictions.parquet")) as file:
        pq.write_table(table, file, compression="zstd")
    click = dataset.task == "click"
    report = {
        "split": "test",
        "task": dataset.task,
        **judged["test"],
        "valid": judged.get("valid", {}),
        "roc": metrics.roc(labels, predictions) if click else [],
        "calibration_bins": metrics.calibration_bins(labels, predictions),
        **{key: training[key] for key in training if key not in ("valid", "samples")},
        "evaluate_memory": memory,
        "epochs": training["valid"],
        "trained_samples": training["samples"],
        "predictions_sha256": storage.digest_file(run.path("predictions.parquet")),
        "training_sha256": run.reference("training.json").sha256,
        "model": run.config.model.model_dump(mode="json")
        | {"dense_parameters": sum(p.numel() for p in worker.model.parameters())},
        "run": {"name": run.config.run.name, "key": run.key, "config_digest": run.config.digest},
        "dataset": {
            "reference": str(run.dataset),
            "rows": {split: dataset.rows(split) for split in dataset.splits},
            "bad_rows": sum(part.bad_rows for part in dataset.parts.values()),
            "fields": {name: stats.model_dump(mode="json", exclude={"top"}) for name, stats in dataset.stats.items()},
        },
    }
    storage.write_json(run.path("report.json"), report)


if __name__ == "__main__":
    main(evaluate)
