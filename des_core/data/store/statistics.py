"""What is known of a field without keeping its values: sketches of bounded size that add up over parts.

    distinct keys       exact up to 2^16, above that HyperLogLog over 2^14 registers (error about 1 %)
    frequent keys       exact up to 2^16 keys; above that the full table is halved: the median count is taken from
                        all, and the empty ones leave (Misra-Gries), so counts may fall short a little
    mean and variance   Welford's sums, joined pairwise
    quantiles           the values of the 2^16 rows whose counter hashes are least

All of it is a function of the rows alone: the same file gives the same sketch.

Sources: Flajolet et al., "HyperLogLog", AofA 2007; Misra, Gries, "Finding repeated elements", 1982.
Dims: V values, R rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numba import njit, uint8, uint64

from des_core.contracts import FieldSpec, FieldStats
from des_core.data.read.hashing import I64, MISSING, Array, as_text, splitmix64

MOST_KEYS = 1 << 16
TOP = 20
BUCKET_EDGES = 31
SAMPLED_ROWS = 1 << 16

_SLOTS = 1 << 17
_REGISTER_BITS = 14
_REGISTERS = 1 << _REGISTER_BITS


@dataclass(frozen=True)
class Sketch:
    """One field over some rows.

    ``keys`` and ``counts`` are of the frequent keys, all if ``registers`` is empty, ascending by key;
    ``draws`` and ``sampled`` are the sampled rows' hashes, ascending, and numbers (NaN if missing).
    """

    rows: int = 0
    missing: int = 0
    lookups: int = 0
    keys: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    counts: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    registers: Array = field(default_factory=lambda: np.zeros(0, np.uint8))
    mean: float = 0.0
    squares: float = 0.0
    draws: Array = field(default_factory=lambda: np.zeros(0, np.uint64))
    sampled: Array = field(default_factory=lambda: np.zeros(0, np.float32))


class Counter:
    """Counts the keys of one field while it is ingested."""

    def __init__(self) -> None:
        self._keys = np.zeros(_SLOTS, np.int64)
        self._counts = np.zeros(_SLOTS, np.int64)
        self._used = 0
        self._registers = np.zeros(0, np.uint8)

    def add(self, keys_V: I64, counts_V: I64 | None = None) -> None:
        """Count keys, once each or ``counts_V`` times."""
        counts_V = np.ones(1, np.int64) if counts_V is None else counts_V
        at = 0
        while True:
            self._used, at = _count(keys_V, counts_V, at, self._keys, self._counts, self._used, self._registers)
            if at == len(keys_V):
                return
            self._halve()

    def _halve(self) -> None:
        """Make room: the less frequent half of the keys leaves the table."""
        used = self._counts > 0
        keys, counts = self._keys[used], self._counts[used]
        self.register(keys)
        counts = counts - np.partition(counts, len(counts) // 2)[len(counts) // 2]
        self._keys[:], self._counts[:], self._used = 0, 0, 0
        kept = counts > 0
        self._used, _ = _count(keys[kept], counts[kept], 0, self._keys, self._counts, 0, np.zeros(0, np.uint8))

    def register(self, keys: I64) -> None:
        """From here on distinct keys are estimated; ``keys`` were seen before."""
        if not len(self._registers):
            self._registers = np.zeros(_REGISTERS, np.uint8)
            _register_all(keys, self._registers)

    def merge(self, sketch: Sketch) -> None:
        """Add what was counted elsewhere."""
        if len(sketch.registers):
            self.register(self._keys[self._counts > 0])
            np.maximum(self._registers, sketch.registers, out=self._registers)
        self.add(sketch.keys, sketch.counts)

    def result(self) -> tuple[I64, I64, Array]:
        """Keys, counts and registers of a sketch."""
        used = np.flatnonzero(self._counts)
        order = used[np.argsort(self._keys[used])]
        return self._keys[order], self._counts[order], self._registers


@njit(nogil=True, cache=True)
def _count(
    keys_V: Array, counts_V: Array, at: int, table: Array, counts: Array, used: int, registers: Array
) -> tuple[int, int]:
    """Count keys from ``at`` on; returns the table's keys and where it stopped, full."""
    mask = uint64(len(table) - 1)
    while at < len(keys_V):
        key = keys_V[at]
        mixed = splitmix64(uint64(key))
        slot = mixed & mask
        while counts[slot] != 0 and table[slot] != key:
            slot = (slot + uint64(1)) & mask
        if counts[slot] == 0:
            if used == MOST_KEYS:
                return used, at
            table[slot] = key
            used += 1
        counts[slot] += counts_V[at] if len(counts_V) > 1 else counts_V[0]
        if len(registers):
            _register(mixed, registers)
        at += 1
    return used, at


@njit(nogil=True, cache=True)
def _register(mixed: Any, registers: Array) -> None:
    rest = mixed << uint64(_REGISTER_BITS)
    rank = 1
    while rank <= 64 - _REGISTER_BITS and not rest >> uint64(63):
        rest <<= uint64(1)
        rank += 1
    place = mixed >> uint64(64 - _REGISTER_BITS)
    if rank > registers[place]:
        registers[place] = uint8(rank)


@njit(nogil=True, cache=True)
def _register_all(keys: Array, registers: Array) -> None:
    for i in range(len(keys)):
        _register(splitmix64(uint64(keys[i])), registers)


def distinct(sketch: Sketch) -> int:
    """Different keys: counted, or estimated."""
    if not len(sketch.registers):
        return len(sketch.keys)
    alpha = 0.7213 / (1 + 1.079 / _REGISTERS)
    return round(alpha * _REGISTERS**2 / float(np.sum(2.0 ** -sketch.registers.astype(np.float64))))


class Sketcher:
    """Sketches one field while its rows are written in order."""

    def __init__(self, spec: FieldSpec) -> None:
        self._spec = spec
        self._sketch = Sketch()
        self._counter = Counter() if spec.kind != "numeric" else None

    def add(self, column: pa.Array, draws_R: Array) -> None:
        """Take in rows of the field's feature column, with each row's counter hash."""
        if self._counter is None:
            self._add(_number_sketch(column, draws_R if self._spec.transform == "bucket" else None))
            return
        keys_V = column.flatten().to_numpy() if self._spec.kind == "multi" else column.to_numpy()
        self._counter.add(keys_V)
        missing = int(np.count_nonzero(keys_V == MISSING))
        self._add(Sketch(rows=len(column), missing=missing, lookups=len(keys_V)))

    def merge(self, sketch: Sketch) -> None:
        """Take in rows that were sketched elsewhere."""
        if self._counter is not None:
            self._counter.merge(sketch)
        self._add(sketch)

    def _add(self, other: Sketch) -> None:
        mine = self._sketch
        here, there = mine.rows - mine.missing, other.rows - other.missing
        share = there / max(here + there, 1)
        step = other.mean - mine.mean
        draws = np.concatenate([mine.draws, other.draws])
        least = np.argsort(draws, kind="stable")[:SAMPLED_ROWS]
        self._sketch = Sketch(
            rows=mine.rows + other.rows,
            missing=mine.missing + other.missing,
            lookups=mine.lookups + other.lookups,
            mean=mine.mean + step * share,
            squares=mine.squares + other.squares + step**2 * here * share,
            draws=draws[least],
            sampled=np.concatenate([mine.sampled, other.sampled])[least],
        )

    def result(self) -> Sketch:
        """The sketch of all rows so far."""
        if self._counter is None:
            return self._sketch
        keys, counts, registers = self._counter.result()
        return replace(self._sketch, keys=keys, counts=counts, registers=registers)


def _number_sketch(column: pa.Array, draws_R: Array | None) -> Sketch:
    values_R = column.to_numpy(zero_copy_only=False)
    present = values_R[~np.isnan(values_R)].astype(np.float64)
    mean = float(present.mean()) if len(present) else 0.0
    return Sketch(
        rows=len(values_R),
        missing=len(values_R) - len(present),
        lookups=len(values_R),
        mean=mean,
        squares=float(((present - mean) ** 2).sum()),
        draws=np.zeros(0, np.uint64) if draws_R is None else draws_R,
        sampled=np.zeros(0, np.float32) if draws_R is None else values_R.astype(np.float32),
    )


def with_statistics(spec: FieldSpec, sketch: Sketch) -> FieldSpec:
    """The field with its mean, deviation and bucket edges, rounded to what float32 holds."""
    if spec.kind != "numeric":
        return spec
    present = sketch.rows - sketch.missing
    edges: tuple[float, ...] = ()
    if spec.transform == "bucket":
        sampled = sketch.sampled[~np.isnan(sketch.sampled)].astype(np.float64)
        if len(sampled):
            quantiles = np.quantile(sampled, np.arange(1, BUCKET_EDGES + 1) / (BUCKET_EDGES + 1))
            edges = tuple(quantiles.astype(np.float32).tolist())
    std = (sketch.squares / present) ** 0.5 if present else 0.0
    return spec.model_copy(update={"mean": sketch.mean, "std": std or 1.0, "edges": edges})


def stats_of(spec: FieldSpec, sketch: Sketch, texts: dict[int, str]) -> FieldStats:
    """What placement and reports know of the field."""
    rows = max(sketch.rows, 1)
    if spec.kind == "numeric":
        cardinality = len(set(spec.edges)) + 1 if spec.transform == "bucket" else int(sketch.rows > sketch.missing)
        cardinality += int(sketch.missing > 0)
    else:
        cardinality = distinct(sketch)
    least = np.partition(sketch.counts, -TOP)[-TOP] if len(sketch.counts) > TOP else 0
    often = sketch.counts >= least
    most = heapq.nsmallest(TOP, zip((-sketch.counts[often]).tolist(), sketch.keys[often].tolist(), strict=True))
    return FieldStats(
        lookups_per_sample=sketch.lookups / rows,
        missing_share=sketch.missing / rows,
        cardinality=cardinality,
        top=tuple((key, -count, "(missing)" if key == MISSING else texts.get(key, "")) for count, key in most),
    )


class ValueTexts:
    """The texts of one field's frequent values, by key, counted in a sample of the rows; samples add up."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.texts: dict[int, str] = {}

    def add(self, keys_V: I64, values: pa.Array) -> None:
        """Take in sampled values; of a key's texts the first one counts."""
        # As np.unique, whose sort is a stable one, three times as slow.
        order = np.argsort(keys_V)
        sorted_keys = keys_V[order]
        edges = np.flatnonzero(np.append(True, sorted_keys[1:] != sorted_keys[:-1])[: len(order)])
        counts = np.diff(np.append(edges, len(order)))
        first = np.minimum.reduceat(order, edges) if len(order) else order
        for key, count, place in zip(sorted_keys[edges].tolist(), counts.tolist(), first.tolist(), strict=True):
            if key == MISSING:
                continue
            self.counts[key] = self.counts.get(key, 0) + count
            if key not in self.texts:
                self.texts[key] = str(as_text(values.slice(place, 1))[0].as_py())

    def merge(self, keys: Sequence[int], counts: Sequence[int], texts: Sequence[str]) -> None:
        """Take in what was counted elsewhere, in later rows."""
        for key, count, text in zip(keys, counts, texts, strict=True):
            self.counts[key] = self.counts.get(key, 0) + count
            self.texts.setdefault(key, text)

    def result(self, most: int = 128) -> tuple[tuple[int, str], ...]:
        """Keys and texts of the most frequent values, most frequent first."""
        kept = heapq.nsmallest(most, self.counts, key=lambda key: (-self.counts[key], key))
        return tuple((key, self.texts[key]) for key in kept)


def merged(spec: FieldSpec, sketches: Sequence[Sketch]) -> Sketch:
    """The sketch of all rows of several."""
    sketcher = Sketcher(spec)
    for sketch in sketches:
        sketcher.merge(sketch)
    return sketcher.result()
