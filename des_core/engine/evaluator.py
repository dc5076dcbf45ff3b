"""The role of a scoring worker: valid and test by the trained weights, other versions on the same test rows.

Each worker scores its home slices and keeps them; what meets are sums (judging/). Every worker writes its part of the
predictions, worker 0 the report and, in measured.json, what the machine decided. The opponents that evaluate-asked.json
names score the rows one after the other, each with its own weights alone in memory, and what was found of them is
evaluate-found.json.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from des_core import storage
from des_core.contracts import Dataset, Reference
from des_core.data.store import predictions
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging import homes, opponents, slices
from des_core.engine.judging.measure import Judge, Rows
from des_core.engine.judging.quantiles import histogram
from des_core.engine.judging.swap import told, total
from des_core.engine.process import main
from des_core.engine.training_report import memory_beside
from des_core.engine.worker import Worker, worker_of
from des_core.run import Run
from des_core.verdict import Asked, Comparison, Found, Measured

Array = np.ndarray[Any, np.dtype[Any]]

ROC_POINTS = 200
"""Of a report's curve."""


def evaluate(run: Run, peers: Collectives, resume: bool) -> None:
    """Write the report where it is missing, and compare with the opponents that are asked for."""
    # Worker 0 decides, because it will write it.
    missing = bool(total(peers, [int(peers.rank == 0 and not storage.exists(run.path("report.json")))])[0])
    asked = storage.exists(run.path("evaluate-asked.json"))
    if not missing and not asked:
        return
    training = storage.read_json(run.path("training.json"))
    worker = worker_of(run, peers)
    worker.load(Reference.parse(training["checkpoint"]))
    if missing:
        valid = _valid(worker)
        with predictions.part(run.path("predictions"), peers.rank) as part:
            rows, scores = homes.score(worker, "test", part)
            homes.check_finite(peers, run.dataset, "test", rows, scores)
        test = _judged(peers, worker.dataset.task, rows, scores)
        test |= {"predictions_sha256": _manifest(run, peers, part)}
        memory = memory_beside(worker, worker.need().evaluate)
        if peers.rank == 0:
            # Not in the report: the same evaluation again is the same report.
            storage.write_json(run.path("measured.json"), {"evaluate_memory": memory})
        _write(run, worker, training, valid, test)
    else:
        rows, scores = homes.score(worker, "test")
    # The opponents' weights take the place of these.
    del worker
    opponents.let_go(peers)
    if asked:
        reference = run.reference("evaluate-asked.json")
        found = _compare(run, peers, Asked.load(reference), reference.sha256, rows, scores)
        if peers.rank == 0:
            found.write(run.path("evaluate-found.json"))


def _valid(worker: Worker) -> dict[str, Any]:
    """The metrics of valid; empty where it has no rows."""
    if not worker.dataset.rows("valid"):
        return {}
    rows, scores = homes.score(worker, "valid")
    homes.check_finite(worker.peers, worker.run.dataset, "valid", rows, scores)
    judge = Judge(worker.peers, worker.dataset.task)
    return judge.metrics(rows, judge.model(rows, scores), grouped=True)


def _judged(peers: Collectives, task: str, rows: Rows, scores: Array) -> dict[str, Any]:
    """What a report says of the test rows' scores."""
    judge = Judge(peers, task)
    model = judge.model(rows, scores, ROC_POINTS)
    measured = judge.measured(rows, model)
    order = model.wins.order_B if model.wins is not None and model.wins.auc is not None else None
    return {
        **judge.metrics(rows, model, grouped=True),
        "measured": measured.model_dump(mode="json"),
        "roc": model.wins.roc if model.wins else [],
        "calibration_bins": judge.calibration_bins(rows, model),
        "scores": None if order is None else histogram(peers, scores, order, rows.labels > 0.5),
    }


def _manifest(run: Run, peers: Collectives, part: predictions.PartWriter) -> str:
    """The digest of the predictions' manifest, which worker 0 writes when all parts are there."""
    digests = told(peers, np.frombuffer(bytes.fromhex(part.sha256), np.int64))
    dataset = Dataset.load(run.dataset)
    parts = {predictions.part_name(worker): digest.tobytes().hex() for worker, digest in enumerate(digests)}
    record = predictions.Predictions(samples=dataset.rows("test"), files=dataset.files, parts=parts)
    if peers.rank == 0:
        record.write(storage.join(run.path("predictions"), predictions.MANIFEST))
    return record.written_sha256


def _write(run: Run, worker: Worker, training: dict[str, Any], valid: dict[str, Any], test: dict[str, Any]) -> None:
    """report.json, by worker 0."""
    dataset = worker.dataset
    if worker.peers.rank:
        return
    report = {
        "split": "test",
        "task": dataset.task,
        **test,
        "valid": valid,
        **{key: training[key] for key in training if key not in ("valid", "samples")},
        "epochs": training["valid"],
        "trained_samples": training["samples"],
        "training_sha256": run.reference("training.json").sha256,
        "model": run.config.model.model_dump(mode="json")
        | {"dense_parameters": sum(p.numel() for p in worker.model.parameters())},
        "run": {"name": run.config.run.name, "key": run.key, "config_digest": run.config.digest},
        "dataset": {
            "reference": str(run.dataset),
            "rows": {split: dataset.rows(split) for split in dataset.splits},
            "bad_rows": sum(part.bad_rows for part in dataset.parts.values()),
            "fields": {name: stats.model_dump(mode="json", exclude={"top"}) for name, stats in dataset.stats.items()},
            # What numbers mean to the weights, for whoever scores with them when these logs are gone.
            "definitions": [field.model_dump(mode="json") for field in dataset.fields],
        },
    }
    storage.write_json(run.path("report.json"), report)


def _compare(run: Run, peers: Collectives, asked: Asked, sha256: str, rows: Rows, ours: Array) -> Found:
    """What is found of each opponent."""
    comparisons: dict[str, Comparison] = {}
    reasons: dict[str, str] = {}
    judge = Judge(peers, Dataset.load(run.dataset).task)
    for role, opponent in asked.opponents.items():
        try:
            ((theirs, here),) = opponents.scores(run, peers, opponent, ["test"])
        except opponents.CannotScore as error:
            reasons[role] = str(error)
            continue
        both, of_ours, of_theirs = rows.where(here), ours[here], theirs[here]
        found = judge.compared(both, of_ours, of_theirs, ROC_POINTS)
        if role == "champion" and _decides(found.theirs) and judge.task == "click":
            sliced = {
                field: slices.compare(judge, run.dataset, field, here, both, of_ours, of_theirs)
                for field in asked.slices
            }
            found = found.model_copy(update={"slices": sliced})
        comparisons[role] = found
    return Found(asked=sha256, comparisons=comparisons, reasons=reasons)


def _decides(measured: Measured) -> bool:
    return bool(measured.metrics)


if __name__ == "__main__":
    main(evaluate)
