"""Memory that each worker of a run will hold, predicted from the config and the data's statistics.

    rows      rows owned x (weights + optimizer state)
    index     rows owned x (id, table, lookups, last step: 18 bytes) + entries of 8, a power of two at most 0.6 full
    waiting   the same for the ids that own no row yet, where table.admit_count is above 1
    checkpoint  what a save in the background copies: counters and places of all rows, an eighth of the rows, blocks
    dense     dense weights, their gradients and the flat sum of these, optimizer state, and what saving them copies
    batch     lookups of the batch in use, of the one that waits and of the one in the making; vectors and activations
    samples   the feature store's columns, read ahead: a window of row groups, the same in its order, and the last one
    process   the interpreter with torch, numba and pyarrow, measured

Tables grow in place and pages never written cost nothing, so growth needs no slack of its own. A checkpoint is loaded
a block at a time, which is less than the training that follows takes.

How sure: a field's number of values is exact up to 65,536, and within about 1 % above. Bounds on rows (max_rows,
admission) are taken as reached, eviction as idle, and what a day adds to its champion's rows as new: with them, the
prediction is an upper bound. ``benchmarks/memory.py`` sets predicted and measured memory side by side.

Dims: N workers, F fields with rows, T tables, K numbers per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from des_core import storage
from des_core.config import Config
from des_core.contracts import ROW_GROUP, Dataset, FieldSpec
from des_core.data.feed.batches import WINDOW
from des_core.data.store.encoded import RUN_BYTES
from des_core.engine.exchange.placement import Placement, placements
from des_core.engine.models import Model
from des_core.engine.weights.index import MAX_LOAD
from des_core.engine.weights.optimizer import state_width
from des_core.errors import ConfigError
from des_core.log import byte_text
from des_core.run import Run

Array = np.ndarray[Any, np.dtype[np.float64]]

PROCESS_BYTES = 520 << 20
"""Of a worker that has imported all modules and compiled its first step; 470 to 600 MiB were measured."""
SLOT_BYTES = 8 + 2 + 4 + 4
"""Of an id in its slot: id, table, lookups, last step."""
SNAPSHOT_BYTES, COPIED, BLOCKS_BYTES = 4 + 4 + 4 + 4, 1 / 8, 8 << 20
"""Of a save in the background: bytes of a row's place and counters, the share of rows and state that may have to be
copied because training changes them first, and the blocks on their way."""
LOOKUP_BYTES = 145
"""Of a lookup in the batches on their way, rows apart; measured with rows of one number."""
VECTOR_COPIES, LAYER_COPIES, ROW_COPIES = 2, 3, 3
"""Of field vectors, activations and a batch's unique rows: the values, their gradients and what the exchange sends."""
LIGHT_BYTES, BESIDE_BYTES = 300 << 20, 40
"""Of a step without torch; of a row's label, time and place while it is sorted."""
SCORE_BYTES = 120
"""Of a scored sample at its home: label, place, group, its score by two models, and what sorting them takes."""
EACH_TRIED, MOST_WORKERS = 64, 1024
"""Numbers of workers among which one that fits is searched for."""


@dataclass(frozen=True)
class Need:
    """Predicted bytes of each worker, arrays [N]."""

    owned: Array
    """Rows, a number."""
    parts: dict[str, Array]
    """Bytes in training, by what holds them."""
    scored: float
    """Bytes of the scores of each worker's homes in a split."""
    on_device: bool
    """Whether rows and dense layers lie on the worker's GPU, not in main memory."""

    @property
    def train(self) -> Array:
        """Bytes of main memory in training, begun from nothing."""
        away = self.parts["rows"] + self.parts["dense"] if self.on_device else 0.0
        total: Array = sum(self.parts.values(), np.zeros(len(self.owned))) - away
        return total

    @property
    def evaluate(self) -> Array:
        """Bytes of main memory while the trained weights are loaded, a block at a time, and judged."""
        scoring: Array = self.train - self.parts["samples"] - self.parts["waiting"] - self.parts["checkpoint"]
        return scoring + self.scored + BLOCKS_BYTES

    @property
    def most(self) -> float:
        """Bytes that each worker must be given to train, also from a checkpoint, and to evaluate."""
        return float(max(self.train.max(), self.evaluate.max()))

    @property
    def device(self) -> Array:
        """Bytes on each worker's GPU, where rows grow by copying."""
        return 2.25 * self.parts["rows"] + self.parts["dense"] + self.parts["batch"]


def need(config: Config, dataset: Dataset, placement: Placement, model: Model, known_rows: float = 0.0) -> Need:
    """What the workers of a placement need.

    Args:
        known_rows: rows of the champion that training goes on from.
    """
    size = number_bytes(config)
    met, share_N = float(placement.rows_N.sum()), placement.rows_N / max(placement.rows_N.sum(), 1.0)
    owned_N = share_N * _rows(config, dataset, met, known_rows)
    width, state = model.row_width, state_width(config.optimizer.rows.name, model.row_width)
    row_bytes = width * (2 if config.table.rows == "bf16" else size) + state * size
    owns_NF = _owns(placement, dataset)
    on_device = config.train.device == "cuda" or (config.train.device == "auto" and config.cluster.gpus > 0)
    each = np.ones(len(owned_N))
    parts = {
        "rows": owned_N * row_bytes,
        "index": slot_bytes(owned_N),
        "waiting": slot_bytes(share_N * met) if config.table.admit_count > 1 else 0.0 * each,
        "checkpoint": owned_N * (SNAPSHOT_BYTES + row_bytes * (1 if on_device else COPIED)) + BLOCKS_BYTES,
        "dense": _dense(config, model, size) * each,
        "batch": _batch(config, dataset, placement, model, owned_N, owns_NF),
        "samples": _samples(config, dataset, owns_NF),
        "process": float(PROCESS_BYTES) * each,
    }
    scored = SCORE_BYTES * max(dataset.rows("valid"), dataset.rows("test")) / len(owned_N)
    return Need(owned_N, parts, scored, on_device)


def slot_bytes(rows_N: Array) -> Array:
    """Bytes of the index over so many ids, and of what is known of each."""
    entries_N = 2.0 ** np.maximum(10, np.ceil(np.log2(np.maximum(rows_N, 1) / MAX_LOAD)))
    bytes_N: Array = SLOT_BYTES * rows_N + 8 * entries_N
    return bytes_N


def number_bytes(config: Config) -> int:
    """Bytes per number of rows and activations."""
    return 8 if config.train.precision == "fp64" else 4


def _rows(config: Config, dataset: Dataset, met: float, known_rows: float) -> float:
    """Rows over all workers, of the values that training meets and those that the champion has."""
    epochs = config.recurring.epochs if known_rows else config.train.epochs
    lookups = sum(dataset.stats[field.name].lookups_per_sample for field in dataset.row_fields)
    admitted = min(met, epochs * lookups * dataset.rows("train") / config.table.admit_count)
    rows = admitted + known_rows
    return min(rows, float(config.table.max_rows)) if config.table.max_rows else rows


def _owns(placement: Placement, dataset: Dataset) -> Array:
    """Whether a worker owns a piece of a field, 0 or 1 [N, F]."""
    owns_NT = np.zeros((len(placement.rows_N), len(placement.tables)))
    for table, owner_H in enumerate(placement.owner_TH):
        owns_NT[owner_H, table] = 1
    return owns_NT[:, [placement.tables.index(field.table) for field in dataset.row_fields]]


def _dense(config: Config, model: Model, size: int) -> float:
    """Bytes of the dense part; saving copies its weights and state, once as tensors and once as a file's bytes."""
    numbers = sum(parameter.numel() for parameter in model.parameters())
    kept = 1 + {"sgd": 0, "adagrad": 1}.get(config.optimizer.dense.name, 2)
    return float(numbers * size * (kept + 3 + 2 * kept))


def _batch(
    config: Config, dataset: Dataset, placement: Placement, model: Model, owned_N: Array, owns_NF: Array
) -> Array:
    """Bytes of the batches on their way, and of the activations of the one in use."""
    samples, workers, size = config.train.batch, len(owned_N), number_bytes(config)
    operators = model.by_name.values()
    lookups = samples * sum(dataset.stats[field.name].lookups_per_sample for field in dataset.row_fields)
    lookups_N = lookups * placement.lookups_N
    total_N: Array = LOOKUP_BYTES * lookups_N + ROW_COPIES * np.minimum(lookups_N, owned_N) * model.row_width * size
    if any(operator.by_field for operator in operators):
        total_N += VECTOR_COPIES * samples * owns_NF.sum(1) * model.factors * size
        if workers > 1:
            # The vectors of all fields may be brought home.
            total_N += samples / workers * len(dataset.row_fields) * model.factors * size
    widths = sum(operator.width for operator in operators)
    layers = sum(config.model.hidden) if model.towers else 0
    return total_N + LAYER_COPIES * size * (samples * widths + samples / workers * layers)


def _samples(config: Config, dataset: Dataset, owns_NF: Array) -> Array:
    """Bytes of the columns read ahead."""
    row_bytes_F = np.array([_column_bytes(dataset, field) for field in dataset.row_fields])
    beside = 4.0 + 8.0 * bool(config.table.idle_days) + 4.0 * len(dataset.dense_fields)
    samples_N: Array = (owns_NF @ row_bytes_F + beside) * _read_ahead(config, dataset)
    return samples_N


def _read_ahead(config: Config, dataset: Dataset) -> float:
    """Rows in memory at most: a window as it is read and in its order, and the last one until its batches are gone."""
    rows = dataset.rows("train")
    first = min(rows, ROW_GROUP * (WINDOW if config.train.shuffle else 1))
    second = min(rows - first, first)
    return max(2.0 * first, first + 2.0 * second)


def _column_bytes(dataset: Dataset, field: FieldSpec) -> float:
    """Bytes per sample of a field's columns in the feature store."""
    lookups, weighted = dataset.stats[field.name].lookups_per_sample, bool(field.weight)
    if field.kind == "multi":
        return 4.0 + 8.0 * lookups + (4.0 + 4.0 * lookups) * weighted
    return (4.0 if field.kind == "numeric" else 8.0) + 4.0 * weighted


def placed(
    config: Config, dataset: Dataset, workers: int, model: Model, limit_bytes: float, known_rows: float = 0.0
) -> Placement | None:
    """The most even placement with which no worker needs more than ``limit_bytes`` (0: no limit), None without one."""
    for placement in placements(dataset, workers):
        if not limit_bytes or need(config, dataset, placement, model, known_rows).most <= limit_bytes:
            return placement
    return None


def fit(
    config: Config,
    dataset: Dataset,
    workers: int,
    model: Model,
    limit_of: Callable[[int], tuple[float, str]],
    known_rows: float = 0.0,
) -> Placement:
    """As ``placed``.

    Args:
        limit_of: what each of so many workers may have, in bytes (0: no limit), and who says so.

    Raises:
        ConfigError: a worker needs more; the message names the smallest number of workers that fits.
    """
    limit_bytes, why = limit_of(workers)
    found = placed(config, dataset, workers, model, limit_bytes, known_rows)
    if found is not None:
        return found
    least = min((need(config, dataset, one, model, known_rows) for one in placements(dataset, workers)), key=_most)
    largest = int(least.owned.argmax())
    rows, table = least.owned[largest], least.parts["rows"][largest] + least.parts["index"][largest]
    smallest = smallest_fit(config, dataset, model, limit_of, known_rows)
    fix = f"set train.workers to {smallest}" if smallest else "no other number of workers would fit either: give more"
    raise ConfigError(
        f"{workers} worker{'s' * (workers > 1)} would need up to {byte_text(least.most)} each, and may have "
        f"{byte_text(limit_bytes)} each ({why}): {rows:,.0f} rows of one worker take {byte_text(table)}; "
        f"{fix}, or lower table.max_rows, model.factors or train.batch"
    )


def _most(one: Need) -> float:
    return one.most


def smallest_fit(
    config: Config,
    dataset: Dataset,
    model: Model,
    limit_of: Callable[[int], tuple[float, str]],
    known_rows: float = 0.0,
) -> int:
    """The smallest number of workers that all fit, 0 if none is found up to ``MOST_WORKERS``.

    Every number up to ``EACH_TRIED`` is tried; beyond, those between a power of two that fits and the one before.
    """
    whole = need(config, dataset, next(placements(dataset, 1)), model, known_rows)
    # On average a worker holds its share of the table: with fewer workers it cannot fit.
    shared = whole.parts["rows"][0] * (not whole.on_device) + (SLOT_BYTES + 8 / MAX_LOAD) * whole.owned[0]
    floor = _floor(config, dataset, model)

    def fits(workers: int) -> bool:
        limit_bytes, _ = limit_of(workers)
        possible = limit_bytes >= floor and shared / workers + PROCESS_BYTES <= limit_bytes
        return possible and placed(config, dataset, workers, model, limit_bytes, known_rows) is not None

    for workers in range(1, EACH_TRIED + 1):
        if fits(workers):
            return workers
    power = EACH_TRIED
    while power < MOST_WORKERS:
        power *= 2
        if fits(power):
            return next(workers for workers in range(power // 2 + 1, power + 1) if fits(workers))
    return 0


def _floor(config: Config, dataset: Dataset, model: Model) -> float:
    """Bytes that a worker needs however many there are: the totals of every sample, and a column read ahead."""
    size = number_bytes(config)
    widths = sum(operator.width for operator in model.by_name.values())
    narrowest = min(_column_bytes(dataset, field) for field in dataset.row_fields)
    totals = LAYER_COPIES * size * config.train.batch * widths
    return PROCESS_BYTES + _dense(config, model, size) + totals + narrowest * _read_ahead(config, dataset)


def step_bytes(config: Config, dataset: Dataset) -> dict[str, int]:
    """Bytes of the steps that are one process, of which some depend on the data: rough, to about a third.

    ``ingest`` sorts parts in a buffer of bounded size, and so do ``score`` and ``evaluate`` where the champion's fields
    were defined differently; ``register`` reads manifests.
    """
    columns = sum(_column_bytes(dataset, field) for field in (*dataset.row_fields, *dataset.dense_fields))
    rows = {split: dataset.rows(split) for split in dataset.splits}
    sorting = round(LIGHT_BYTES + 1.5 * min(float(RUN_BYTES), sum(rows.values()) * (columns + BESIDE_BYTES)))
    return {
        "ingest": sorting,
        "score": sorting,
        "evaluate": sorting,
        "gate": LIGHT_BYTES,
        "register": PROCESS_BYTES,
    }


def champion_rows(run: Run) -> float:
    """Rows of the champion that a day's training goes on from, as its own report has them; 0 where that is unknown."""
    champion = run.champion_checkpoint
    if champion is None:
        return 0.0
    root, _, rest = champion.uri.rpartition("/checkpoints/")
    uri = storage.join(root, "runs", rest.partition("/")[0], "training.json")
    table = storage.read_json(uri).get("table") if storage.exists(uri) else None
    return float(table[-1]["rows"]) if table else 0.0
