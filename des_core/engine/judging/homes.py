"""Rows at their homes: each worker scores its slices of the batches, and keeps labels and scores.

Dims: B rows here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from des_core import log
from des_core.contracts import FILE, GROUP, LABEL, ROW, Dataset, Reference
from des_core.data.feed.batches import Stream, sample_ids
from des_core.data.store.predictions import SCHEMA, PartWriter
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.exchange.plan import home_edges
from des_core.engine.judging.clusters import group_ids
from des_core.engine.judging.measure import Rows
from des_core.engine.judging.swap import told, total
from des_core.engine.worker import Worker
from des_core.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

BATCH = 8192
"""Samples that are scored at once, over all workers."""
READ = 16 * BATCH
"""Rows of columns that are read at once."""


def score(worker: Worker, split: str, part: PartWriter | None = None, whose: str = "") -> tuple[Rows, Array]:
    """This worker's rows of a split, and their scores, float64 [B], of which some may not be finite.

    Args:
        part: takes the predictions.
        whose: the model's name in lines of progress.
    """
    peers, grouped = worker.peers, worker.dataset.has_group
    stream = worker.stream(split, (*[GROUP] * grouped, *[FILE, ROW] * (part is not None)))
    scores, labels, groups = [np.empty(0)], [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    done = 0
    for batch in stream.batches(BATCH):
        with peers.uncounted():
            scores.append(worker.score(batch).double().cpu().numpy())
        start, stop = _home(batch.num_rows, peers)
        mine = batch.slice(start, stop - start)
        labels.append(mine.column(LABEL).to_numpy().astype(np.float32))
        if grouped:
            groups.append(group_ids(mine.column(GROUP).to_numpy()))
        if part is not None:
            columns = [*(mine.column(name) for name in (FILE, ROW, LABEL)), pa.array(scores[-1])]
            part.add(pa.Table.from_arrays(columns, names=SCHEMA.names).cast(SCHEMA))
        done += batch.num_rows
        if peers.rank == 0:
            log.emit("evaluate", split=f"{split}{whose}", done=done, of=stream.samples, to=sys.stdout)
    rows = Rows(np.concatenate(labels), places(stream.samples, peers), np.concatenate(groups) if grouped else None)
    return rows, np.concatenate(scores)


def check_finite(peers: Collectives, dataset: Reference, split: str, rows: Rows, scores_B: Array) -> None:
    """Nothing, where all workers' scores are finite.

    Raises:
        UserError: some are not, the same on all workers; it names the first sample.
    """
    wrong = np.flatnonzero(~np.isfinite(scores_B))
    first = rows.positions[wrong[0]] if len(wrong) else np.iinfo(np.int64).max
    count, place = int(total(peers, [len(wrong)])[0]), int(told(peers, np.array([first])).min())
    if count:
        table = next(Stream(dataset, split, [FILE, ROW]).batches(1, 0, place))
        sample = sample_ids(table, Dataset.load(dataset).files)[0]
        raise UserError(
            f"{count} {split} rows have no finite prediction, the first is sample {sample}; "
            "is a number far larger there than where it was trained? give its field transform = 'log1p' or 'bucket'"
        )


def places(samples: int, peers: Collectives) -> Array:
    """Places in the stored order [B] of this worker's rows of a split, ascending."""
    homes = [np.zeros(0, np.int64)]
    for start in range(0, samples, BATCH):
        homes.append(start + np.arange(*_home(min(BATCH, samples - start), peers), dtype=np.int64))
    return np.concatenate(homes)


def columns(peers: Collectives, dataset: Reference, split: str, names: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of this worker's rows of a split, in stored order, some at a time."""
    for table in Stream(dataset, split, names).batches(READ):
        yield table.take(pa.array(places(table.num_rows, peers)))


def column(peers: Collectives, dataset: Reference, split: str, name: str) -> Array:
    """A whole column of integers [B] of this worker's rows of a split."""
    pieces = [table.column(name).to_numpy() for table in columns(peers, dataset, split, [name])]
    return np.concatenate([np.zeros(0, np.int64), *pieces])


def _home(samples: int, peers: Collectives) -> tuple[int, int]:
    edges = home_edges(samples, peers.workers)
    return edges[peers.rank], edges[peers.rank + 1]
