"""How fast does training go on Criteo-shaped logs? Samples per second and CPU time per sample, by model and workers.

    python benchmarks/train.py [--rows 1000000] [--models lr fm deepfm] [--workers 1 2] [--batch 4096] [--factors 16]

Makes a TSV like Criteo's (13 integers, 26 Zipf-distributed categories of up to 1M values), ingests it once, and
trains one epoch with ``des train``. Prints key=value lines, with worker 0's milliseconds per step by phase. The
first step of each process compiles and is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ingest import write_logs

from des_core import log
from des_core.storage import read_json

CONFIG = """
[run]
name = "bench"
dir = "run"
[source]
format = "criteo"
path = "train.tsv"
[split]
by = "random"
valid = 0.01
test = 0.01
[train]
epochs = 1
early_stop = "none"
"""


def des(folder: Path, *words: str) -> dict[str, Any]:
    """One command of the product in ``folder``; its JSON answer."""
    command = [sys.executable, "-m", "pipelines.cli", *words, "-c", "bench.toml", "--json"]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--models", nargs="+", default=["lr", "fm", "deepfm"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--factors", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_logs(str(folder / "train.tsv"), wanted.rows, wanted.seed)
        (folder / "bench.toml").write_text(CONFIG)
        des(folder, "ingest")
        for model in wanted.models:
            for workers in wanted.workers:
                settings = {
                    "model.name": model,
                    "model.factors": wanted.factors,
                    "train.workers": workers,
                    "train.batch": wanted.batch,
                }
                words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
                answer = des(folder, "train", *words)
                (training,) = [
                    found
                    for path in (folder / "run" / "runs").glob("*/training.json")
                    if (found := read_json(str(path)))["checkpoint"] == answer["checkpoint"]
                ]
                sent = sum(line["counted_bytes_per_step"] for line in training["exchange"].values())
                log.emit(
                    "train",
                    to=sys.stdout,
                    model=model,
                    workers=workers,
                    batch=wanted.batch,
                    samples_per_s=round(training["samples_per_s"]),
                    bytes_per_worker_and_step=round(sent),
                    rows=round(training["table"][-1]["rows"]),
                    peak_rss_mb=round(training["peak_rss_mb"]),
                    **{f"{phase}_ms": round(ms, 2) for phase, ms in training["profile"].items()},
                )


if __name__ == "__main__":
    main()
