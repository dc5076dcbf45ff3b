"""A day's fields against those of the days before it, from what is kept of each part.

    psi            sum over bins of (q - p) ln(q / p), p and q the bins' shares before and in the day, less what
                   chance alone adds to it, (bins - 1) (1 / n + 1 / m). Bins are the 20 values most frequent before,
                   and the rest together; of numbers the tenths before. Missing values are not in it.
    new_share      of the day's values, those that no day before had
    missing_share  of the day's rows, those without a value; missing_before that of the days before

Keys are counted in the sketches that lie beside a part's rows. Where these count distinct keys by estimate, so is the
new share: distinct keys of all days less those before are new, and are the usual ones among the day's unknown keys.
Numbers are read from the rows: at most 4 row groups of a part, evenly spread, and the last 7 days before.

Sources: Siddiqi, "Credit risk scorecards", 2006 (psi); Yurdakul, "Statistical properties of the population stability
index", 2018 (its mean under no drift).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from des_core.contracts import FieldSpec
from des_core.data.read.hashing import MISSING, Array
from des_core.data.store.parts import PartManifest, RowGroups, whole_part
from des_core.data.store.sketches import sketches
from des_core.data.store.statistics import Sketch, distinct, merged

FREQUENT = 20
TENTHS = 10
ROW_GROUPS = 4
NUMBER_DAYS = 7
LEAST_ROWS = 100
"""A day of fewer rows, or days before with fewer, say nothing."""

OF_CALENDAR = ("weekday", "year")
"""Derived values that change from day to day by nature."""


def measure(root: str, specs: Sequence[FieldSpec], day: str, earlier: Sequence[str]) -> dict[str, dict[str, float]]:
    """Field -> psi, new_share, missing_share, missing_before of a day against earlier ones; {} without any.

    Args:
        root: the features folder.
        specs: of the fields, whatever their frozen statistics.
        day: name of the day's part.
        earlier: names of parts; those that are not whole, or were made with other fields, are passed over.
    """
    today = whole_part(root, day)
    if today is None:
        return {}
    found = {name: whole_part(root, name) for name in sorted(set(earlier) - {day})}
    before = {name: part for name, part in found.items() if part is not None and part.spec == today.spec}
    if min(today.part.rows, sum(part.part.rows for part in before.values())) < LEAST_ROWS:
        return {}
    # Sketches were made before the statistics were frozen.
    bare = [spec.model_copy(update={"mean": 0.0, "std": 1.0, "edges": ()}) for spec in specs]
    sketched = [sketches(root, part.part, name, bare, 0, part.part.rows) for name, part in before.items()]
    of_today = sketches(root, today.part, day, bare, 0, today.part.rows)
    drifts: dict[str, dict[str, float]] = {}
    for spec, now, *past in zip(bare, of_today, *sketched, strict=True):
        if spec.derive in OF_CALENDAR:
            continue
        known = merged(spec, past)
        if spec.kind == "numeric":
            psi, new_share = _psi_of_numbers(root, spec.name, today, list(before.values())[-NUMBER_DAYS:]), 0.0
        else:
            psi, new_share = _psi_of_keys(known, now), _new_share(spec, known, now)
        drifts[spec.name] = {
            "psi": psi,
            "new_share": new_share,
            "missing_share": now.missing / now.rows,
            "missing_before": known.missing / known.rows,
        }
    return drifts


def _psi_of_keys(before: Sketch, now: Sketch) -> float:
    counts_K = np.where(before.keys == MISSING, 0, before.counts)
    most = np.argsort(-counts_K, kind="stable")[:FREQUENT]
    most = most[counts_K[most] > 0]
    of_now = dict(zip(now.keys.tolist(), now.counts.tolist(), strict=True))
    old, new = counts_K[most], np.array([of_now.get(key, 0) for key in before.keys[most].tolist()], np.int64)
    olds, news = before.lookups - before.missing, now.lookups - now.missing
    return _psi(np.append(old, olds - old.sum()), np.append(new, news - new.sum()))


def _psi_of_numbers(root: str, column: str, today: PartManifest, before: Sequence[PartManifest]) -> float:
    now = _numbers(root, column, today)
    then = np.concatenate([_numbers(root, column, part) for part in before])
    if not len(then):
        return 0.0
    edges = np.unique(np.quantile(then, np.arange(1, TENTHS) / TENTHS, method="nearest"))
    bins = len(edges) + 1
    old, new = (np.bincount(np.searchsorted(edges, each, side="left"), minlength=bins) for each in (then, now))
    return _psi(old, new)


def _psi(old: Array, new: Array) -> float:
    """Of counts per bin; a bin that is empty on both sides is none."""
    used = old + new > 0
    old, new = old[used], new[used]
    if len(old) < 2 or not old.sum() or not new.sum():
        return 0.0
    # Half a count more in each bin: an empty one is rare, not impossible.
    p, q = (old + 0.5) / (old + 0.5).sum(), (new + 0.5) / (new + 0.5).sum()
    by_chance = (len(old) - 1) * (1 / old.sum() + 1 / new.sum())
    return max(float(((q - p) * np.log(q / p)).sum() - by_chance), 0.0)


def _new_share(spec: FieldSpec, before: Sketch, now: Sketch) -> float:
    unknown = ~np.isin(now.keys, before.keys)
    known_lookups = int(now.counts[~unknown & (now.keys != MISSING)].sum())
    lookups = now.lookups - now.missing
    # A missing value is never new, though a day may be the first to have one.
    first_missing = int(MISSING in now.keys[unknown])
    unknown_keys = distinct(now) - int((~unknown).sum()) - first_missing
    new_keys = distinct(merged(spec, [before, now])) - distinct(before) - first_missing
    if unknown_keys <= 0 or new_keys <= 0 or lookups <= 0:
        return 0.0
    return (lookups - known_lookups) / lookups * min(new_keys / unknown_keys, 1.0)


def _numbers(root: str, column: str, part: PartManifest) -> Array:
    """A part's numbers, without missing ones."""
    groups = RowGroups(root, part.part, [column])
    chosen = np.unique(np.linspace(0, len(groups) - 1, ROW_GROUPS).astype(int)).tolist()
    values = pa.concat_tables([groups.read(group) for group in chosen]).column(column)
    numbers: Array = values.to_numpy().astype(np.float64)
    return numbers[~np.isnan(numbers)]
