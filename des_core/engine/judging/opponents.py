"""Other versions of the model on the workers: their weights from their checkpoint, their config from their run.

An opponent's scores of the run's own rows lie at the rows' homes. Where its fields were defined differently, the raw
logs were ingested again with its definitions, and its scores come to the rows by their samples.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from des_core import storage
from des_core.config import parse_config
from des_core.contracts import TIME, Dataset, Reference
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging import homes, joins
from des_core.engine.judging.swap import told
from des_core.engine.worker import Worker, worker_of
from des_core.errors import StorageError, UserError
from des_core.run import Run
from des_core.verdict import Opponent

Array = np.ndarray[Any, np.dtype[Any]]

OF_THE_MACHINE = ("workers", "device", "kernels", "worker_memory_mb")
"""Keys of [train] that an opponent takes from the run that it is compared in."""
LONGEST = 500
"""Characters of a reason."""


class CannotScore(Exception):
    """An opponent cannot score the rows, the same on all workers; the message is why."""


def scores(run: Run, peers: Collectives, opponent: Opponent, splits: Sequence[str]) -> list[tuple[Array, Array]]:
    """For each split of the run, an opponent's scores of this worker's rows, and which of them it can score.

    Raises:
        CannotScore: its weights are gone or do not fit.
    """
    dataset = Reference.parse(opponent.dataset)
    worker = _worker(run, peers, opponent, dataset)
    whose = f" by version {opponent.version}"
    theirs = [opponent.split] if opponent.joined else splits
    scored = [homes.score(worker, split, whose=whose)[1] for split in theirs]
    # Its table goes before anything else is held.
    del worker
    let_go(peers)
    unseen = [_unseen(run, peers, opponent, split) for split in splits]
    if not opponent.joined:
        return list(zip(scored, unseen, strict=True))
    files, found = Dataset.load(run.dataset).files, []
    there = joins.sample_keys(peers, dataset, opponent.split, files)
    for split, later in zip(splits, unseen, strict=True):
        here = joins.sample_keys(peers, run.dataset, split, files)
        values, known = joins.look_up(peers, here, there, scored[0])
        found.append((values, known & later))
    return found


def _worker(run: Run, peers: Collectives, opponent: Opponent, dataset: Reference) -> Worker:
    """A worker with the opponent's weights; all workers have one, or none."""
    worker, reason = None, ""
    try:
        inputs = storage.read_json(opponent.inputs)
        config = parse_config(json.dumps(inputs["config"]), opponent.inputs)
        # What is of the machine is the run's own.
        train = config.train.model_copy(update={name: getattr(run.config.train, name) for name in OF_THE_MACHINE})
        changes = {"train": train, "cluster": run.config.cluster}
        theirs = Run(config.model_copy(update=changes), dataset, inputs["run_key"])
        worker = worker_of(theirs, peers)
        worker.load(Reference.parse(opponent.checkpoint))
    except (UserError, StorageError) as error:
        reason = str(error)
    reason = _shared(peers, reason)
    if reason or worker is None:
        raise CannotScore(reason)
    return worker


def let_go(peers: Collectives) -> None:
    """Give back what a model held that nobody refers to any more."""
    gc.collect()
    if peers.device.type == "cuda":
        torch.cuda.empty_cache()


def _shared(peers: Collectives, reason: str) -> str:
    """The first worker's reason that has one, known to all."""
    mine = np.zeros(LONGEST, np.int64)
    text = np.frombuffer(reason.encode()[:LONGEST], np.uint8)
    mine[: len(text)] = text
    known = [bytes(each[each > 0].astype(np.uint8)).decode(errors="ignore") for each in told(peers, mine)]
    return next(filter(None, known), "")


def _unseen(run: Run, peers: Collectives, opponent: Opponent, split: str) -> Array:
    """Which of this worker's rows of a split are later than what the opponent was trained on."""
    known = Dataset.load(run.dataset)
    if opponent.after is None:
        return np.ones(len(homes.places(known.rows(split), peers)), np.bool_)
    day, cut = opponent.after
    days = days_of(run, peers, split)
    names = np.array(sorted(known.parts))
    times = homes.column(peers, run.dataset, split, TIME)
    later: Array = (names > day)[days] | ((names == day)[days] & (times >= cut))
    return later


def days_of(run: Run, peers: Collectives, split: str) -> Array:
    """Number among the sorted names of the parts of each of this worker's rows of a split."""
    known = Dataset.load(run.dataset)
    names = sorted(known.parts)
    segments = known.splits[split]
    stops = np.cumsum([segment.stop - segment.start for segment in segments])
    part = np.array([names.index(segment.part) for segment in segments], np.int64)
    places = homes.places(known.rows(split), peers)
    return part[np.searchsorted(stops, places, "right")] if len(part) else np.zeros(0, np.int64)
