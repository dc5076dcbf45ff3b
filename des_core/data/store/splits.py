"""Which rows train, validate and test: runs of rows of the ordered parts.

files given   a part each; without valid files, the rows that train held out
day           the last days, or named ones
time          the last shares of all rows, in the order of parts and rows
random        the last shares of each part: parts are shuffled
"""

from __future__ import annotations

from collections.abc import Mapping

from des_core.config import Config, SplitConfig
from des_core.contracts import Segment
from des_core.data.store.parts import PartManifest
from des_core.errors import DataError

Splits = dict[str, tuple[Segment, ...]]


def order_of(config: Config) -> str:
    """How rows are ordered inside a part: "time" or "random"."""
    timed = bool(config.source.time) or config.source.format == "synthetic"
    return "time" if timed and config.split.by != "random" else "random"


def divide(config: Config, parts: Mapping[str, PartManifest]) -> Splits:
    """Train, valid and test over parts in their order.

    Raises:
        DataError: one of them would be empty.
    """
    sizes = {name: manifest.part.rows for name, manifest in parts.items()}
    if config.source.train:
        splits = _by_files(sizes, parts)
    elif config.split.by == "day":
        splits = _by_day(sizes, config.split)
    elif order_of(config) == "time":
        splits = _by_time(sizes, config.split)
    else:
        splits = _by_chance(sizes, config.split)
    for name, segments in splits.items():
        if not sum(segment.stop - segment.start for segment in segments):
            there = f"{sum(sizes.values())} rows in {len(sizes)} parts"
            raise DataError(f"the {name} split would be empty: there are {there}; change [split] or add data")
    return splits


def likely_train_rows(config: Config, part: str, rows: int, held_out: int) -> int:
    """The number of a part's first rows that are training rows, judged by the part alone."""
    if config.source.train:
        return rows - held_out if part == "train" else 0
    if config.split.by == "day" or (part != "all" and order_of(config) == "time"):
        return rows
    return _cuts(rows, config.split)[0]


def _by_files(sizes: dict[str, int], parts: Mapping[str, PartManifest]) -> Splits:
    cut = sizes["train"] - parts["train"].held_out
    valid = Segment(part="valid", start=0, stop=sizes["valid"]) if "valid" in sizes else None
    return {
        "train": (Segment(part="train", start=0, stop=cut),),
        "valid": (valid or Segment(part="train", start=cut, stop=sizes["train"]),),
        "test": (Segment(part="test", start=0, stop=sizes["test"]),),
    }


def _by_day(sizes: dict[str, int], split: SplitConfig) -> Splits:
    left = sorted(sizes)
    chosen: dict[str, list[str]] = {}
    for name, amount in (("test", split.test), ("valid", split.valid)):
        if isinstance(amount, float):
            continue
        chosen[name] = [amount] if isinstance(amount, str) else sorted(amount)
        for day in chosen[name]:
            if day not in left:
                where = "is in two splits" if day in sizes else f"has no rows; there are {', '.join(sorted(sizes))}"
                raise DataError(f"split.{name}: day {day!r} {where}")
            left.remove(day)
    for name, amount in (("test", split.test), ("valid", split.valid)):
        if isinstance(amount, float):
            if len(left) < amount:
                raise DataError(_too_few(sizes, split))
            at = len(left) - int(amount)
            left, chosen[name] = left[:at], left[at:]
    if not left:
        raise DataError(_too_few(sizes, split))
    chosen["train"] = left
    return {
        name: tuple(Segment(part=day, start=0, stop=sizes[day]) for day in chosen[name])
        for name in ("train", "valid", "test")
    }


def _too_few(sizes: dict[str, int], split: SplitConfig) -> str:
    return (
        f"split.by = 'day' needs days for train, valid ({split.valid}) and test ({split.test}), "
        f"but there are {len(sizes)}: {', '.join(sorted(sizes))}; add days or change [split]"
    )


def _by_time(sizes: dict[str, int], split: SplitConfig) -> Splits:
    total = sum(sizes.values())
    first_valid, first_test = _cuts(total, split)
    edges = {"train": (0, first_valid), "valid": (first_valid, first_test), "test": (first_test, total)}
    splits: dict[str, list[Segment]] = {name: [] for name in edges}
    before = 0
    for part, rows in sizes.items():
        for name, (start, stop) in edges.items():
            first, last = max(start - before, 0), min(stop - before, rows)
            if first < last:
                splits[name].append(Segment(part=part, start=first, stop=last))
        before += rows
    return {name: tuple(segments) for name, segments in splits.items()}


def _by_chance(sizes: dict[str, int], split: SplitConfig) -> Splits:
    splits: dict[str, list[Segment]] = {"train": [], "valid": [], "test": []}
    for part, rows in sizes.items():
        first_valid, first_test = _cuts(rows, split)
        edges = {"train": (0, first_valid), "valid": (first_valid, first_test), "test": (first_test, rows)}
        for name, (start, stop) in edges.items():
            if start < stop:
                splits[name].append(Segment(part=part, start=start, stop=stop))
    return {name: tuple(segments) for name, segments in splits.items()}


def _cuts(rows: int, split: SplitConfig) -> tuple[int, int]:
    """The first row of valid and of test."""
    assert isinstance(split.valid, float) and isinstance(split.test, float)
    first_test = rows - round(rows * split.test)
    return max(first_test - round(rows * split.valid), 0), first_test
