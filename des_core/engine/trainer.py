"""The training loop: epochs of synchronous steps, validated, checkpointed, and able to go on.

Epoch ends decide: the valid metric (AUC; RMSE for ratings) is judged, learning rates drop or training stops,
and a checkpoint is written. All state of the loop is one record inside the checkpoint, so a run that
was stopped and resumed is, bit for bit, the run that never stopped.
"""

from __future__ import annotations

import os
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError

from des_core import log, storage
from des_core.checkpoint import manifest as manifests
from des_core.contracts import FILE, ROW, TIME, Reference
from des_core.data.feed.batches import Stream, sample_ids
from des_core.data.feed.prefetch import ahead
from des_core.engine.exchange.collectives import WAYS, Collectives, entry
from des_core.engine.exchange.plan import Link, Traffic, home_edges
from des_core.engine.first_bias import first_bias
from des_core.engine.judging import homes
from des_core.engine.judging.measure import Judge
from des_core.engine.process import main
from des_core.engine.schedule import rate_factor
from des_core.engine.training_report import added, training_report
from des_core.engine.training_state import MEASURED, TrainingState, find_checkpoint
from des_core.engine.weights.saving import Saver
from des_core.engine.worker import DENSE, NotFinite, Ready, StepPause, worker_of
from des_core.errors import NotFiniteError
from des_core.run import Run

Array = np.ndarray[Any, np.dtype[Any]]

PROGRESS_S = 0.5
POINTS = 200
"""Points of the loss curve that a report keeps."""


class Trainer:
    """Drives one worker through a run; every worker drives its own in step with the others."""

    def __init__(self, run: Run, peers: Collectives) -> None:
        self.run, self.peers = run, peers
        self.worker = worker_of(run, peers)
        extra = (TIME,) if run.config.table.idle_days else ()
        self.stream = self.worker.stream("train", extra, shuffle=run.config.train.shuffle)
        self.at = TrainingState()
        self._saver = Saver(run.checkpoints, peers)
        self._window: list[float] = []
        self._said = 0.0
        self._clock = 0.0
        self._warm = False
        self._begun: dict[int, tuple[int, int]] = {}
        """Epoch and cursor at which the last steps began."""

    def resume(self) -> None:
        """Go on from the newest checkpoint of this run, or of one that differs only in when it stops.

        Raises:
            CheckpointError: there is none that fits.
        """
        reference = find_checkpoint(self.run, self.worker)
        manifest = self.worker.load(reference)
        self.at = self._progress(manifest.trainer, manifests.measured(reference))
        if manifests.run_folder(reference) == self.run.checkpoints:
            # Another run may delete its own at any time.
            self._saver.goes_on_from(reference, manifest)
        self._window = list(self.at.window)
        self.worker.table.admitted, self.worker.table.evicted = (
            count if self.peers.rank == 0 else 0 for count in (self.at.admitted, self.at.evicted)
        )
        if self.peers.rank == 0:
            log.emit("resume", checkpoint=reference.uri, step=self.at.step, to=sys.stdout)

    def _progress(self, trainer: dict[str, Any], measured: dict[str, Any]) -> TrainingState:
        """The loop's state in a checkpoint; what was measured is as good as lost where it does not fit."""
        kept = {key: value for key, value in measured.items() if key in MEASURED}
        try:
            return TrainingState.model_validate(trainer | kept)
        except ValidationError:
            return TrainingState.model_validate(trainer)

    def warm_start(self, champion: Reference) -> None:
        """Begin with the champion's weights, optimizer state and clock.

        Raises:
            CheckpointError: it is not whole, or of another version of DES.
        """
        assert self.run.day is not None
        manifest, fresh = self.worker.warm_start(champion, set(self.run.day.kept))
        its = TrainingState.model_validate(manifest.trainer)
        self.at = TrainingState(step=its.step, first_step=its.step, days=its.days, fresh=fresh)
        if not fresh:
            self._saver.goes_on_from(champion, manifest)
        if self.peers.rank == 0:
            told = {"fresh": ", ".join(fresh)} if fresh else {}
            log.emit("warm_start", checkpoint=champion.uri, step=its.step, **told, to=sys.stdout)

    def train(self) -> None:
        """Train to the end and write training.json."""
        try:
            self._train()
        except BaseException:
            self._saver.abandon()
            raise
        self._saver.finish()
        settings = self.run.config.train
        best = self.at.best_step if settings.keep == "best" and settings.early_stop != "none" else None
        if best is not None and not storage.exists(self._manifest(best)):
            # Its save failed, and was said to; the weights of the last step are what there is.
            log.emit("best_lost", step=best, instead=self.at.step, to=sys.stdout)
            best = None
        kept = manifests.reference(self._manifest(best))
        report = training_report(self.worker, self.at, kept, self._saver.spent)
        if report is not None:
            storage.write_json(self.run.path("training.json"), report)

    def _train(self) -> None:
        self._settle()
        at = self.at
        if at.step == at.first_step and (not at.step or DENSE in at.fresh):
            # Whatever went on from other weights has their bias.
            bias = first_bias(self.run.dataset, self.worker.dataset, self.peers)
            with torch.no_grad():
                self.worker.model.bias.fill_(bias)
        while not self.at.done and self.at.epoch < self._epochs and not self._stopped:
            if self._epoch():
                self._finish_epoch()
                self._save()
            else:
                # Stopped inside an epoch: what goes on from here must not know of this validation.
                self._save()
                self._judge_stop()
        self._saver.settle()
        if not storage.exists(self._manifest(None)):
            self._save()

    def _settle(self) -> None:
        """The plan: the one this run began with on as many workers, else the cheapest over the link as it is."""
        settings, workers, chosen = self.run.config.train, self.peers.workers, dict(self.at.plan)
        if chosen.pop("workers", 0) == workers:
            self.worker.choose_plan(chosen=chosen)
            return
        open_choice = "auto" in (settings.exchange, settings.upper) and not settings.bandwidth_mbps
        self.worker.choose_plan(Link(*self.peers.link()) if open_choice else None)
        self.at = self.at.model_copy(update={"plan": {"workers": workers, **self.worker.plan.chosen}})

    @property
    def _epochs(self) -> int:
        config = self.run.config
        return config.train.epochs if self.run.day is None else config.recurring.epochs

    @property
    def _last_step(self) -> int:
        """The step that train.max_steps ends with; 0: no limit."""
        most = self.run.config.train.max_steps
        return most and self.at.first_step + most

    @property
    def _stopped(self) -> bool:
        return bool(self._last_step) and self.at.step >= self._last_step

    def _epoch(self) -> bool:
        """Train to the epoch's end, or to the last step asked for; whether the epoch is whole."""
        at, worker, most = self.at, self.worker, self._last_step
        batches = self.stream.batches(self.run.config.train.batch, at.epoch, at.cursor)
        left = islice(batches, most - at.step) if most else batches
        day = at.days[-1][0] if at.days else None
        self._clock = time.perf_counter()
        items = worker.ready(left, at.step, day, self._due)
        made = ahead(items, partial(worker.profile.add, "stall"), worker.lookahead)
        with closing(made) as items:
            for item in items:
                if isinstance(item, StepPause):
                    self._pause(item)
                    item.done.set()
                    self._clock = time.perf_counter()
                else:
                    self._step(item)
        with self._explaining():
            self.worker.settle()
        return self.at.cursor >= self.stream.samples

    def _due(self, step: int) -> bool:
        """Whether a pause follows a step: an eviction or a checkpoint."""
        table, every = self.run.config.table, self.run.config.train.checkpoint_steps
        evicts = bool(table.idle_steps or table.max_rows or table.evict_zero)
        return step > 0 and ((evicts and step % table.evict_every == 0) or (every > 0 and step % every == 0))

    def _pause(self, due: StepPause) -> None:
        """Evict what is due, begin a day, and keep a checkpoint, in this order."""
        with self._explaining():
            self.worker.settle()
        at, table = self.at, self.run.config.table
        idle_before = 0
        if due.day is not None and at.days:
            oldest = at.days[-1][0] - table.idle_days + 1
            idle_before = next(step for day, step in at.days if day >= oldest)
        if idle_before > 1 or (at.step % table.evict_every == 0 and self._due(at.step)):
            with self.peers.uncounted():
                self.worker.table.evict(at.step, self._sum, idle_before)
        if due.day is not None:
            self.at = at.model_copy(update={"days": [*at.days, (due.day, at.step + 1)]})
        every = self.run.config.train.checkpoint_steps
        if every and self.at.step % every == 0 and self.at.cursor > 0:
            self._save()

    def _sum(self, counts: Array) -> Array:
        """Integers, summed over workers."""
        mine = torch.from_numpy(counts).to(self.peers.device)
        total: Array = self.peers.all_reduce({"table": mine})["table"].cpu().numpy()
        return total

    def _step(self, ready: Ready) -> None:
        at, samples = self.at, ready.batch.num_rows
        self._begun = {step: place for step, place in self._begun.items() if step >= at.step}
        self._begun[at.step + 1] = (at.epoch, at.cursor)
        with self._explaining():
            loss = self.worker.step(ready, at.rate_scale * self._rate_factor(at.step + 1))
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        self._window.append(loss)
        predicted = self.worker.plan.by_way(samples, Traffic(0, 0))
        # The first step of a process compiles: it says nothing of speed.
        timed = samples if self._warm else 0
        if not self._warm:
            self.worker.profile.restart()
        self._warm = True
        self.at = at.model_copy(
            update={
                "step": at.step + 1,
                "cursor": at.cursor + samples,
                "samples": at.samples + samples,
                "timed_samples": at.timed_samples + timed,
                "seconds": at.seconds + (seconds if timed else 0.0),
                "predicted": added(at.predicted, predicted),
            }
        )
        self._tell(loss)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Name the samples of a loss that is not finite; a device tells of it a step later."""
        try:
            yield
        except NotFinite as error:
            raise NotFiniteError(self._explained(error)) from None

    def _explained(self, error: NotFinite) -> str:
        """The message for a batch whose loss is not finite: the worker and the ids of the samples."""
        if not error.positions:
            return str(error)
        batch, (epoch, cursor) = self.run.config.train.batch, self._begun[error.step]
        seed = self.run.config.run.seed if self.run.config.train.shuffle else None
        table = next(Stream(self.run.dataset, "train", [FILE, ROW], seed).batches(batch, epoch, cursor))
        names = sample_ids(table, self.worker.dataset.files).take(pa.array(error.positions)).to_pylist()
        edges = home_edges(table.num_rows, self.peers.workers)
        worker = bisect_right(edges, error.positions[0]) - 1
        return f"{error.what} on worker {worker}, sample {', '.join(names)}; {error.fix}"

    def _rate_factor(self, step: int) -> float:
        """What the schedule makes of both learning rates at a step."""
        return rate_factor(self.run.config.train, step - self.at.first_step, self._epoch_steps)

    @property
    def _epoch_steps(self) -> int:
        """Steps of all epochs of the run."""
        return self._epochs * -(-self.stream.samples // self.run.config.train.batch)

    def _total_steps(self) -> int:
        total = self.at.first_step + self._epoch_steps
        return min(total, self._last_step) if self._last_step else total

    def _tell(self, loss: float) -> None:
        """Keep points of the loss curve, and write progress lines."""
        at, total = self.at, self._total_steps()
        if at.step % max(1, (total - at.first_step) // POINTS) == 0 or at.step == total:
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
                **self._shown_table(),
                to=sys.stdout,
            )

    def _table_size(self) -> dict[str, float]:
        """Statistics over all workers: sums, and the mean of load and bytes per row."""
        mine = self.worker.table.statistics()
        vector = torch.tensor(list(mine.values()), dtype=torch.float64, device=self.peers.device)
        with self.peers.uncounted():
            sums = self.peers.all_reduce({"table": vector})["table"].tolist()
        means = ("load", "bytes_per_row")
        return {
            name: value / self.peers.workers if name in means else value for name, value in zip(mine, sums, strict=True)
        }

    def _shown_table(self) -> dict[str, Any]:
        """The table statistics of a progress line, over all workers at the last point of the curve."""
        if not self.at.table:
            return {"rows": self.worker.table.used}
        size = self.at.table[-1]
        counts = {name: round(size[name]) for name in ("rows", "admitted", "evicted", "bytes_per_row")}
        return counts | {"load": round(size["load"], 2)}

    def _judge(self) -> dict[str, Any]:
        """Metrics of the valid part, known to every worker, the deciding one as ``score``."""
        rows, scores = homes.score(self.worker, "valid")
        homes.check_finite(self.peers, self.run.dataset, "valid", rows, scores)
        task = self.worker.dataset.task
        judge = Judge(self.peers, task)
        judged = judge.metrics(rows, judge.model(rows, scores))
        score = -judged["rmse"] if task == "rating" else judged["auc"] or 0.0
        entry: dict[str, Any] = {"epoch": self.at.epoch + 1, "step": self.at.step, "score": score}
        entry |= {key: judged.get(key) for key in ("auc", "logloss", "rmse")}
        if self.peers.rank == 0:
            shown = {key: round(value, 5) for key, value in entry.items() if value is not None}
            log.emit("valid", **shown, to=sys.stdout)
        return entry

    def _finish_epoch(self) -> None:
        """Judge the epoch that just ended, and decide what follows."""
        settings, at, table = self.run.config.train, self.at, self.run.config.table
        if table.idle_steps or table.max_rows or table.evict_zero:
            with self.peers.uncounted():
                self.worker.table.evict(at.step, self._sum)
        if not self.worker.dataset.rows("valid"):
            # A day's run trains on all rows before the cut: nothing is left to stop early by.
            self.at = at.model_copy(update={"epoch": at.epoch + 1, "cursor": 0})
            return
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
                "best_step": at.step if better else at.best_step,
                "worse_epochs": worse,
                "rate_scale": at.rate_scale * (settings.lr_drop if judged and not better else 1.0),
                "done": judged and worse >= settings.patience,
            }
        )

    def _judge_stop(self) -> None:
        if not self.worker.dataset.rows("valid"):
            return
        entry, at = self._judge(), self.at
        better = at.best is None or entry["score"] > at.best
        best = at.step if better else at.best_step
        self.at = at.model_copy(update={"valid": [*at.valid, entry], "best_step": best})

    def _save(self) -> None:
        """Begin to write a checkpoint with all workers; when it is there, older ones go, but for the best."""
        self._take_ledger()
        size = self._table_size()
        table = {name: round(size[name]) for name in ("admitted", "evicted")}
        self.at = self.at.model_copy(update={"decays": self.worker.decay.pieces, **table})
        head = {
            "run_key": self.run.key,
            "trajectory": self.run.trajectory,
            "shape": self.worker.shape,
            "trainer": self.at.model_copy(update={"window": list(self._window)}).model_dump(
                mode="json", exclude=MEASURED
            ),
        }
        measured = self.at.model_dump(mode="json", include=MEASURED)
        worker, best = self.worker, self._manifest(self.at.best_step)
        self._saver.begin(worker.table, worker.model, worker.dense, head, measured, keep=lambda uri: {uri, best})

    def _manifest(self, step: int | None) -> str:
        """Address of the manifest of a step's checkpoint; of the present step without one."""
        return manifests.manifest_uri(self.run.checkpoints, self.at.step if step is None else step)

    def _take_ledger(self) -> None:
        """Move the ledger's sums, their mean over workers, into the loop's state."""
        ledger, plan, sent = self.peers.ledger, self.worker.plan, self.worker.take_traffic()
        lines = [entry(line, way) for line in plan.kinds() for way in WAYS]
        mine = [ledger.sent_bytes[line] for line in lines] + [ledger.seconds[line] for line in lines]
        vector = torch.tensor([*mine, sent.rows, sent.integers], dtype=torch.float64, device=self.peers.device)
        with self.peers.uncounted():
            *mean, rows, integers = (self.peers.all_reduce({"ledger": vector})["ledger"] / self.peers.workers).tolist()
        ledger.clear()
        at, traffic = self.at, Traffic(rows, integers)
        counted = dict(zip(lines, mean[: len(lines)], strict=True))
        seconds = dict(zip(lines, mean[len(lines) :], strict=True))
        # What rows send depends on the batches: their part of the prediction comes from what was trained.
        nothing, trained = plan.by_way(0, Traffic(0, 0)), plan.by_way(0, traffic)
        rows_only = {line: trained[line] - nothing[line] for line in lines}
        sums = {"counted": counted, "exchange_s": seconds, "predicted": rows_only}
        self.at = at.model_copy(update={name: added(getattr(at, name), more) for name, more in sums.items()})


def train(run: Run, peers: Collectives, resume: bool) -> None:
    """The role of a training worker."""
    trainer = Trainer(run, peers)
    # Where torchrun may start workers again, each start goes on from what there is.
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if resume or (restarts and manifests.last(run.checkpoints) is not None):
        trainer.resume()
    elif run.champion_checkpoint is not None:
        trainer.warm_start(run.champion_checkpoint)
    trainer.train()


if __name__ == "__main__":
    main(train)
