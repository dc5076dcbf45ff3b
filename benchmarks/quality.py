"""How good is each model? Test metrics by data, model and seed, as Markdown tables and the verdicts they allow.

    python benchmarks/quality.py [--data synthetic movielens] [--models lr ...] [--seeds 0 1 2] [--workers 1]

``synthetic`` are the planted logs of configs/demo.toml: besides AUC, the share of the gap between LR and the
generator's own probabilities that a model recovers. ``movielens`` is configs/movielens.toml (clicks are ratings of
at least 4, 80/10/10) split at random, ``movielens-time`` in order of time, ``criteo`` is
configs/criteo.toml; all three need DES_DATA. All models of a data set
have the same data, epochs and optimizers. ``--set KEY=VALUE`` adds a setting to all runs, e.g. train.payload=bf16.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from des_core.config import MODELS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {
    "synthetic": ("demo.toml", ["train.epochs=8"]),
    "movielens": ("movielens.toml", []),
    "movielens-time": ("movielens.toml", ["split.by=time"]),
    "criteo": ("criteo.toml", []),
}


def des(command: str, data: str, folder: str, settings: list[str]) -> dict[str, Any]:
    """One command of the product on a folder; its JSON answer."""
    config, own = CONFIGS[data]
    words = [word for pair in [f"run.dir={folder}", *own, *settings] for word in ("--set", pair)]
    line = [sys.executable, "-m", "pipelines.cli", command, "-c", str(ROOT / "configs" / config), *words, "--json"]
    done = subprocess.run(
        line, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE, text=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def truth_auc(folder: str) -> float:
    """AUC of the generator's own probabilities on the last day, which is the test part."""
    day = sorted(Path(folder).glob("raw/*.csv"))[-1]
    with open(day, newline="") as log, open(day.parent / "truth" / day.name, newline="") as truth:
        labels = [float(row["label"]) for row in csv.DictReader(log)]
        probabilities = [float(row["probability"]) for row in csv.DictReader(truth)]
    return _auc(np.array(labels), np.array(probabilities))


def _auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, ties counted half."""
    positive, negative = (np.sort(scores[part]) for part in (labels > 0.5, labels < 0.5))
    below, upto = (np.searchsorted(negative, positive, side).sum() for side in ("left", "right"))
    return float((below + upto) / (2 * len(positive) * len(negative)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["synthetic"], choices=list(CONFIGS))
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", nargs="+", type=int, default=[1])
    parser.add_argument("--set", nargs="+", default=[], dest="settings", metavar="KEY=VALUE")
    wanted = parser.parse_args()
    for data in wanted.data:
        print(
            "| data | model | workers | seed | test AUC | log loss | NE | GAUC | recovered |",
            "|---" * 9 + "|",
            sep="\n",
        )
        found: dict[tuple[str, int], list[float]] = {}
        for seed in wanted.seeds:
            with tempfile.TemporaryDirectory() as folder:
                _one_seed(data, seed, folder, wanted, found)
        print("\n| data | model | workers | mean test AUC | lowest | highest |\n|---|---|---|---|---|---|")
        for (model, workers), aucs in found.items():
            print(f"| {data} | {model} | {workers} | {mean(aucs):.4f} | {min(aucs):.4f} | {max(aucs):.4f} |")
        print(flush=True)


def _one_seed(
    data: str, seed: int, folder: str, wanted: argparse.Namespace, found: dict[tuple[str, int], list[float]]
) -> None:
    """A row of the table per model and number of workers, all on the same rows."""
    des("ingest", data, folder, [f"run.seed={seed}", *wanted.settings])
    best = truth_auc(folder) if data == "synthetic" else None
    linear = None
    for model in sorted(wanted.models, key=lambda name: name != "lr"):
        for workers in wanted.workers:
            settings = [f"run.seed={seed}", f"model.name={model}", f"train.workers={workers}", *wanted.settings]
            des("train", data, folder, settings)
            report = des("evaluate", data, folder, settings)
            linear = report["auc"] if model == "lr" else linear
            recovered = f"{(report['auc'] - linear) / (best - linear):.3f}" if best and linear else ""
            found.setdefault((model, workers), []).append(report["auc"])
            quality = f"{report['auc']:.4f} | {report['logloss']:.4f} | {report['ne']:.4f} | "
            quality += f"{report.get('gauc') or float('nan'):.4f} | {recovered}"
            print(f"| {data} | {model} | {workers} | {seed} | {quality} |", flush=True)


if __name__ == "__main__":
    main()
