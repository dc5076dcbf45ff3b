"""Who owns what: (table, bucket) -> worker.

A table's keys fall into 256 fixed buckets, by the high bits of their ids. Buckets of all tables are laid
end to end, tables by name, and the line is cut into N pieces of equal weight,

    weight = a x share of the measured lookups + (1 - a) x share of the rows,  a = 3/4,

and a cut within 2 % of a worker's share of a table's edge moves to the edge, for a table in one piece is
read, and gathered, once. Where a worker's memory does not allow that (footprint.py), a falls to 0 by
quarters and cuts stay where they fall. Changing N moves buckets and never rehashes a key.

Dims: N workers, T tables, H buckets of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from des_core.contracts import Dataset
from des_core.data.feed.batches import BUCKET_BITS, BUCKETS, ids_of

Array = np.ndarray[Any, np.dtype[Any]]

LOOKUP_SHARE = 0.75
SNAP = 0.02


@dataclass(frozen=True)
class Placement:
    """Owners of all buckets, and how even they are."""

    tables: list[str]
    owner_TH: Array
    lookups_N: Array
    """Share of all lookups."""
    rows_N: Array
    """Expected rows."""

    def owned(self, worker: int) -> dict[str, Array]:
        """Per table the buckets of one worker, bool [H]."""
        return {table: self.owner_TH[t] == worker for t, table in enumerate(self.tables)}

    def fields(self, worker: int, table_of_field: Sequence[str]) -> list[int]:
        """Numbers of the fields a worker owns pieces of."""
        mine = {table for table, buckets in self.owned(worker).items() if buckets.any()}
        return [number for number, table in enumerate(table_of_field) if table in mine]


def placements(dataset: Dataset, workers: int) -> Iterator[Placement]:
    """Placements of a dataset's tables, the one that shares out work best first, the one by rows alone last."""
    tables = sorted({field.table for field in dataset.row_fields})
    lookups_TH, rows_TH = _weights(dataset, tables)
    for lookup_share, snap in ((LOOKUP_SHARE, SNAP), (LOOKUP_SHARE, 0.0), (0.5, 0.0), (0.25, 0.0), (0.0, 0.0)):
        weight = lookup_share * lookups_TH / lookups_TH.sum() + (1 - lookup_share) * rows_TH / rows_TH.sum()
        owner_TH = _cut(weight.reshape(-1), workers, snap).reshape(weight.shape)
        rows_N = np.bincount(owner_TH.reshape(-1), rows_TH.reshape(-1), workers)
        lookups_N = np.bincount(owner_TH.reshape(-1), lookups_TH.reshape(-1), workers) / lookups_TH.sum()
        yield Placement(tables, owner_TH, lookups_N, rows_N)


def _weights(dataset: Dataset, tables: list[str]) -> tuple[Array, Array]:
    """Expected lookups per sample and rows, by bucket; frequent values count where they fall."""
    lookups_TH, rows_TH = np.zeros((len(tables), BUCKETS)), np.zeros((len(tables), BUCKETS))
    samples = max(dataset.rows("train"), 1)
    for field in dataset.row_fields:
        stats = dataset.stats[field.name]
        t = tables.index(field.table)
        frequent = np.zeros(BUCKETS)
        if stats.top:
            ids = ids_of(np.array([key for key, _, _ in stats.top], np.int64), field.table)
            buckets = (ids.view(np.uint64) >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)
            np.add.at(frequent, buckets, [count / samples for _, count, _ in stats.top])
        rest = max(stats.lookups_per_sample - frequent.sum(), 0.0)
        lookups_TH[t] += frequent + rest / BUCKETS
        # Fields that share a table mostly share its values.
        rows_TH[t] = np.maximum(rows_TH[t], max(stats.cardinality, 1) / BUCKETS)
    return lookups_TH, rows_TH


def _cut(weight: Array, workers: int, snap: float) -> Array:
    """Owner of each unit: the line of weights cut into equal parts, cuts near a table's edge moved there."""
    ends = np.cumsum(weight)
    cuts = [0]
    for worker in range(1, workers):
        wanted = ends[-1] * worker / workers
        cut = int(np.searchsorted(ends, wanted))
        edge = round(cut / BUCKETS) * BUCKETS
        reached = ends[edge - 1] if edge else 0.0
        if abs(reached - wanted) < snap * ends[-1] / workers:
            cut = edge
        cuts.append(max(cut, cuts[-1]))
    owner = np.zeros(len(weight), np.int64)
    for worker, cut in enumerate(cuts):
        owner[cut:] = worker
    return owner
