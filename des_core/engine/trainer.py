"""The training loop: epochs of synchronous steps, validated, checkpointed, and able to go on.

Epoch ends decide: the valid metric (AUC; RMSE for ratings) is judged, learning rates drop or training stops,
and a checkpoint is written. All state of the loop is one record inside the checkpoint, so a run that
was stopped and resumed is, bit for bit, the run that never stopped.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

from des_core import log, metrics, storage
from des_core.contracts import GROUP, LABEL, Record, Reference
from des_core.engine import checkpoint
from des_core.engine.collectives import Collectives
from des_core.engine.evaluator import columns, predict
from des_core.engine.plan import balances
from des_core.engine.worker import Worker, main
from des_core.errors import CheckpointError
from des_core.run import Run

PROGRESS_S = 0.5
POINTS = 200
"""Points of the loss curve that a report keeps."""


class Progress(Record):
    """Where training stands: the loop's whole state."""

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    """Samples of the present epoch already trained."""
    rate_scale: float = 1.0
    best: float | None = None
    """Best valid metric of an epoch's end, larger is better."""
    best_uri: str = ""
    """Manifest of the checkpoint at that epoch's end."""
    worse_epochs: int = 0
    done: bool = False
    samples: int = 0
    timed_samples: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = []
    valid: list[dict[str, Any]] = []
    table: list[dict[str, float]] = []
    predicted: dict[str, float] = {}
    """Bytes per worker since the first step, by ledger line; likewise below."""
    counted: dict[str, float] = {}
    exchange_s: dict[str, float] = {}


class Trainer:
    """Drives one worker through a run; every worker drives its own in step with the others."""

    def __init__(self, run: Run, peers: Collectives) -> None:
        self.run, self.peers = run, peers
        self.worker = Worker(run, peers)
        self.stream = self.worker.stream("train", shuffle=run.config.train.shuffle)
        self.at = Progress()
        self._truth: dict[str, Any] | None = None
        self._window: list[float] = []
        self._said = 0.0
        self._clock = 0.0
        self._warm = False

    def resume(self) -> None:
        """Go on from the newest checkpoint of this run, or of one that differs only in when it stops.

        Raises:
            CheckpointError: there is none that fits.
        """
        reference = find_checkpoint(self.run, self.worker)
        self.at = Progress.model_validate(self.worker.load(reference).trainer)
        if self.peers.rank == 0:
            log.emit("resume", checkpoint=reference.uri, step=self.at.step, to=sys.stdout)

    def train(self) -> None:
        """Train to the end and write training.json."""
        settings = self.run.config.train
        while not self.at.done and self.at.epoch < settings.epochs and not self._stopped:
            if self._epoch():
                self._finish_epoch()
                self._save()
            else:
                # Stopped inside an epoch: what goes on from here must not know of this validation.
                self._save()
                self._judge_stop()
        self._finish()

    @property
    def _stopped(self) -> bool:
        most = self.run.config.train.max_steps
        return bool(most) and self.at.step >= most

    def _epoch(self) -> bool:
        """Train to the epoch's end, or to the last step asked for; whether the epoch is whole."""
        settings = self.run.config.train
        self._clock = time.perf_counter()
        for batch in self.stream.batches(settings.batch, self.at.epoch, self.at.cursor):
            if self._stopped:
                return False
            self._step(batch)
            due = settings.checkpoint_steps and self.at.step % settings.checkpoint_steps == 0
            if due and self.at.cursor < self.stream.samples:
                self._save()
                self._clock = time.perf_counter()
        return self.at.cursor >= self.stream.samples

    def _step(self, batch: Any) -> None:
        at = self.at
        loss = self.worker.step(batch, at.step + 1, at.rate_scale)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._window.append(loss)
        predicted = self.worker.plan.predict(batch.num_rows)
        # The first step of a process compiles: it says nothing of speed.
        timed = batch.num_rows if self._warm else 0
        self._warm = True
        self.at = at.model_copy(
            update={
                "step": at.step + 1,
                "cursor": at.cursor + batch.num_rows,
                "samples": at.samples + batch.num_rows,
                "timed_samples": at.timed_samples + timed,
                "seconds": at.seconds + (seconds if timed else 0.0),
                "predicted": {line: at.predicted.get(line, 0.0) + n for line, n in predicted.items()},
            }
        )
        self._tell(loss)

    def _total_steps(self) -> int:
        settings = self.run.config.train
        total = settings.epochs * -(-self.stream.samples // settings.batch)
        return min(total, settings.max_steps) if settings.max_steps else total

    def _tell(self, loss: float) -> None:
        """Keep a point of the loss curve now and then, and say where training stands."""
        at, total = self.at, self._total_steps()
        if at.step % max(1, total // POINTS) == 0 or at.step == total:
            mean = sum(self._window) / len(self._window)
            self._window.clear()
            self.at = at = at.model_copy(
                update={
                    "history": [*at.history, {"step": at.step, "epoch": at.epoch, "loss": mean}],
                    "table": [*at.table, {"step": at.step, **self._table_size()}],
                }
            )
        now = time.monotonic()
        if self.peers.rank == 0 and (now - self._said > PROGRESS_S or at.step == total):
            self._said = now
            rate = at.timed_samples / at.seconds if at.seconds else 0.0
            left = (total - at.step) * self.run.config.train.batch / rate if rate else 0.0
            log.emit(
                "step",
                step=at.step,
                of=total,
                epoch=at.epoch + 1,
                loss=loss,
                samples_per_s=round(rate),
                eta_s=round(left, 1),
                rows=round(at.table[-1]["rows"]) if at.table else self.worker.table.used,
                to=sys.stdout,
            )

    def _table_size(self) -> dict[str, float]:
        """Rows and bytes over all workers, and the mean load of their indexes."""
        table = self.worker.table
        mine = torch.tensor([table.used, table.memory_bytes, table.load], dtype=torch.float64)
        with self.peers.uncounted():
            rows, size, load = self.peers.all_reduce({"table": mine.to(self.peers.device)})["table"].tolist()
        return {"rows": rows, "bytes": size, "load": load / self.peers.workers}

    def _judge(self) -> dict[str, Any]:
        """Metrics of the valid part, the deciding one known to every worker as ``score``."""
        predictions = predict(self.worker, "valid")
        judged: dict[str, Any] = {}
        score = 0.0
        if self.peers.rank == 0:
            dataset = self.worker.dataset
            if self._truth is None:
                self._truth = columns(self.run.dataset, "valid", [LABEL] + [GROUP] * dataset.has_group)
            judged = metrics.judge(dataset.task, self._truth[LABEL], predictions)
            score = -judged["rmse"] if dataset.task == "rating" else judged["auc"] or 0.0
        shared = torch.tensor([score], dtype=torch.float64, device=self.peers.device)
        with self.peers.uncounted():
            score = float(self.peers.all_reduce({"score": shared})["score"])
        entry: dict[str, Any] = {"epoch": self.at.epoch + 1, "step": self.at.step, "score": score}
        entry |= {key: judged.get(key) for key in ("auc", "logloss", "rmse")}
        if self.peers.rank == 0:
            shown = {key: round(value, 5) for key, value in entry.items() if value is not None}
            log.emit("valid", **shown, to=sys.stdout)
        return entry

    def _finish_epoch(self) -> None:
        """Judge the epoch that just ended, and decide what follows."""
        settings, at = self.run.config.train, self.at
        entry = self._judge()
        better = at.best is None or entry["score"] > at.best
        worse = 0 if better else at.worse_epochs + 1
        judged = settings.early_stop != "none"
        self.at = at.model_copy(
            update={
                "epoch": at.epoch + 1,
                "cursor": 0,
                "valid": [*at.valid, entry],
                "best": entry["score"] if better else at.best,
                "best_uri": checkpoint.manifest_uri(self.run.checkpoints, at.step) if better else at.best_uri,
                "worse_epochs": worse,
                "rate_scale": at.rate_scale * (settings.lr_drop if judged and not better else 1.0),
                "done": judged and worse >= settings.patience,
            }
        )

    def _judge_stop(self) -> None:
        entry, at = self._judge(), self.at
        better = at.best is None or entry["score"] > at.best
        here = checkpoint.manifest_uri(self.run.checkpoints, at.step)
        self.at = at.model_copy(update={"valid": [*at.valid, entry], "best_uri": here if better else at.best_uri})

    def _save(self) -> None:
        """Write a checkpoint with all workers; older ones go, but for the best."""
        self._take_ledger()
        head = {
            "run_key": self.run.key,
            "trajectory": self.run.trajectory,
            "shape": self.worker.shape,
            "trainer": self.at.model_dump(mode="json"),
        }
        worker = self.worker
        uri = checkpoint.save(self.run.checkpoints, self.peers, worker.table, worker.model, worker.dense, head)
        if self.peers.rank == 0:
            checkpoint.prune(self.run.checkpoints, {uri, self.at.best_uri})
            log.emit("checkpoint", step=self.at.step, to=sys.stdout)

    def _take_ledger(self) -> None:
        """Move the ledger's sums, their mean over workers, into the loop's state."""
        ledger, lines = self.peers.ledger, list(self.worker.plan.kinds())
        mine = [ledger.sent_bytes[line] for line in lines] + [ledger.seconds[line] for line in lines]
        vector = torch.tensor(mine, dtype=torch.float64, device=self.peers.device)
        with self.peers.uncounted():
            mean = (self.peers.all_reduce({"ledger": vector})["ledger"] / self.peers.workers).tolist()
        ledger.clear()
        at = self.at
        counted = {line: at.counted.get(line, 0.0) + n for line, n in zip(lines, mean[: len(lines)], strict=True)}
        seconds = {line: at.exchange_s.get(line, 0.0) + n for line, n in zip(lines, mean[len(lines) :], strict=True)}
        self.at = at.model_copy(update={"counted": counted, "exchange_s": seconds})

    def _finish(self) -> None:
        """Write training.json, which names the weights to evaluate."""
        settings, at = self.run.config.train, self.at
        best = settings.keep == "best" and settings.early_stop != "none"
        newest = checkpoint.manifest_uri(self.run.checkpoints, at.step)
        if not storage.exists(newest):
            self._save()
        peak = torch.zeros(self.peers.workers, dtype=torch.float64, device=self.peers.device)
        peak[self.peers.rank] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with self.peers.uncounted():
            peak = self.peers.all_reduce({"peak": peak})["peak"]
        if self.peers.rank:
            return
        worker = self.worker
        kinds, steps = worker.plan.kinds(), max(at.step, 1)
        storage.write_json(
            self.run.path("training.json"),
            {
                "workers": self.peers.workers,
                "steps": at.step,
                "samples": at.samples,
                "seconds": at.seconds,
                "samples_per_s": at.timed_samples / at.seconds if at.seconds else 0.0,
                "peak_rss_mb": float(peak.max()),
                "device": str(self.peers.device),
                "history": at.history,
                "valid": at.valid,
                "table": at.table,
                "exchange": {
                    line: {
                        "kind": kind,
                        "predicted_bytes_per_step": at.predicted.get(line, 0.0) / steps,
                        "counted_bytes_per_step": at.counted.get(line, 0.0) / steps,
                        "ms_per_step": 1000 * at.exchange_s.get(line, 0.0) / steps,
                    }
                    for line, kind in kinds.items()
                },
                "plan": {
                    "choice": worker.plan.choice,
                    "placement": balances(worker.dataset, worker.placement, worker.plan),
                },
                "checkpoint": str(checkpoint.reference(at.best_uri if best and at.best_uri else newest)),
            },
        )


def find_checkpoint(run: Run, worker: Worker) -> Reference:
    """The newest checkpoint of this run, else the one furthest on its way.

    Raises:
        CheckpointError: none; where only others are there, how the newest of them differs.
    """
    own = checkpoint.last(run.checkpoints)
    if own is not None:
        return own
    root = storage.join(run.config.storage.root, "checkpoints")
    found: list[tuple[int, Reference]] = []
    other: Reference | None = None
    for name in storage.list_folder(root):
        reference = checkpoint.last(storage.join(root, name))
        if reference is None:
            continue
        manifest = checkpoint.Manifest.load(reference)
        step, limit = manifest.trainer["step"], run.config.train.max_steps
        if manifest.trajectory == run.trajectory and (not limit or step <= limit) and not manifest.trainer["done"]:
            found.append((step, reference))
        other = reference
    if found:
        return max(found, key=lambda pair: pair[0])[1]
    if other is not None:
        checkpoint.read_manifest(other, worker.shape)
    raise CheckpointError(f"no checkpoint of this config and data under {root}; train without --resume")


def train(run: Run, peers: Collectives, resume: bool) -> None:
    """The role of a training worker."""
    trainer = Trainer(run, peers)
    if resume:
        trainer.resume()
    trainer.train()


if __name__ == "__main__":
    main(train)
