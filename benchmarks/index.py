"""How many lookups a second does the table answer on one core, and how long may growth and eviction hold it up?

    python benchmarks/index.py --keys 10000000 --rows 20000000

Fills a table (k = 16, fp32, row-wise Adagrad's state) and prints key=value lines; times are this
thread's on its core, lookups' the medians of many batches:

    lookups   Zipf batches over ``keys`` known ids and a twentieth as many unknown: dedupe, then find only, or stage
              (find or insert, counts and last steps); plain: finds of unique ids drawn evenly
    growth    the slowest batch of the fill up to ``rows`` and past them, until the index has doubled once more; writes
              to fresh memory are part of it, at the speed that fresh_gb_per_s states
    eviction  a budget of 95 % of the rows: threshold, compaction of the index and of the rows
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from des_core.config import TableConfig
from des_core.data.feed.batches import ids_of
from des_core.engine.weights import index
from des_core.engine.weights.memory import Memory
from des_core.engine.weights.table import Table
from des_core.log import format_event

PIECE = 1 << 18
ZIPF = 1.05

Array = index.Array


def seconds(call: Callable[[], object]) -> float:
    """How long a call keeps the core, so that a busy machine changes little."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def stage(table: Table, ids: Array, step: int) -> tuple[float, float]:
    """Seconds to stage unique ids and to commit them."""
    stagings = []
    tables, counts = np.zeros(len(ids), np.uint16), np.ones(len(ids), np.uint32)
    return (
        seconds(lambda: stagings.append(table.stage(ids, tables, counts, step))),
        seconds(lambda: table.commit(stagings[0])),
    )


def fill(table: Table, first: int, last: int) -> Array:
    """Stage the ids of keys [first, last) in pieces; the slowest staging and commit, in seconds."""
    starts = range(first, last, PIECE)
    ids = (ids_of(np.arange(start, min(start + PIECE, last)), "benchmark") for start in starts)
    return np.array([stage(table, piece, 1) for piece in ids]).max(0, initial=0)


def fresh_gb_per_s(size: int) -> float:
    """How fast the system gives out memory; slow where a virtual machine must first ask its host."""
    memory = Memory(np.int64)
    memory.grow(size // 8)
    return size / seconds(lambda: memory.array.fill(1)) / 1e9


def measure_lookups(table: Table, keys: int, batch: int, rounds: int) -> dict[str, object]:
    """Rates of lookups on a table that holds keys [0, keys)."""
    rng = np.random.default_rng(0)
    ranks = np.cumsum(np.arange(1, keys + keys // 20) ** -ZIPF)
    by_rank = ids_of(rng.permutation(len(ranks)), "benchmark")
    taken: dict[str, list[float]] = {"dedupe": [], "find": [], "stage": [], "plain": []}
    uniques, used = 0, table.used
    for step in range(2, 2 + rounds):
        ids_L = by_rank[np.searchsorted(ranks, rng.random(batch) * ranks[-1])]
        ids_U = index.dedupe(ids_L)[0]
        even_U = ids_of(rng.permutation(keys)[:batch], "benchmark")
        taken["dedupe"].append(seconds(lambda ids_L=ids_L: index.dedupe(ids_L)))
        # Each batch is new to the caches: finds and stagings take turns.
        if step % 2:
            taken["find"].append(seconds(lambda ids_U=ids_U: table.find(ids_U)))
        else:
            taken["stage"].append(stage(table, ids_U, step)[0])
        taken["plain"].append(seconds(lambda even_U=even_U: table.find(even_U)))
        uniques += len(ids_U)
    dedupe, find, staged, plain = (median(times) for times in taken.values())
    return {
        "keys": keys,
        "batch": batch,
        "unique_share": uniques / rounds / batch,
        "dedupe_per_s": round(batch / dedupe),
        "find_per_s": round(batch / (dedupe + find)),
        "stage_per_s": round(batch / (dedupe + staged)),
        "plain_finds_per_s": round(batch / plain),
        "inserted": table.used - used,
    }


def main() -> None:
    """Fill, look up, grow, evict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=10_000_000, help="ids in the table when lookups are timed")
    parser.add_argument("--rows", type=int, default=20_000_000, help="rows when growth and eviction are timed")
    parser.add_argument("--batch", type=int, default=106_496, help="lookups of a batch: 4096 samples of 26 fields")
    parser.add_argument("--rounds", type=int, default=60, help="batches timed")
    arguments = parser.parse_args()
    keys, rows = arguments.keys, max(arguments.rows, arguments.keys * 2)
    torch.set_num_threads(1)
    settings = TableConfig(max_rows=rows * 95 // 100)
    table = Table(17, 2, 0, 0.01, settings, torch.device("cpu"), torch.float32)
    fill(table, 0, keys)
    print(format_event("lookups", **measure_lookups(table, keys, arguments.batch, arguments.rounds)))

    # Keys that the lookups may have inserted are left out.
    full, start = int(index.MAX_LOAD * index.capacity_for(rows)), keys + keys // 20
    stage_s, commit_s = fill(table, start, start + full - table.used)
    load, used = table.load, table.used
    double_s, _ = fill(table, start + full, start + full + 1000)
    growth = {
        "rows": used,
        "full": load,
        "double_s": double_s,
        "slowest_stage_s": stage_s,
        "slowest_commit_s": commit_s,
    }
    growth |= {"fresh_gb_per_s": fresh_gb_per_s(rows * 8), "bytes_per_row": table.bytes_per_row, "load": table.load}
    print(format_event("growth", **growth))

    used, held = table.used, table.memory_bytes
    taken = seconds(lambda: table.evict(arguments.rounds + 2, lambda numbers: numbers))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    counts = {"rows": used, "evicted": table.evicted, "freed_mb": (held - table.memory_bytes) / 1e6}
    print(format_event("eviction", **counts, seconds=taken, peak_rss_mb=peak))


if __name__ == "__main__":
    main()
