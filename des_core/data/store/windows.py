"""A day's window of the feature store: which rows of which days train, and which rows of the last day judge.

    days      ... | champion's day           | later days | the run's day D          |
    rows          trained ... cut'| its tail |  all       | all up to the cut | tail |
                                  <------------- train ----------------------> <test>

The cut is an event time: D's last ``eval.tail`` rows, by time, are at or after it, and no row of the same time is
before it. Parts are in time order, so a cut is a row number, found by halving: a few row groups' times are read.

Dims: R rows of a row group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from des_core import storage
from des_core.config import Config
from des_core.contracts import ROW_GROUP, TIME, Dataset, FieldSpec, Part, Reference, Segment
from des_core.data.read.sources import source_of
from des_core.data.store.dataset import dataset_of
from des_core.data.store.encoding import fields_of, specs_of
from des_core.data.store.parts import PartManifest, RowGroups
from des_core.errors import DataError


@dataclass(frozen=True)
class Cut:
    """Where a day is cut: the tail's first row and its event time in microseconds since 1970 UTC."""

    row: int
    time: int


class Times:
    """Event times of a part in time order, a row group at a time."""

    def __init__(self, root: str, part: Part) -> None:
        self._groups = RowGroups(root, part, [TIME])
        self._rows = part.rows

    def at(self, row: int) -> int:
        """The time of a row."""
        return int(self._group(row // ROW_GROUP)[row % ROW_GROUP])

    def first_from(self, time: int) -> int:
        """The first row of that time or a later one; all rows where there is none."""
        low, high = 0, -(-self._rows // ROW_GROUP)
        while low < high:
            middle = (low + high) // 2
            if self._group(middle)[-1] < time:
                low = middle + 1
            else:
                high = middle
        start = low * ROW_GROUP
        return start + int(np.searchsorted(self._group(low), time)) if start < self._rows else self._rows

    def _group(self, number: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        column = self._groups.read(number).column(TIME)
        return np.asarray(column.to_numpy(), np.int64)


def cut_of(root: str, day: str, part: Part, tail: float, not_before: int = 0) -> Cut:
    """Where a day is cut: its last ``tail`` share, at least one row, never before an earlier cut.

    Raises:
        DataError: all of its rows have one time.
    """
    times = Times(root, part)
    row = times.first_from(max(times.at(part.rows - max(1, round(part.rows * tail))), not_before))
    if row == 0:
        row = times.first_from(times.at(0) + 1)
    if row >= part.rows:
        raise DataError(f"{day}: its {part.rows:,} rows cannot be cut by time; source.time must tell them apart")
    return Cut(row, times.at(row))


def write_window(
    config: Config,
    root: str,
    manifests: Mapping[str, PartManifest],
    as_of: str,
    cut: Cut,
    trained: Mapping[str, int],
    known: Sequence[FieldSpec] = (),
) -> Reference:
    """Write the data manifest of a window; the same window is the same file.

    Args:
        root: the feature store.
        manifests: parts of the window's days.
        trained: event times before which rows of a day were trained already.
        known: fields whose statistics are settled.

    Raises:
        DataError: no row is left to train on.
    """
    train: list[Segment] = []
    for day, manifest in sorted(manifests.items()):
        start = Times(root, manifest.part).first_from(trained[day]) if day in trained else 0
        stop = cut.row if day == as_of else manifest.part.rows
        if start < stop:
            train.append(Segment(part=day, start=start, stop=stop))
    if not train:
        raise DataError(f"{as_of}: no row before the cut is new; wait for the next day")
    tail = Segment(part=as_of, start=cut.row, stop=manifests[as_of].part.rows)
    splits = {"train": tuple(train), "valid": (), "test": (tail,)}
    source, specs = source_of(config), specs_of(fields_of(config))
    dataset = dataset_of(config, source, specs, root, dict(sorted(manifests.items())), splits, known)
    return dataset.write(storage.join(root, f"window-{_digest(dataset)}.json"))


def _digest(dataset: Dataset) -> str:
    return hashlib.sha256(dataset.model_dump_json().encode()).hexdigest()[:12]
