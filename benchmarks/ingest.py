"""How many rows of raw Criteo logs become features in a second, on how many cores?

    python benchmarks/ingest.py --rows 1000000
    python benchmarks/ingest.py --rows 5000000 --cores 1 2 1 2

Makes logs of that shape (a label, 13 numbers, 26 categories with Zipf ids, some missing), ingests them and prints
key=value: rows, megabytes, seconds and rows per second, compilation left out. Nothing stays on the disk.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from des_core.config import Config, parse_config
from des_core.contracts import Dataset
from des_core.data.store.features import ingest
from des_core.log import format_event

# Distinct values of Criteo's 26 categories in its first million rows or so, rounded.
CARDINALITIES = (
    *(1_400, 550, 200_000, 100_000, 300, 20, 12_000, 600, 3, 50_000, 5_000, 180_000, 3_000),
    *(27, 10_000, 150_000, 10, 5_000, 2_000, 4, 170_000, 18, 15, 60_000, 80, 40_000),
)
MISSING_SHARE = 0.12
BLOCK = 50_000


def write_logs(path: str, rows: int, seed: int = 0) -> None:
    """A Criteo-shaped TSV without a header."""
    draw = np.random.default_rng(seed)
    texts = [pa.array([f"{word:08x}" for word in draw.integers(0, 1 << 32, size).tolist()]) for size in CARDINALITIES]
    with open(path, "wb") as file:
        for first in range(0, rows, BLOCK):
            size = min(BLOCK, rows - first)
            columns = [pa.array((draw.random(size) < 0.25).astype(np.int8)).cast(pa.string())]
            for scale in range(13):
                numbers = (draw.exponential(3.0**scale % 5000 + 1, size) - 1).astype(np.int64)
                columns.append(pa.array(numbers).cast(pa.string()))
            for cardinality, values in zip(CARDINALITIES, texts, strict=True):
                ids = (cardinality ** draw.random(size)).astype(np.int64) - 1
                columns.append(values.take(pa.array(ids)))
            absent = [pa.array(draw.random(size) < MISSING_SHARE) for _ in columns[1:]]
            columns[1:] = [pc.if_else(gone, "", column) for gone, column in zip(absent, columns[1:], strict=True)]
            table = pa.table(columns, names=[str(place) for place in range(len(columns))])
            options = pacsv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
            pacsv.write_csv(table, file, options)


def config_of(path: str, root: str) -> Config:
    """A run that reads one file into a store."""
    return parse_config(
        {
            "run": {"name": "ingest-benchmark"},
            "source": {"format": "criteo", "path": path},
            "storage": {"root": root},
        }
    )


def measure(large: str, folder: str, cores: int) -> str:
    """A line of numbers for one ingestion on so many cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    # Neither Arrow's pools nor numpy may take another one.
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    ingest(config_of(os.path.join(folder, "small.tsv"), os.path.join(folder, "warm")))
    config = config_of(large, os.path.join(folder, "store"))
    before = os.times()
    started = time.perf_counter()
    reference = ingest(config)
    seconds, after = time.perf_counter() - started, os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    part = Dataset.load(reference).parts["all"]
    stored = sum(os.path.getsize(os.path.join(config.features_root, file.path)) for file in part.files)
    peaks = [resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return format_event(
        "benchmark",
        cores=cores,
        rows=part.rows,
        raw_mb=os.path.getsize(large) / 1e6,
        stored_mb=stored / 1e6,
        files=len(part.files),
        seconds=seconds,
        rows_per_s=round(part.rows / seconds),
        rows_per_cpu_s=round(part.rows / cpu),
        peak_rss_mb=max(peaks),
    )


def main() -> None:
    """Make, ingest, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the log (default 1,000,000)")
    parser.add_argument("--cores", type=int, nargs="+", default=[1], help="cores of each ingestion (default 1)")
    options = parser.parse_args()
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        small, large = os.path.join(folder, "small.tsv"), os.path.join(folder, "large.tsv")
        # Logs are made in another process, and each ingestion has one of its own, whose memory is counted.
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            list(pool.map(write_logs, [small, large], [1000, options.rows]))
        for number, cores in enumerate(options.cores):
            inside = os.path.join(folder, str(number))
            os.mkdir(inside)
            os.link(small, os.path.join(inside, "small.tsv"))
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                print(pool.submit(measure, large, inside, cores).result(), flush=True)
            shutil.rmtree(inside)


if __name__ == "__main__":
    main()
