"""The whole way on this machine, by the real command line, KFP, workers and MLflow, on small synthetic logs."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest

from components import finished, stages
from des_core import log, storage
from des_core.config import StorageConfig, load_config
from des_core.contracts import Reference
from des_core.data.store import features, predictions
from des_core.errors import ConfigError, DesError, StorageError
from des_core.release.judge import champion
from des_core.release.judge.gate import decide
from des_core.release.registry import mlflow_client
from des_core.run import Run, pin
from des_core.verdict import Champion, Verdict
from pipelines import cli
from pipelines.training import compile_to
from tests import columns

ROOT = Path(__file__).parent.parent.parent
DES = [sys.executable, "-c", "from pipelines.cli import main; main()"]

TOML = """
[run]
name = "small"
[source]
path = "logs/{day}.csv"
time = "time"
[split]
by = "time"
[[fields]]
name = "user"
[[fields]]
name = "item"
[[fields]]
name = "tags"
kind = "multi"
[[fields]]
name = "price"
kind = "numeric"
transform = "log1p"
[model]
name = "fm"
factors = 4
[train]
workers = 2
batch = 256
[optimizer.rows]
learning_rate = 0.02
[gate]
min_auc = 0.3
max_auc_drop = 0.3
max_ne = 10
"""


class Ended(NamedTuple):
    """A command that ended."""

    code: int
    lines: list[str]
    error: str
    answer: dict[str, Any]


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A command in ``folder``, apart from this process's group."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*DES, *words], cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True
    )


def des(folder: Path, *words: str) -> Ended:
    """Run a command with --json to its end."""
    with start(folder, *words, "--json") as process:
        out, error = process.communicate(timeout=240)
    lines = out.splitlines()
    return Ended(process.returncode, lines, error, json.loads(lines[-1]))


def des_here(folder: Path, capfd: pytest.CaptureFixture[str], *words: str) -> Ended:
    """As ``des``, in this process, which has loaded MLflow and torch already."""
    capfd.readouterr()
    with contextlib.chdir(folder), pytest.raises(SystemExit) as caught:
        cli.main([*words, "--json"])
    said = capfd.readouterr()
    lines = said.out.splitlines()
    return Ended(int(caught.value.code or 0), lines, said.err, json.loads(lines[-1]))


TOKEN = "t0ken-that-nobody-may-read"


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[str]]]:
    """An address whose path is a secret, and the paths that were posted to."""
    paths: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            paths.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/services/{TOKEN}", paths
        server.shutdown()


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The temporary folder of every command here, with what killed ones have left."""
    folder = tmp_path_factory.mktemp("temporary")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (folder / f"des-{os.getuid()}" / f"{dead.pid}-run-abc").mkdir(parents=True, mode=0o700)
    before, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), str(folder)
    yield folder
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, webhook: tuple[str, list[str]], temporary: Path) -> Path:
    """Logs, a config, and the user's own packages of our packages' names."""
    folder = tmp_path_factory.mktemp("work place")
    for name in ("components", "k8s", "des_core", "pipelines"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    (folder / "small.toml").write_text(f'{TOML}[notify]\nwebhook = "{webhook[0]}"\n')
    assert des(folder, "generate", "--out", "logs", "--days", "2", "--rows-per-day", "2000").code == 0
    return folder


seen: list[str] = []
"""Command lines of processes with the secret in them."""


@pytest.fixture(scope="module")
def first(folder: Path) -> Ended:
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    line = path.read_bytes()
                    seen.extend([line.decode(errors="replace")] * (TOKEN.encode() in line))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        return des(folder, "run", "-c", "small.toml")
    finally:
        ended.set()
        watcher.join()


def test_one_command_ends_with_a_registered_champion(folder: Path, first: Ended) -> None:
    assert first.code == 0, first.error
    assert (first.answer["version"], first.answer["aliases"]) == (1, ["candidate", "champion"])
    assert first.answer["verdict"] == "accept"
    assert not first.answer["unchanged"]
    steps = [event for event in map(log.parse_event, first.lines) if event.get("event") == "done"]
    assert [step["name"] for step in steps] == ["resolve", "ingest", "score", "train", "evaluate", "gate", "register"]
    assert len(first.lines) == len(steps) + 6, "one line per step, the summary, and the JSON"
    summary = "\n".join(first.lines)
    for word in ("version 1 (candidate, champion)", "test_auc=0.", "report.html", "mlflow_ui="):
        assert word in summary
    assert first.answer["mlflow_ui"].endswith("/small/mlflow.db'")
    assert "event=valid" in first.error
    assert "KFP" not in first.error
    assert "Warning" not in first.error


def test_its_checkpoints_are_listed_verified_compacted_and_exported(
    folder: Path, first: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    assert first.code == 0, first.error
    words = ("-c", "small.toml")
    listed = des_here(folder, capfd, "checkpoint", "list", *words).answer["checkpoints"]
    name, rows = listed[-1]["checkpoint"], listed[-1]["rows"]
    assert rows > 50 and name.split("/")[0] == first.answer["run_key"][:12]
    shown = des_here(folder, capfd, "checkpoint", "show", name, *words).answer
    assert sum(layer["rows"] for layer in shown["layers"]) == rows
    assert des_here(folder, capfd, "checkpoint", "verify", *words).answer["blocks"] > 4
    for command in ("compact", "convert"):
        # It is whole, and of the present form: nothing is left to do.
        assert des_here(folder, capfd, "checkpoint", command, name, *words).answer["reference"] == shown["reference"]
    exported = des_here(folder, capfd, "checkpoint", "export", "-o", "exported", *words).answer["rows"]
    assert sum(exported.values()) == rows and (folder / "exported" / "user.parquet").exists()
    unknown = des_here(folder, capfd, "checkpoint", "verify", "no/such", *words)
    assert unknown.code == 2 and unknown.answer["code"] == "checkpoint" and "no/such" in unknown.error
    cleaned = des_here(folder, capfd, "clean", "--dry-run", *words).answer
    assert cleaned["folders"] == [] and not cleaned["deleted"], "without limits all stays"
    limited = des_here(folder, capfd, "clean", "--dry-run", "--set", "retention.versions=1", *words).answer
    # The last epoch was not the best one: no version names its weights.
    assert [one["kind"] for one in limited["folders"]] in ([], ["checkpoint"])
    assert des_here(folder, capfd, "checkpoint", "verify", *words).code == 0, "nothing has gone"


def test_a_webhooks_token_is_used_and_written_nowhere(
    folder: Path, first: Ended, webhook: tuple[str, list[str]], temporary: Path
) -> None:
    assert webhook[1][0] == f"/services/{TOKEN}"
    assert not seen, "nor does the list of processes show it"
    assert TOKEN not in first.error + "".join(first.lines)
    for place in (folder, temporary):
        for path in place.rglob("*"):
            if path.is_file() and path.name != "small.toml":
                assert TOKEN.encode() not in path.read_bytes(), path
    with pytest.raises(ConfigError, match=r"notify.webhook is as good as a password") as caught:
        compile_to(load_config(folder / "small.toml"), str(folder / "pipeline.yaml"))
    assert TOKEN not in str(caught.value)


def test_a_run_leaves_no_temporary_files_and_takes_away_what_dead_ones_left(first: Ended, temporary: Path) -> None:
    assert [path.name for path in temporary.iterdir()] == [f"des-{os.getuid()}"]
    assert not list((temporary / f"des-{os.getuid()}").iterdir())


def test_results_are_where_people_look(folder: Path, first: Ended) -> None:
    root = folder / "runs" / "small"
    key = (root / "latest").read_text().strip()
    assert first.answer["run_key"].startswith(key)
    own = root / "runs" / key
    for name in ("inputs.json", "training.json", "gate.json", "champion.json", "version.json", "train.log"):
        assert (own / name).exists()
    for name in ("report.json", "report.html", *(f"predictions/{each}" for each in os.listdir(own / "predictions"))):
        assert (root / name).read_bytes() == (own / name).read_bytes()
    assert (root / "run.log").exists()
    assert (root / "mlflow.db").exists()
    assert (root / "artifacts").is_dir()
    assert not (root / "error.json").exists()
    assert not (folder / "mlruns").exists()
    report = json.loads((root / "report.json").read_text())
    assert report["auc"] == first.answer["auc"]
    assert "Accepted: version 1 is champion" in (root / "report.html").read_text()
    parts = pq.read_table(root / "predictions")
    assert parts.column_names == ["file", "row", "label", "probability"]
    assert parts.num_rows == report["samples"] == storage.read_json(f"{root}/predictions/_manifest.json")["samples"]


def test_the_same_again_is_unchanged(folder: Path, first: Ended) -> None:
    before = snapshot(folder / "runs" / "small")
    again = des(folder, "run", "-c", "small.toml")
    assert again.code == 0, again.error
    assert any("unchanged, version 1" in line for line in again.lines)
    assert again.answer == first.answer | {"unchanged": True}
    assert snapshot(folder / "runs" / "small") == before


def snapshot(root: Path) -> dict[str, bytes]:
    """Everything but logs, the database and KFP's own folder."""
    left_out = ("pipeline", "mlflow.db", "run.log")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in left_out
    }


def test_single_commands_share_the_pipelines_results(
    folder: Path, first: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in ("ingest", "train", "evaluate", "register"):
        ended = des_here(folder, capfd, command, "-c", "small.toml")
        assert ended.code == 0, ended.error
        assert ended.answer["unchanged"] is True, command
    assert ended.answer["version"] == 1


def registered_run(folder: Path, *overrides: str) -> Run:
    """The first run, by another config that differs in nothing that decides the model."""
    return pin(load_config(folder / "small.toml", (f"run.dir={folder}/runs/small", *overrides)))


@pytest.mark.parametrize(
    "name",
    [
        *("inputs.json", "training.json", "report.json", "champion.json", "gate.json"),
        *("predictions/_manifest.json", "predictions/part-00000.parquet"),
        *("features/*/manifest.json", "features/*/*/manifest.json", "features/*/*/rows-*.parquet"),
        "checkpoint",
    ],
)
def test_a_flipped_bit_in_a_result_is_never_unchanged(folder: Path, first: Ended, name: str) -> None:
    """Each file is named with its digest by the one that was written after it, up to the registry's tags."""
    run = registered_run(folder)
    assert finished.finished_run(run.config) is not None
    root = folder / "runs/small"
    paths = list(root.glob(name)) if name.startswith("features/") else [Path(run.path(name))]
    if name == "checkpoint":
        paths = [Path(Reference.parse(storage.read_json(run.path("training.json"))["checkpoint"]).uri)]
    assert paths
    for path in paths:
        whole = path.read_bytes()
        # Pages have checksums of their own, which show where they are read; the config in inputs.json names places.
        end = whole.find(b'"config": {') if name == "inputs.json" else len(whole)
        start = len(whole) - 200 if path.suffix == ".parquet" and path.name.startswith("rows-") else 0
        for place in np.linspace(start, end - 1, 25, dtype=int).tolist():
            data = bytearray(whole)
            data[place] ^= 1 << (place % 8)
            path.write_bytes(data)
            try:
                assert finished.finished_run(run.config) is None, (path, place)
            except DesError as error:
                assert path.name in str(error), (path, place, error)
            finally:
                path.write_bytes(whole)
        path.write_bytes(b"")
        try:
            assert finished.finished_run(run.config) is None, f"{path} was empty"
        except DesError as error:
            assert path.name in str(error)
        finally:
            path.write_bytes(whole)
    assert finished.finished_run(run.config) is not None


def test_damaged_predictions_are_made_again(folder: Path, first: Ended) -> None:
    run = registered_run(folder)
    path = Path(run.path("predictions/part-00000.parquet"))
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert not stages.evaluate(run).unchanged
    assert path.read_bytes() == whole
    assert stages.gate(run).unchanged and stages.register(run).unchanged
    assert finished.finished_run(run.config) is not None


def test_other_bounds_judge_the_same_model_again(folder: Path, first: Ended) -> None:
    """Nothing is trained or scored anew; the version is the same, with the new verdict."""
    before = registered_run(folder)
    strict = registered_run(folder, "gate.min_auc=0.999")
    assert strict.key == before.key and finished.finished_run(strict.config) is None
    trained = Path(before.path("training.json")).stat().st_mtime_ns
    for overrides, verdict, aliases in (
        (("gate.min_auc=0.999",), "reject", ["candidate", "champion"]),
        ((), "accept", ["candidate", "champion"]),
    ):
        run = registered_run(folder, *overrides)
        assert stages.train(run).unchanged and stages.evaluate(run).unchanged
        judged = stages.gate(run)
        assert (judged.unchanged, judged.numbers["verdict"]) == (False, verdict)
        done = stages.register(run)
        assert (done.numbers["version"], done.numbers["aliases"]) == (1, aliases)
        assert done.numbers["accepted"] == (verdict == "accept")
        assert finished.finished_run(run.config) is not None
        assert stages.gate(run).unchanged and stages.register(run).unchanged
        with mlflow_client.connect(run.config.registry.tracking_uri) as client:
            tags = client.get_model_version("small", "1").tags
            page = client.download_artifacts(client.get_model_version("small", "1").run_id, "gate.json")
        assert tags["des.verdict"] == verdict and tags["des.complete"] == "true"
        assert json.loads(Path(page).read_text())["verdict"] == verdict
    assert Path(before.path("training.json")).stat().st_mtime_ns == trained


def test_a_verdict_that_certifies_itself_is_not_believed(folder: Path, first: Ended) -> None:
    run = registered_run(folder)
    path = Path(run.path("gate.json"))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"accepted": true', b'"accepted": false'))
    assert path.read_bytes() != whole
    with pytest.raises(StorageError, match=r"gate.json is not the verdict that the run's files give"):
        stages.register(run)
    stages.gate(run)
    assert path.read_bytes() == whole


def test_a_plan_of_what_was_ingested_is_printed(folder: Path, first: Ended, capfd: pytest.CaptureFixture[str]) -> None:
    ended = des_here(folder, capfd, "plan", "-c", "small.toml", "--workers", "3")
    assert ended.code == 0, ended.error
    assert ended.answer["workers"] == len(ended.answer["placement"]) == 3
    assert ended.lines[0].startswith("event=operator name=fm width=5 ")


def test_predictions_of_raw_records_equal_the_evaluators(
    folder: Path, first: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = pcsv.read_csv(
        folder / "logs" / "2026-01-02.csv", convert_options=pcsv.ConvertOptions(strings_can_be_null=True)
    )
    (folder / "whole.csv").write_bytes((folder / "logs" / "2026-01-02.csv").read_bytes())
    ended = des_here(
        folder, capfd, "predict", "--model", "models:/small@champion", "--input", "whole.csv", "--output", "scores.csv"
    )
    assert ended.code == 0, ended.error
    assert ended.answer["rows"] == raw.num_rows
    assert (folder / "scores.csv").read_text().startswith("sample,probability\n")
    scores = pcsv.read_csv(folder / "scores.csv")
    assert scores.column_names == ["sample", "probability"]
    ours = dict(zip(scores["sample"].to_pylist(), scores["probability"].to_pylist(), strict=True))
    theirs = predictions.read(f"{folder}/runs/small/predictions").to_pylist()
    assert theirs
    assert max(abs(ours[row["sample"]] - row["probability"]) for row in theirs) < 1e-6
    rows = [int(sample.partition(":")[2]) for sample in scores["sample"].to_pylist()]
    assert rows == list(range(raw.num_rows)), "in the file's order"


def test_records_need_no_label_and_bad_ones_are_told(
    folder: Path, first: Ended, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = (folder / "logs" / "2026-01-02.csv").read_text().splitlines()
    head, *rows = [line.rpartition(",")[0] for line in lines[:11]]
    price = head.split(",").index("price")
    broken = rows[4].split(",")
    broken[price] = "dear"
    rows[4] = ",".join(broken)
    (folder / "unlabelled.csv").write_text("\n".join([head, *rows]) + "\n")
    words = ("--model", "models:/small/1", "--input", "unlabelled.csv", "--output", "few.csv", "-c", "small.toml")
    ended = des_here(folder, capfd, "predict", *words)
    assert ended.code == 0, ended.error
    assert (ended.answer["rows"], ended.answer["bad_rows"]) == (9, 1)
    assert "line 6" in "\n".join(ended.lines)
    assert "price" in "\n".join(ended.lines)
    few = [float(line.split(",")[1]) for line in (folder / "few.csv").read_text().splitlines()[1:]]
    scores = pcsv.read_csv(folder / "scores.csv")["probability"].to_pylist()[:10]
    assert few == pytest.approx(scores[:4] + scores[5:], abs=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "models:/small@gold", "--input", "whole.csv"), "aliases @candidate"),
        (("--model", "models:/small@champion", "--input", "none.csv"), "none.csv"),
        (("--model", "models:/small@champion", "--input", "odd.csv"), "no column 'user'"),
        (("--model", "models:/small@champion", "--input", "empty.csv"), "empty.csv"),
    ],
)
def test_a_prediction_that_cannot_be_made_is_one_line_and_no_file(
    folder: Path, first: Ended, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    (folder / "odd.csv").write_text("a,b\n1,2\n")
    (folder / "empty.csv").write_text("user,item,tags,price\n")
    ended = des_here(folder, capfd, "predict", *words, "--output", "never.csv")
    assert ended.code == 2
    assert message in ended.error
    assert ended.error.count("\n") == 1
    assert not (folder / "never.csv").exists()


def other_run(folder: Path, toml: str) -> Run:
    """A run of the same name whose logs are ingested apart."""
    config = load_config(folder / toml, (f"run.dir={folder}/runs/small",))
    return pin(
        config, features.ingest(config.model_copy(update={"storage": StorageConfig(root=str(folder / toml[:-5]))}))
    )


def test_a_champion_with_other_fields_scores_the_same_rows(folder: Path, first: Ended) -> None:
    """Logs are ingested again, its weights come from its checkpoint, and its metrics are those of its report."""
    (folder / "other.toml").write_text(TOML.replace('name = "tags"\nkind = "multi"', 'name = "tags"'))
    run = other_run(folder, "other.toml")
    stages.train(run)
    assert not stages.evaluate(run).unchanged
    record = Champion.load(run.reference("champion.json"))
    assert record.status == "scored" and record.comparison is not None
    report = storage.read_json(f"{folder}/runs/small/runs/{first.answer['run_key'][:12]}/report.json")
    theirs = record.comparison.theirs
    assert theirs.samples == report["samples"] == storage.read_json(run.path("report.json"))["samples"]
    assert theirs.metrics["auc"] == pytest.approx(report["auc"], abs=1e-4)
    assert theirs.metrics["logloss"] == pytest.approx(report["logloss"], abs=1e-6)
    assert not (folder / "other" / "champion-features").exists()
    assert stages.evaluate(run).unchanged
    verdict = Verdict.load(decide(run))
    assert (verdict.champion, verdict.metrics["compared_samples"]) == ("1", theirs.samples)


def test_a_champion_whose_column_is_gone_cannot_be_compared_and_stays(folder: Path, first: Ended) -> None:
    (folder / "less").mkdir()
    for name in ("2026-01-01.csv", "2026-01-02.csv"):
        texts = pcsv.ConvertOptions(column_types={"tags": pa.string()})
        table = pcsv.read_csv(folder / "logs" / name, convert_options=texts)
        pcsv.write_csv(table.drop_columns("item"), folder / "less" / name)
    text = TOML.replace("logs/{day}.csv", "less/{day}.csv").replace('[[fields]]\nname = "item"\n', "")
    (folder / "less.toml").write_text(text)
    run = other_run(folder, "less.toml")
    measured = columns.measured("click", np.arange(400) % 2, np.linspace(0, 1, 400))
    storage.write_json(run.path("report.json"), {"measured": measured.model_dump(mode="json")})
    record = Champion.load(champion.score(run, lambda: pytest.fail("nothing is to be scored"))[0])
    assert (record.status, record.version) == ("not_comparable", "1")
    assert "'item'" in record.reason
    assert Verdict.load(decide(run)).verdict == "not_comparable"
    assert not (folder / "less" / "champion-features").exists()


def test_a_step_that_fails_stops_the_run_with_its_own_line_and_code(folder: Path) -> None:
    ended = des(
        folder, "run", "-c", "small.toml", "--set", "source.path=none/{day}.csv", "--set", "run.dir=runs/broken"
    )
    assert ended.code == 2
    assert re.fullmatch(r"error: .*none/\{day\}.csv.*\n", ended.error)
    assert ended.answer["exit_code"] == 2
    assert (folder / "runs/broken/run.log").exists()
    assert not (folder / "runs/broken/features").exists()


def test_a_registry_that_is_down_is_told_before_anything_is_trained(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    uri = f"registry.tracking_uri=http://127.0.0.1:{port}"
    start_s = time.monotonic()
    wait = "registry.wait_s=2"
    ended = des(folder, "run", "-c", "small.toml", "--set", uri, "--set", wait, "--set", "run.dir=runs/alone")
    assert time.monotonic() - start_s < 30
    assert ended.code == 1, "it may be there later"
    waiting, line = ended.error.splitlines()
    assert waiting.startswith("event=waiting") and "limit_s=2" in waiting
    assert re.search(rf"MLflow at http://127.0.0.1:{port} cannot be reached .*\(waited [12] s\)", line)
    assert not (folder / "runs/alone/features").exists()


def descendants(pid: int) -> set[int]:
    """Ids of all processes below one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(words[1]), []).append(int(stat.parent.name))
    found: set[int] = set()
    left = [pid]
    while left:
        below = children.get(left.pop(), [])
        found.update(below)
        left += below
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


WORSE = ("--set", "gate.min_auc=0.999", "--set", "train.epochs=3", "--set", "train.checkpoint_steps=2")


def test_a_killed_run_leaves_nobody_behind(folder: Path, first: Ended) -> None:
    before = set((folder / "runs/small/checkpoints").iterdir())
    with start(folder, "run", "-c", "small.toml", *WORSE) as process:
        end = time.monotonic() + 120
        while not new_checkpoint(folder, before) and time.monotonic() < end:
            assert process.poll() is None
            time.sleep(0.02)
        below = descendants(process.pid)
        assert len(below) >= 5, "sh, the step, torchrun and two workers"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    end = time.monotonic() + 10
    while any(map(alive, below)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in below if alive(pid)]


def new_checkpoint(folder: Path, before: set[Path]) -> bool:
    here = set((folder / "runs/small/checkpoints").iterdir()) - before
    return any((path / "last.json").exists() for path in here)


def test_the_next_run_finishes_it_and_a_worse_model_is_registered_but_not_champion(folder: Path, first: Ended) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(
        [*DES, "run", "-c", "small.toml", *WORSE], cwd=folder, env=environment, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        drawn = b""
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 65536):
                drawn += piece
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.decode()).replace("\r", "\n")
    assert process.returncode == 0, text
    lines = [line for line in text.splitlines() if line.strip()]
    steps = [line.split()[0] for line in lines if re.match(r"\w+ +\d+\.\d s ", line)]
    assert steps == ["resolve", "ingest", "score", "train", "evaluate", "gate", "register"]
    assert any(line.startswith("train ") and "loss" in line for line in lines), "the bar"
    assert lines[-5] == "model     small version 2 (candidate)"
    assert lines[-3].startswith("verdict   reject: AUC ")
    assert "gate.min_auc = 0.999" in lines[-3]
    assert not [line for line in lines if "KFP" in line or "Traceback" in line or "event=" in line]
    assert "event=resume" in (folder / "runs/small/run.log").read_text()
    key = (folder / "runs/small/latest").read_text().strip()
    gate = json.loads((folder / "runs/small/runs" / key / "gate.json").read_text())
    assert gate["champion"] == "1"
    assert gate["metrics"]["compared_samples"] == 400
