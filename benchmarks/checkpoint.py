"""How fast is a worker's state written and read? Seconds and bytes of a checkpoint, and of loading it into a new table.

    python benchmarks/checkpoint.py [--rows 5000000] [--factors 16] [--rule rowwise_adagrad]

One worker, a local folder, arrays with their sha256; the file system's cache is what it is. Prints key=value lines.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from des_core import log
from des_core.config import ModelConfig, OptimizerConfig, TableConfig
from des_core.data.feed.batches import BUCKETS
from des_core.engine.models import build
from des_core.engine.weights import checkpoint
from des_core.engine.weights.optimizer import DenseRule, state_width
from des_core.engine.weights.table import Table

CHUNK = 1 << 18


class Alone:
    """The only worker."""

    rank, workers = 0, 1

    def barrier(self) -> None:
        """Nobody to wait for."""


def new_table(width: int, rule: str) -> Table:
    return Table(width, state_width(rule, width), 0, 0.01, TableConfig(), torch.device("cpu"), torch.float32)


def filled(rows: int, width: int, rule: str) -> Table:
    """A table of random ids."""
    table = new_table(width, rule)
    ids = np.unique(np.random.default_rng(0).integers(-(1 << 63), 1 << 63, rows))
    for step, start in enumerate(range(0, len(ids), CHUNK), 1):
        part = ids[start : start + CHUNK]
        table.commit(table.stage(part, np.zeros(len(part), np.uint16), np.ones(len(part), np.uint32), step))
    return table


def main() -> None:
    """Fill, write, read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--rule", default="rowwise_adagrad")
    wanted = parser.parse_args()
    model = build(ModelConfig(name="fm", factors=wanted.factors), 1, 0, 0)
    dense = DenseRule(OptimizerConfig(), model.parameters())
    table = filled(wanted.rows, model.row_width, wanted.rule)
    shape = checkpoint.Shape(model={}, optimizer={}, fields=("f",), tables=("f",), precision="fp32")
    head = {"run_key": "bench", "trajectory": "bench", "shape": shape, "trainer": {"step": 1}}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        uri = checkpoint.save(folder, Alone(), table, model, dense, head, {})
        saved_s = time.perf_counter() - start
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.npy"))
        again = new_table(model.row_width, wanted.rule)
        start = time.perf_counter()
        reference = checkpoint.reference(uri)
        manifest = checkpoint.read_manifest(reference, shape)
        checkpoint.load_rows(reference, manifest, again, np.zeros((1, BUCKETS), np.int64), 0)
        loaded_s = time.perf_counter() - start
    log.emit(
        "checkpoint",
        to=sys.stdout,
        rows=table.used,
        loaded=again.used,
        mb=round(size / 1e6, 1),
        save_s=round(saved_s, 2),
        save_mb_per_s=round(size / 1e6 / saved_s),
        load_s=round(loaded_s, 2),
        load_mb_per_s=round(size / 1e6 / loaded_s),
    )


if __name__ == "__main__":
    main()
