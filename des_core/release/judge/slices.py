"""Candidate against champion among the test rows of single values of a field.

The values of a field are those most frequent among the rows, at most 20, with gate.slice_min_samples each; a row of a
multi field belongs to every value it lists.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from des_core import metrics as measure
from des_core.config import GateConfig
from des_core.contracts import FILE, GROUP, ROW, Dataset, Reference
from des_core.data.feed.batches import Stream, sample_ids
from des_core.data.read.hashing import MISSING
from des_core.data.read.parsing import one_chunk
from des_core.release.judge.checks import Clusters, Floats
from des_core.verdict import Check, Slice

MOST_VALUES = 20
BATCH = 1 << 18


def of(dataset: Reference, field: str) -> tuple[pa.Table, dict[int, str]]:
    """One row for each value of each test row, its sample id and the value's key; texts of frequent keys."""
    known = Dataset.load(dataset)
    tables = []
    for batch in Stream(dataset, "test", [field, FILE, ROW]).batches(BATCH):
        samples, keys = sample_ids(batch, known.files), one_chunk(batch.column(field))
        if pa.types.is_list(keys.type):
            samples, keys = samples.take(pc.list_parent_indices(keys)), keys.flatten()
        tables.append(pa.table({"sample": samples, "key": keys}))
    return pa.concat_tables(tables), {key: text for key, _, text in known.stats[field].top}


def groups_of(dataset: Reference) -> pa.Table:
    """Sample id and key of source.group of each test row."""
    known = Dataset.load(dataset)
    tables = []
    for batch in Stream(dataset, "test", [GROUP, FILE, ROW]).batches(BATCH):
        tables.append(pa.table({"sample": sample_ids(batch, known.files), "group": batch.column(GROUP)}))
    return pa.concat_tables(tables)


def compare(
    bounds: GateConfig,
    samples: pa.ChunkedArray,
    rows: tuple[Floats, Floats, Floats],
    field: str,
    values: pa.Table,
    texts: Mapping[int, str],
    groups: Clusters | None = None,
) -> list[Slice]:
    """The slices of one field.

    Args:
        samples: ids of the rows.
        rows: their labels, candidate's scores and champion's scores.
        values, texts: as from ``of``.
        groups: numbers of rows that are not independent.
    """
    place = pc.index_in(values["sample"], value_set=samples.combine_chunks())
    here = pc.is_valid(place)
    # A list may name a value twice; a row is judged once.
    pairs = np.unique(
        np.stack([values["key"].filter(here).to_numpy(), place.filter(here).to_numpy().astype(np.int64)]), axis=1
    )
    keys, first, counts = np.unique(pairs[0], return_index=True, return_counts=True)
    found = []
    for at in np.argsort(-counts, kind="stable")[:MOST_VALUES]:
        if counts[at] < bounds.slice_min_samples:
            break
        mine = pairs[1][first[at] : first[at] + counts[at]]
        labels, ours, theirs = (column[mine] for column in rows)
        if not 2 <= (labels > 0.5).sum() <= len(labels) - 2:
            continue
        difference, (low, _) = measure.auc_difference(
            labels, ours, theirs, None if groups is None else measure.clusters(groups[mine])
        )
        champion_auc = measure.auc(labels, theirs) or 0.0
        key = int(keys[at])
        text = "(missing)" if key == MISSING else texts.get(key) or f"key {key & (1 << 64) - 1:016x}"
        found.append(
            Slice(
                field=field,
                value=text,
                samples=len(mine),
                auc=champion_auc + difference,
                champion_auc=champion_auc,
                difference=difference,
                low=low,
                kept=low > -bounds.slice_max_auc_drop,
            )
        )
    return found


def check(bounds: GateConfig, slices: list[Slice]) -> list[Check]:
    """One line for all slices that are kept, or one for each that is not."""
    beyond = [each for each in slices if not each.kept]
    worst = min(slices, key=lambda each: each.low, default=None)
    return [
        Check(
            name=f"slice_max_auc_drop {each.field}",
            value=each.low,
            bound=-bounds.slice_max_auc_drop,
            kept=each.kept,
            about=f"{each.field} = {each.value}: AUC differs by {each.difference:+.4f} (at least {each.low:+.4f}) on "
            f"{each.samples:,} rows, {'within' if each.kept else 'beyond'} "
            f"gate.slice_max_auc_drop = {bounds.slice_max_auc_drop:g}",
        )
        for each in beyond or ([worst] if worst else [])
    ]
