"""The command line: one line for every mistake, the right exit code, and JSON as the last line when asked."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from des_core import __version__, storage
from des_core.errors import error_classes
from pipelines import cli, summary
from pipelines.commands import options
from tests.finished import config_of, finished_run

ROOT = Path(__file__).parent.parent.parent
DES = [sys.executable, "-c", "from pipelines.cli import main; main()"]
COMMANDS = [
    "run",
    "compile",
    "submit",
    "ingest",
    "train",
    "evaluate",
    "register",
    "predict",
    "serve",
    "lineage",
    "clean",
    "plan",
    "generate",
    "day",
    "schedule",
    "checkpoint",
]
CODES = {each.code for each in error_classes()}
GROUPS = {
    "day": ["list", "accept"],
    "schedule": ["create", "list", "pause", "resume", "delete"],
    "checkpoint": ["list", "show", "verify", "compact", "convert", "export"],
}
WITHOUT_CONFIG = ["generate", "schedule list", "schedule pause", "schedule resume", "schedule delete"]


@pytest.fixture
def toml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config in the current directory."""
    config_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    return "shop.toml"


def des(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    said = capsys.readouterr()
    return int(caught.value.code or 0), said.out, said.err


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The one line of a command that is refused, the same with --json."""
    found, out, err = des(capsys, *words)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    found, out, again = des(capsys, *words, "--json")
    assert (found, again) == (code, err)
    answer = json.loads(out.splitlines()[-1])
    assert answer.pop("code") in CODES
    assert answer == {"error": err.removeprefix("error: ").rstrip("\n"), "exit_code": code}
    return err


def test_every_command_is_listed_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = des(capsys, "--help")
    assert code == 0
    listed = out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()] == COMMANDS
    assert "..." not in listed, "a command's line must fit"
    assert des(capsys)[:2] == (0, out)
    groups = [[group, command] for group, commands in GROUPS.items() for command in commands]
    for words in [*([command] for command in COMMANDS if command not in GROUPS), *groups]:
        code, out, _ = des(capsys, *words, "--help")
        assert code == 0
        assert "--json" in out
        assert ("--set" in out) == (" ".join(words) not in WITHOUT_CONFIG)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert des(capsys, "--version")[:2] == (0, f"des {__version__}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runn"], "No such command 'runn'"),
        (["run"], "Missing option '-c' / '--config'; see: des run --help"),
        (["run", "-c", "shop.toml", "--sett", "a.b=1"], "--sett"),
        (["schedule", "pause"], "Missing argument 'NAME'; see: des schedule pause --help"),
        (["schedule", "--list"], "No such option: --list; see: des schedule --help"),
        (["plan", "-c", "shop.toml", "--workers", "0"], "--workers"),
        (["plan", "-c", "shop.toml", "--workers", "two"], "--workers"),
        (["generate", "--days", "1"], "Missing option '--out'"),
        (["run", "-c", "none.toml"], "none.toml: no such config file"),
        (["run", "-c", "shop.toml", "--set", "model.nam=fm"], "did you mean name?"),
        (["run", "-c", "shop.toml", "--set", "nonsense"], "write it as section.key=value"),
        (["train", "-c", "shop.toml"], "no features yet; run des ingest"),
        (["predict", "--model", "models:/a@b", "--input", "a", "--output", "b"], "give the run's config with -c FILE"),
        (["predict", "--model", "m", "--input", "a", "--output", "b", "--set", "a.b=1"], "give one with -c FILE"),
        (["compile", "-c", "shop.toml", "-o", "none/pipeline.yaml"], "no such folder for pipeline.yaml"),
        (["run", "-c", "shop.toml", "--set", "run.dir=shop.toml/here"], "shop.toml/here: Not a directory; choose"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    toml: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert message in refused(capsys, *words)


def test_commands_out_of_order_say_which_comes_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "run des evaluate first" in refused(capsys, "register", "-c", "shop.toml")
    storage.delete(run.path("training.json"))
    assert "run des train first" in refused(capsys, "evaluate", "-c", "shop.toml")


def test_an_unforeseen_error_is_one_line_that_names_the_traceback(
    toml: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def explode(*_: Any) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(options, "crash_folder", str(tmp_path))
    monkeypatch.setattr("des_core.config.load_config", explode)
    line = refused(capsys, "run", "-c", toml, code=1)
    assert "unexpected KeyError: 'lost'" in line
    assert "raise KeyError" in Path(line.split()[-1]).read_text()


def test_compile_says_what_it_wrote(toml: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = des(capsys, "compile", "-c", toml, "-o", "pipeline.yaml", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["pipeline"] == "pipeline.yaml"
    assert out.splitlines()[0] == "pipeline=pipeline.yaml"
    assert Path("pipeline.yaml").exists()


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    # A shell's background job, as tests may be, ignores Ctrl-C and so would its children.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*DES, *words], env=environment, text=True, preexec_fn=default, **options)


def test_ctrl_c_is_one_line_and_code_130(tmp_path: Path) -> None:
    words = ("generate", "--out", str(tmp_path), "--days", "300", "--rows-per-day", "400000", "--json")
    with start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "error: interrupted\n")
    assert json.loads(out.splitlines()[-1]) == {"error": "interrupted", "code": "interrupted", "exit_code": 130}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ends_says_how_to_go_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    words = ("run", "-c", str(ROOT / "configs/demo.toml"), "--set", f"run.dir={tmp_path}", "--json")
    with start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        # The first step is done: the pipeline is at work.
        first = process.stdout.readline()
        process.send_signal(number)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert first.startswith("event=done")
    line = "interrupted; the same command goes on from what is done"
    assert (process.returncode, err.splitlines()[-1]) == (code, f"error: {line}")
    assert json.loads(out.splitlines()[-1]) == {"error": line, "code": "interrupted", "exit_code": code}


def test_a_locale_without_our_letters_is_no_error(tmp_path: Path, toml: str) -> None:
    environment = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    odd = tmp_path / "ü"
    odd.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        words = ("compile", "-c", toml, "-o", str(odd / "pipeline.yaml"))
        with start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "/pipeline.yaml" in out and out.isascii() and (odd / "pipeline.yaml").exists()


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with start("--version", stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        _, err = process.communicate(timeout=30)
    assert err == ""


PLAN = {
    "workers": 2,
    "batch": 1024,
    "operators": [{"name": "fm", "width": 17, "alternatives": {"sum": 69632.0, "gather": 278528.0}, "chosen": "sum"}],
    "joint": [
        {"choice": {"fm": "sum"}, "upper": "home", "bytes_per_step": 69640.0, "collectives": 3},
        {"choice": {"fm": "gather"}, "upper": "home", "bytes_per_step": 3, "collectives": 3e5},
    ],
    "placement": [
        {"worker": 0, "fields": ["user"], "lookups_share": 0.25, "bytes_share": 0.9, "rows": 41207},
        {"worker": 1, "fields": ["tags", "price"], "lookups_share": 0.75, "bytes_share": 0.1, "rows": 896},
    ],
    "dense_bytes_per_step": 4.0,
    "memory": {
        "workers": [
            {"worker": 0, "rows_owned": 41207, "rows": 2_800_000, "process": 545_000_000, "train": 560_000_000},
            {"worker": 1, "rows_owned": 896, "rows": 61_000, "process": 545_000_000, "train": 546_000_000},
        ],
        "most": 560_000_000,
        "steps": {"ingest": 900_000_000, "register": 1_200_000_000},
        "limit": {"bytes": 500_000_000, "why": "cluster.memory = 1Gi", "fits": False},
    },
}


def test_a_plan_is_one_line_per_fact(capsys: pytest.CaptureFixture[str]) -> None:
    summary.show_plan(PLAN)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "event=operator name=fm width=17 sum_bytes=69632 gather_bytes=278528 chosen=sum"
    assert lines[1] == "event=joint rank=1 choice=fm:sum upper=home bytes_per_step=69640 collectives=3"
    assert lines[4] == "event=worker worker=1 fields=tags,price lookups_share=0.75 bytes_share=0.1 rows=896"
    assert lines[6] == "event=memory worker=1 rows_owned=896 rows=61000 process=545000000 train=546000000"
    assert lines[7:] == [
        "event=steps ingest=900000000 register=1200000000",
        "event=limit bytes=500000000 why='cluster.memory = 1Gi' fits=False",
    ]


def test_a_plan_on_a_terminal_is_tables(capsys: pytest.CaptureFixture[str]) -> None:
    summary._plan_tables(PLAN)
    out = capsys.readouterr().out
    for word in ("2 workers", "69.6 kB", "279 kB", "tags, price", "75.0 %", "41,207", "2.8 MB", "1.2 GB"):
        assert word in out
    said = "need up to 560 MB each, each may have 500 MB (cluster.memory = 1Gi), which is too little"
    assert said in " ".join(out.split())


def test_the_registry_is_shown_by_its_command_or_its_address() -> None:
    words = shlex.split(summary.mlflow_ui("sqlite:////a b/mlflow.db"))
    assert words[1:] == ["ui", "--backend-store-uri", "sqlite:////a b/mlflow.db"]
    assert shutil.which(words[0]), "it runs from where one stands"
    assert summary.mlflow_ui("http://mlflow:5000") == "http://mlflow:5000"


def test_a_run_whose_results_are_gone_is_an_error_and_not_absent(
    toml: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from components import finished
    from pipelines import local

    steps = {"resolve": {"what": "the demo"}, "register": {"what": "version 1", "unchanged": "False"}}
    monkeypatch.setattr(finished, "finished_run", lambda config, day: None)
    monkeypatch.setattr(local, "run", lambda config, day, tell: steps)
    code, _, err = des(capsys, "run", "-c", toml, "--set", f"run.dir={tmp_path}/runs")
    assert code == 1 and "all steps of" in err and "are not found under" in err
    del steps["register"]
    code, out, _ = des(capsys, "run", "-c", toml, "--set", f"run.dir={tmp_path}/runs", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["verdict"] == "absent"
