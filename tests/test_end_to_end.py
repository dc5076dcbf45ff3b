"""The product as its users run it: commands in a folder of their own, real processes, real files."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from des_core import storage
from des_core.data.store import predictions
from tests import columns

ROOT = Path(__file__).parent.parent
SMALL = ("source.rows_per_day=4000", "train.epochs=2")


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without what MLflow, used by tests before these, wrote into it."""
    return {name: value for name, value in os.environ.items() if not name.endswith("_URI")} | settings


def des(folder: Path, *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """One command in ``folder``: its JSON answer and its standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words, "--json"],
        cwd=folder,
        env=environment(PYTHONPATH=str(ROOT), PYTHONSAFEPATH="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, (words, done.stdout[-2000:], done.stderr[-2000:])
    assert "Traceback" not in done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


def settings(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


DEMO = ["-c", str(ROOT / "configs" / "demo.toml"), *settings(*SMALL)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where the demo ran once; the user's own packages of our names stand in it."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("components", "k8s", "pipelines"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('the wrong package was imported')\n")
    first, _ = des(folder, "run", *DEMO)
    assert first["version"] == 1 and not first["unchanged"]
    yield folder


def test_a_run_ends_in_a_champion_and_says_where_to_look(home: Path) -> None:
    report = json.loads((home / "runs/demo/report.json").read_text())
    promised = "split samples auc logloss ne calibration gauc workers steps samples_per_s peak_rss_mb exchange valid"
    assert all(report[key] is not None for key in promised.split())
    assert report["workers"] == 2 and report["split"] == "test"
    for line, entry in report["exchange"].items():
        assert entry["counted_bytes_per_step"] == pytest.approx(entry["predicted_bytes_per_step"], rel=1e-12), line
    for name in ("features", "checkpoints", "mlflow.db", "artifacts", "latest", "report.html", "predictions"):
        assert (home / "runs/demo" / name).exists(), name
    parts = pq.read_table(home / "runs/demo/predictions")
    assert parts.column_names == ["file", "row", "label", "probability"]
    labels, scores = (parts.column(name).to_numpy() for name in ("label", "probability"))
    assert len(labels) == report["samples"]
    assert columns.auc(labels, scores) == pytest.approx(report["auc"], abs=1e-12)


def test_the_same_again_is_unchanged(home: Path) -> None:
    again, _ = des(home, "run", *DEMO)
    assert again["unchanged"] and again["version"] == 1


def test_serving_scores_are_evaluations(home: Path, bucket: str) -> None:
    """Raw records of the test day, scored by the registered model, are the predictions within 1e-6."""
    (day,) = sorted((home / "runs/demo/raw").glob("*.csv"))[-1:]
    logs, output = f"{bucket}/last day.csv", f"{bucket}/scores/{day.name}"
    storage.write_bytes(logs, day.read_bytes())
    answer, _ = des(home, "predict", "--model", "models:/demo@champion", "--input", logs, "--output", output, *DEMO)
    assert answer["rows"] == 4000
    rows = csv.DictReader(storage.read_bytes(output).decode().splitlines())
    scores = {row["sample"]: float(row["probability"]) for row in rows}
    expected = predictions.read(str(home / "runs/demo/predictions")).to_pydict()
    assert set(scores) == set(expected["sample"])
    ours = np.array([scores[sample] for sample in expected["sample"]])
    np.testing.assert_allclose(ours, expected["probability"], rtol=0, atol=1e-6)


def test_mlflow_serves_the_registered_model(home: Path) -> None:
    """``mlflow models serve`` answers raw records with the run's own predictions."""
    (day,) = sorted((home / "runs/demo/raw").glob("*.csv"))[-1:]
    with open(day, newline="") as file:
        records = list(csv.DictReader(file))[:50]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"models serve -m models:/demo@champion --env-manager local --host 127.0.0.1 --port {port}".split()
    tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/runs/demo/mlflow.db", "PYTHONSAFEPATH": "1"}
    # MLflow starts uvicorn by its name: its folder must be on the path, as in an activated environment.
    tracking["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with open(home / "serve.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env=environment(**tracking),
            cwd=home,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _until(lambda: server.poll() is not None or _answers(f"http://127.0.0.1:{port}/ping"))
        assert server.poll() is None, (home / "serve.log").read_text()[-2000:]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"dataframe_records": records}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            served = json.load(response)["predictions"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    expected = predictions.read(str(home / "runs/demo/predictions")).to_pydict()
    by_row = {int(s.split(":")[1]): p for s, p in zip(expected["sample"], expected["probability"], strict=True)}
    np.testing.assert_allclose(served, [by_row[row] for row in range(50)], rtol=0, atol=1e-6)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_a_step_is_shown_by_phase(home: Path) -> None:
    """The run is trained already: its profile is drawn from what training wrote."""
    answer, _ = des(home, "train", *DEMO, "--profile")
    page = Path(answer["profile"]).read_text()
    assert "<svg" in page and all(f">{phase}</text>" in page for phase in ("decode", "exchange", "update"))
    training = json.loads(Path(answer["profile"]).with_name("training.json").read_text())
    assert all(training["profile"][phase] > 0 for phase in ("read", "decode", "index", "gather", "partial", "backward"))


def test_plan_names_the_joint_winner(home: Path) -> None:
    plan, _ = des(home, "plan", *DEMO, "--workers", "4")
    assert plan["workers"] == 4 and len(plan["placement"]) == 4
    best = min(plan["joint"], key=lambda entry: entry["bytes_per_step"])
    assert {operator["name"]: operator["chosen"] for operator in plan["operators"]} == best["choice"]


def test_workers_make_no_difference(home: Path) -> None:
    """Three workers and the two of the run before: the same test AUC, from the same features."""
    words = [*DEMO, *settings("train.workers=3", "run.name=other", "run.dir=runs/3")]
    for command in ("ingest", "train", "evaluate"):
        des(home, command, *words)
    two, three = (json.loads((home / f"runs/{name}/report.json").read_text()) for name in ("demo", "3"))
    assert (two["workers"], three["workers"]) == (2, 3)
    assert two["auc"] == pytest.approx(three["auc"], abs=1e-4)


@pytest.mark.gpu
def test_a_gpu_makes_no_difference(home: Path) -> None:
    """Rows and dense part on one device, which exchanges nothing: the same test AUC as on the CPU."""
    aucs = {}
    for device in ("cpu", "cuda"):
        words = [*DEMO, *settings("train.workers=1", f"train.device={device}", "run.dir=runs/device")]
        des(home, "ingest", *words)
        des(home, "train", *words)
        des(home, "evaluate", *words)
        aucs[device] = json.loads((home / "runs/device/report.json").read_text())["auc"]
    assert aucs["cuda"] == pytest.approx(aucs["cpu"], abs=1e-4)


@pytest.mark.parametrize("model", ["fm", "deepfm"])
def test_planted_interactions_are_recovered(home: Path, model: str) -> None:
    """At least 80 % of the AUC gap between logistic regression and the generator's own probabilities."""
    base = ["-c", str(ROOT / "configs" / "demo.toml"), *settings("train.workers=1", "run.dir=runs/quality")]
    des(home, "ingest", *base)
    aucs = {}
    for name in ("lr", model):
        words = [*base, *settings(f"model.name={name}")]
        des(home, "train", *words)
        des(home, "evaluate", *words)
        scored = predictions.read(str(home / "runs/quality/predictions")).to_pydict()
        aucs[name] = columns.auc(np.array(scored["label"]), np.array(scored["probability"]))
    (truth,) = sorted((home / "runs/quality/raw/truth").glob("*.csv"))[-1:]
    with open(truth, newline="") as file:
        known = [float(row["probability"]) for row in csv.DictReader(file)]
    rows = [int(sample.split(":")[1]) for sample in scored["sample"]]
    best = columns.auc(np.array(scored["label"]), np.array(known)[rows])
    assert best is not None and aucs["lr"] is not None and aucs[model] is not None
    assert best - aucs["lr"] > 0.05 and 0.75 <= best <= 0.85
    assert (aucs[model] - aucs["lr"]) / (best - aucs["lr"]) >= 0.8, (aucs, best)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_ends_the_run_and_resume_goes_on(home: Path, sent: signal.Signals) -> None:
    """Killed or frozen in mid-run: within 60 s one line names the worker; then --resume finishes."""
    words = [*DEMO, *settings("run.name=lost", f"run.dir=runs/lost-{sent.name.lower()}", "train.epochs=200")]
    words += settings("train.patience=200", "train.checkpoint_steps=4")
    des(home, "ingest", *words)
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", "train", *words],
        cwd=home,
        env=environment(PYTHONPATH=str(ROOT), PYTHONSAFEPATH="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = home / f"runs/lost-{sent.name.lower()}"
    _until(lambda: list(folder.glob("checkpoints/*/last.json")) and _workers(process.pid))
    os.kill(_workers(process.pid)["1"], sent)
    lost = time.monotonic()
    _, stderr = process.communicate(timeout=90)
    assert time.monotonic() - lost < 60
    assert process.returncode == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert "worker 1" in line and "--resume" in line and "Traceback" not in stderr
    # What was saved says where to go on: the end is moved near, for the trajectory is the same.
    last = json.loads(next(folder.glob("checkpoints/*/last.json")).read_text())["checkpoint"]
    step = int(last.split("step-")[1][:10])
    words += settings(f"train.max_steps={step + 3}")
    resumed, _ = des(home, "train", *words, "--resume")
    assert resumed["steps"] == step + 3


def _workers(launcher: int) -> dict[str, int]:
    """Process ids of the workers below a launcher, by rank."""
    found = {}
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, parent = int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(pid)
    waiting = [launcher]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [entry[5:].decode() for entry in environment if entry.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = pid
    return found


def _until(condition: Any, limit_s: float = 90) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "model.name=depfm"], "unknown model 'depfm'; did you mean"),
        (["--set", "train.bacth=3"], "unknown key train.bacth; did you mean batch"),
        (["--set", "optimizer.rows.learning_rate=1e9", "--set", "optimizer.rows.name=sgd"], "loss is"),
        (["--set", "registry.tracking_uri=file:///nowhere"], "is a plain folder, which cannot hold a model registry"),
    ],
)
def test_a_users_mistake_is_one_line(home: Path, words: list[str], message: str) -> None:
    answer, stderr = des(home, "run", *DEMO, *settings("run.dir=runs/mistake"), *words, code=2)
    assert message in answer["error"] and answer["exit_code"] == 2
    assert [line for line in stderr.splitlines() if line.startswith("error:")] == [f"error: {answer['error']}"]
