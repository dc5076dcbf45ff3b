"""How fast is a worker's state written and read, and how long does training stand still for it?

    python benchmarks/checkpoint.py [--rows 5000000] [--factors 16] [--rule rowwise_adagrad]

One worker, a local folder. A whole checkpoint, then a delta after a step that looked up 1 % of the rows, each beside
a plain file of as many bytes that is written, synced and read in the same turn: the disk's own rate. Loading reads the
whole checkpoint in the ranges of three workers, one after the other; nothing that is read is in the system's cache.
Prints key=value lines.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from des_core import log
from des_core.checkpoint.manifest import Manifest, Shape
from des_core.config import ModelConfig, OptimizerConfig, TableConfig
from des_core.contracts import Reference
from des_core.data.feed.batches import BUCKETS
from des_core.engine.exchange.collectives import Collectives
from des_core.engine.models import build
from des_core.engine.weights.optimizer import DenseRule, state_width
from des_core.engine.weights.saving import Saver, load_rows
from des_core.engine.weights.table import Table

CHUNK = 1 << 18


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_table(width: int, rule: str) -> Table:
    return Table(width, state_width(rule, width), 0, 0.01, TableConfig(), torch.device("cpu"), torch.float32)


def filled(rows: int, width: int, rule: str) -> Table:
    """A table of random ids, met at step 1."""
    table = new_table(width, rule)
    ids = np.unique(np.random.default_rng(0).integers(-(1 << 63), 1 << 63, rows))
    for start in range(0, len(ids), CHUNK):
        look_up(table, ids[start : start + CHUNK], 1)
    return table


def look_up(table: Table, ids: np.ndarray, step: int) -> None:
    """One step that looks ids up."""
    staged = table.stage(ids, np.zeros(len(ids), np.uint16), np.ones(len(ids), np.uint32), step)
    table.commit(staged)
    table.keep(staged.slots_U)


def plain_s(folder: str, size: int) -> tuple[float, float]:
    """Seconds to write and sync, and to read, a plain file of ``size`` bytes."""
    path, piece = os.path.join(folder, "plain"), os.urandom(1 << 24)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(-(-size // len(piece))):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    wrote_s = time.perf_counter() - start
    forget(path)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.read(len(piece)):
            pass
    read_s = time.perf_counter() - start
    os.remove(path)
    return wrote_s, read_s


def forget(path: str) -> None:
    """Drop a written file from the system's cache, so that it is read from the disk."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Fill, write whole, write a delta, read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--rule", default="rowwise_adagrad")
    wanted = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    peers = Collectives(torch.device("cpu"))
    model = build(ModelConfig(name="fm", factors=wanted.factors), ["value"], 0, 0)
    dense = DenseRule(OptimizerConfig(), model.parameters())
    table = filled(wanted.rows, model.row_width, wanted.rule)
    shape = Shape(model={}, optimizer={}, fields=("f",), tables=("f",), precision="fp32")
    with tempfile.TemporaryDirectory(dir=os.environ.get("DES_BENCH_DIR")) as folder:
        saver = Saver(os.path.join(folder, "run"), peers)

        def save(step: int) -> tuple[Reference, Manifest]:
            before = dict(saver.spent)
            head: dict[str, Any] = {"run_key": "b", "trajectory": "b", "shape": shape, "trainer": {"step": step}}
            saver.begin(table, model, dense, head, {}, keep=lambda uri: {uri})
            pause_s = saver.spent["pause_s"] - before["pause_s"]
            saver.finish()
            assert saver.base is not None
            written, write_s = (saver.spent[name] - before[name] for name in ("written_bytes", "write_s"))
            plain_write_s, _ = plain_s(folder, int(written))
            log.emit(
                "save",
                to=sys.stdout,
                kind="whole" if step == 1 else "delta",
                rows=saver.base[1].layers[-1].rows,
                mb=round(written / 1e6, 1),
                pause_ms=round(1000 * pause_s, 1),
                write_s=round(write_s, 2),
                pause_share=round(pause_s / write_s, 3),
                mb_per_s=round(written / 1e6 / write_s),
                of_disk=round(plain_write_s / write_s, 2),
            )
            return saver.base

        save(1)
        look_up(table, table.ids[:: max(1, table.used // (wanted.rows // 100 + 1))].copy(), 2)
        reference, manifest = save(2)
        size = sum(layer.size for layer in manifest.layers)
        owner_TH = np.arange(BUCKETS)[None] * 3 // BUCKETS
        for path in Path(folder).rglob("*.arrow"):
            forget(str(path))
        start, read, loaded = time.perf_counter(), 0, 0
        for worker in range(3):
            again = new_table(model.row_width, wanted.rule)
            read += load_rows(reference, manifest, again, owner_TH, worker)
            loaded += again.used
        loaded_s = time.perf_counter() - start
        log.emit(
            "load",
            to=sys.stdout,
            workers=3,
            rows=loaded,
            mb=round(read / 1e6, 1),
            read_share=round(read / size, 3),
            load_s=round(loaded_s, 2),
            mb_per_s=round(read / 1e6 / loaded_s),
            of_disk=round(plain_s(folder, read)[1] / loaded_s, 2),
        )
    peers.close()


if __name__ == "__main__":
    main()
