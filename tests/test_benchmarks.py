"""The benchmarks run, on little data; what they measure is read by people, not asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from des_core.log import parse_event

ROOT = Path(__file__).parent.parent


def bench(name: str, *words: str, **environment: str) -> list[str]:
    """Lines of standard output."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_ingest() -> None:
    (event,) = filter(None, map(parse_event, bench("ingest.py", "--rows", "20000")))
    assert int(event["rows"]) == 20_000 and float(event["rows_per_s"]) > 0


def test_judge() -> None:
    events = [event for event in map(parse_event, bench("judge.py", "--rows", "40000", "--workers", "2")) if event]
    assert [event["workers"] for event in events] == ["2", "2"] and events[0]["auc"] == events[1]["auc"]
    assert 0.6 < float(events[0]["auc"]) < 0.8 and int(events[0]["rows_per_cpu_s"]) > 0


def test_index() -> None:
    words = ["--keys", "20000", "--rows", "50000", "--batch", "2000", "--rounds", "6"]
    lookups, _, eviction = filter(None, map(parse_event, bench("index.py", *words)))
    assert int(lookups["find_per_s"]) > 0 and int(eviction["evicted"]) > 0


def test_update() -> None:
    words = ["--samples", "64", "--rows", "5200", "--rounds", "2", "--rules", "rowwise_adagrad", "group_ftrl"]
    works = {event["work"] for event in map(parse_event, bench("update.py", *words)) if event}
    assert {"fields_forward", "fields_backward", "rowwise_adagrad", "group_ftrl", "total"} <= works


def test_checkpoint() -> None:
    whole, delta, load = filter(None, map(parse_event, bench("checkpoint.py", "--rows", "30000")))
    assert whole["rows"] == load["rows"] == "30000" and float(whole["mb"]) > 30_000 * 84 / 1e6
    assert 200 < int(delta["rows"]) < 400 and float(load["read_share"]) < 1.1


def test_train() -> None:
    words = ["--rows", "20000", "--models", "fm", "--workers", "2", "--batch", "1024"]
    (event,) = filter(None, map(parse_event, bench("train.py", *words)))
    assert event["model"] == "fm" and int(event["samples_per_s"]) > 0
    # Sent by sum: k + 1 numbers for each sample of the other home, both ways, and little else.
    assert 512 * 17 * 4 * 2 * 0.9 < int(event["bytes_per_worker_and_step"]) < 512 * 17 * 4 * 2 * 1.1


def test_memory() -> None:
    words = ["--rows", "40000", "--values", "20000", "500", "--workers", "2"]
    events = [event for event in map(parse_event, bench("memory.py", *words)) if event]
    assert [event["role"] for event in events] == ["train", "evaluate"]
    assert all(float(event["predicted_mb"]) > 400 and float(event["measured_mb"]) > 200 for event in events)


def movielens(data: Path, *words: str) -> dict[tuple[str, int], float]:
    """Test AUC by model and workers."""
    lines = bench("quality.py", *words, "--seeds", "0", DES_DATA=str(data))
    rows = [line.split("|") for line in lines[2 : lines.index("")]]
    return {(row[2].strip(), int(row[3])): float(row[5]) for row in rows}


def test_movielens_at_random(shared_data: Path) -> None:
    """Interactions do no harm, on one worker and on two."""
    aucs = movielens(shared_data, "--data", "movielens", "--models", "lr", "fm", "--workers", "1")
    aucs |= movielens(shared_data, "--data", "movielens", "--models", "deepfm", "--workers", "2")
    assert aucs["lr", 1] >= 0.785
    assert aucs["fm", 1] >= aucs["lr", 1] and aucs["deepfm", 2] >= aucs["lr", 1]


def test_movielens_in_order_of_time(shared_data: Path) -> None:
    assert movielens(shared_data, "--data", "movielens-time", "--models", "lr", "--workers", "1")["lr", 1] >= 0.665


def test_gpu() -> None:
    """Every line of it, under Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="Triton is installed by make test on Linux")
    words = ["--rows", "60", "--fields", "2", "--batches", "16", "--rounds", "1", "--steps", "1", "--models", "deepfm"]
    lines = bench("gpu.py", *words, PYTHONPATH=str(ROOT), TRITON_INTERPRET="1")
    events = [event for event in map(parse_event, lines) if event]
    gates = [event for event in events if event["event"] == "gate"]
    assert [event["same_bits"] for event in gates] == ["True", "True"]
    assert all(float(event["logits_apart"]) < 1e-4 for event in gates)
    assert {event["system"] for event in events if event["event"] == "speed"} == {"plain", "torch", "triton", "graphs"}
    assert {"card", "insert", "find", "rows", "sort", "replays", "phases", "done"} <= {
        event["event"] for event in events
    }


def test_serve() -> None:
    lines = bench("serve.py", "--values", "500", "--seconds", "1", "--models", "demo")
    answers = {question.strip(): answer for _, _, question, answer, _ in (line.split("|") for line in lines[4:])}
    assert len(answers) == 12 and "FAILED" not in str(answers)
    (moved,) = (answer for question, answer in answers.items() if question.startswith("alias moved"))
    assert moved.strip().startswith("0 of ")
