"""How good is each model on MovieLens, and do two workers give what one gives? A Markdown table.

    DES_DATA=/path/to/folder python benchmarks/movielens.py [--models lr ...] [--workers 1 2]

Clicks are ratings of at least 4, 80/10/10, at random and in order of time; configs/movielens.toml as it is.
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

ROOT = Path(__file__).resolve().parent.parent


def des(folder: str, *words: str) -> dict[str, Any]:
    """One command of the product on a folder's features; its JSON answer."""
    config = str(ROOT / "configs" / "movielens.toml")
    command = [sys.executable, "-m", "pipelines.cli", *words, "-c", config, "--set", f"run.dir={folder}", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lr", "fm", "wide_deep", "deepfm"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--splits", nargs="+", default=["random", "time"])
    wanted = parser.parse_args()
    print("| split | model | workers | test AUC | log loss | GAUC | samples/s |\n|---|---|---|---|---|---|---|")
    for split in wanted.splits:
        with tempfile.TemporaryDirectory() as folder:
            des(folder, "ingest", "--set", f"split.by={split}")
            for model in wanted.models:
                for workers in wanted.workers:
                    words = [f"split.by={split}", f"model.name={model}", f"train.workers={workers}"]
                    settings = [word for pair in words for word in ("--set", pair)]
                    speed = des(folder, "train", *settings)["samples_per_s"]
                    report = des(folder, "evaluate", *settings)
                    quality = f"{report['auc']:.4f} | {report['logloss']:.4f} | {report['gauc']:.4f}"
                    print(f"| {split} | {model} | {workers} | {quality} | {speed:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
