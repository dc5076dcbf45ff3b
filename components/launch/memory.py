"""Whether a run fits the memory that its workers may have, and what a pod of workers asks for.

What a worker may have is train.worker_memory_mb, else its share of cluster.memory, else, for local workers, its share
of this machine or of the control group that this process is in. A pod without cluster.memory asks for what its workers
are predicted to need and a margin: the prediction is within about 15 % of what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from des_core.config import LAUNCHER_BYTES, Config, worker_limit
from des_core.contracts import Dataset, deep_names
from des_core.log import byte_text
from des_core.processes import memory_bytes
from des_core.run import Run

MARGIN = 0.25
"""Of what a pod asks for, over the prediction."""
STEP_MB = 64
"""Pods ask for whole multiples of this."""
PLENTY_BYTES = 2 << 30
"""Of a worker beside its rows and batches, if nothing is out of the ordinary."""


def check(run: Run) -> None:
    """Refuse a run one of whose workers would need more memory than it may have.

    Raises:
        ConfigError: the numbers, and the smallest number of workers that fits.
    """
    config, dataset = run.config, Dataset.load(run.dataset)
    limit_bytes, _ = limit_of(config)(config.train.workers)
    if not limit_bytes or (run.day is None and _is_plenty(config, dataset, limit_bytes)):
        return
    from des_core.engine import footprint
    from des_core.engine.models import build

    model = build(config.model, deep_names(dataset.fields), len(dataset.dense_fields), config.run.seed)
    known_rows = footprint.champion_rows(run)
    footprint.fit(config, dataset, config.train.workers, model, limit_of(config), known_rows)


def limit_of(config: Config) -> Callable[[int], tuple[float, str]]:
    """What each of so many workers may have, in bytes, and who says so; 0 bytes: nobody does."""

    def limit(workers: int) -> tuple[float, str]:
        bytes_, why = worker_limit(config.train.worker_memory_mb, config.cluster)
        if bytes_ or config.cluster.backend != "local":
            return bytes_, why
        machine = memory_bytes()
        return machine / workers, f"this machine's {byte_text(machine)} over {workers} local workers"

    return limit


def pod_memory(run: Run) -> str:
    """Memory of a pod of workers, as Kubernetes writes it: enough for each role."""
    cluster = run.config.cluster
    if cluster.memory:
        return cluster.memory
    from des_core.engine import footprint
    from des_core.engine.exchange.plan import layout

    known_rows, workers = footprint.champion_rows(run), run.config.train.workers
    dataset = Dataset.load(run.dataset)
    placement, base = layout(run.config, dataset, run.dataset, workers, False, known_rows)
    needed = footprint.need(run.config, dataset, placement, base.model, known_rows)
    pod = needed.most * cluster.nproc_per_node + LAUNCHER_BYTES
    return f"{math.ceil(pod * (1 + MARGIN) / 2**20 / STEP_MB) * STEP_MB}Mi"


def _is_plenty(config: Config, dataset: Dataset, limit_bytes: float) -> bool:
    """Whether a worker could hold the whole run twice: then nothing is reckoned, and torch need not be imported."""
    rows = sum(dataset.stats[field.name].cardinality for field in dataset.row_fields)
    lookups = sum(dataset.stats[field.name].lookups_per_sample for field in dataset.row_fields)
    row_bytes = 8 * 3 * (1 + config.model.factors) + 64
    layers = 8 * sum(config.model.hidden) * (len(dataset.row_fields) * config.model.factors + sum(config.model.hidden))
    whole = 2 * rows * row_bytes + config.train.batch * (lookups + 1) * (256 + row_bytes) + 12 * layers
    return PLENTY_BYTES + 2 * whole < limit_bytes
