"""How near is the predicted memory of a worker to what it takes? Both, of training and of evaluation, by workers.

    python benchmarks/memory.py [--rows 5000000] [--values 3000000 1000000 200000] [--workers 1 2] [--factors 16]

Makes Parquet logs of as many rows, with a field for each number of values, ingests them once, then trains one epoch
with Adam and evaluates, with ``des train`` and ``des evaluate``. Prints key=value lines: MiB of the largest worker, and
the largest error of any worker.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from train import des

from des_core import log
from des_core.storage import read_json

CONFIG = """
[run]
name = "bench"
dir = "run"
[source]
format = "parquet"
path = "logs.parquet"
label = "click"
[split]
by = "random"
valid = 0.02
test = 0.05
[model]
name = "deepfm"
[train]
batch = 8192
epochs = 1
early_stop = "none"
device = "cpu"
"""
PIECE = 1 << 19


def write_logs(path: Path, rows: int, values: list[int]) -> None:
    """Logs whose fields draw evenly from their values."""
    random = np.random.default_rng(0)
    names = [f"f{number}" for number in range(len(values))]
    schema = pa.schema([("click", pa.int8()), *((name, pa.int64()) for name in names)])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, PIECE):
            size = min(PIECE, rows - start)
            fields = {name: random.integers(0, many, size) for name, many in zip(names, values, strict=True)}
            writer.write_table(pa.table({"click": random.integers(0, 2, size, np.int8)} | fields, schema=schema))


def main() -> None:
    """Predict, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--values", type=int, nargs="+", default=[3_000_000, 1_000_000, 200_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--factors", type=int, default=16)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_logs(folder / "logs.parquet", wanted.rows, wanted.values)
        fields = "".join(f'[[fields]]\nname = "f{number}"\n' for number in range(len(wanted.values)))
        (folder / "bench.toml").write_text(CONFIG + fields)
        for workers in wanted.workers:
            words = ["--set", f"train.workers={workers}", "--set", f"model.factors={wanted.factors}"]
            des(folder, "ingest", *words)
            des(folder, "train", *words)
            des(folder, "evaluate", *words)
            own = folder / "run" / "runs" / (folder / "run" / "latest").read_text().strip()
            report = read_json(str(own / "report.json")) | read_json(str(own / "measured.json"))
            for role, key in (("train", "memory"), ("evaluate", "evaluate_memory")):
                predicted, measured = (report[key][f"{what}_mb"] for what in ("predicted", "measured"))
                log.emit(
                    "memory",
                    to=sys.stdout,
                    role=role,
                    workers=workers,
                    rows=round(report["table"][-1]["rows"]),
                    predicted_mb=round(max(predicted)),
                    measured_mb=round(max(measured)),
                    worst_error=max(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)),
                )


if __name__ == "__main__":
    main()
