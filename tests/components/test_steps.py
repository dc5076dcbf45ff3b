"""Steps are thin, pass strings, and leave one line and the right code when they fail."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from components import step_runtime, steps
from components.stages import Done
from des_core import log, storage
from des_core.config import Config
from des_core.errors import DataError, DesError, StorageError
from des_core.recurring import lease
from des_core.run import Run
from tests.finished import config_of, finished_run

FOLDER = Path(steps.__file__).parent
STEPS = sorted(path for path in FOLDER.glob("[a-z]*.py"))


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_a_step_only_imports_and_calls(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == [path.stem]
    assert len(functions[0].body) - 1 <= 10
    for argument in functions[0].args.args:
        assert argument.annotation is not None
        kind = ast.unparse(argument.annotation)
        kinds = ("str", "Output[Metrics]", "Output[HTML]", "PipelineTaskFinalStatus")
        assert kind in kinds, f"{argument.arg}: {kind}"
    if path.stem == "notify":
        return
    assert functions[0].returns is not None
    assert ast.unparse(functions[0].returns) == "str"
    assert ".uri" not in path.read_text()


def test_a_stage_is_told_and_its_reference_handed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path)
    seen: list[Run] = []

    def stage(given: Run) -> Done:
        seen.append(given)
        return Done("2 rows, done", "there#sha256:" + "0" * 64)

    inputs, report = (str(run.reference(name)) for name in ("inputs.json", "report.json"))
    config = run.config.model_dump_json()
    assert step_runtime.on_run("evaluate", stage, config, "me", inputs, report).reference.startswith("there")
    assert seen == [run]
    noted = storage.read_json(step_runtime.status_uri(run.config, "me"))
    assert noted == {"done": {"evaluate": "there#sha256:" + "0" * 64}, "as_of": ""}
    events = [log.parse_event(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["start", "done"]
    assert (events[1]["name"], events[1]["what"], events[1]["unchanged"]) == ("evaluate", "2 rows, done", "False")


def failed(
    tmp_path: Path, config: Config | str, error: Exception, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    def stage(_: Config) -> Done:
        raise error

    text = config if isinstance(config, str) else config.model_dump_json()
    with pytest.raises(SystemExit) as caught:
        step_runtime.on_config("ingest", stage, text, "me")
    return int(str(caught.value.code)), capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(DataError("logs.csv: no such file"), 2), (StorageError("it changed"), 1)])
def test_a_known_error_is_one_line_and_its_code(
    tmp_path: Path, error: DesError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path)
    found, output = failed(tmp_path, config, error, capsys)
    assert found == code
    assert output.splitlines()[-1] == f"error: {error}"
    assert "Traceback" not in output
    left = storage.read_json(step_runtime.status_uri(config, "me"))["error"]
    assert left == {"step": "ingest", "code": error.code, "message": str(error)}


def test_an_unknown_error_keeps_its_traceback_for_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    code, output = failed(tmp_path, config, KeyError("lost\nkey"), capsys)
    assert code == 1
    assert "Traceback" in output
    message = storage.read_json(step_runtime.status_uri(config, "me"))["error"]["message"]
    assert message.startswith("ingest: unexpected KeyError: ")
    assert "\n" not in message


def test_a_config_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = failed(tmp_path, '{"run": {}}', AssertionError("not reached"), capsys)
    assert code == 2
    assert "error: the config of this pipeline" in output


def test_a_manifest_that_changed_since_it_was_handed_on_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path)
    report = str(run.reference("report.json"))
    storage.write_json(run.path("report.json"), {})
    with pytest.raises(SystemExit) as caught:
        inputs = str(run.reference("inputs.json"))
        step_runtime.on_run("gate", lambda _: Done("never"), run.config.model_dump_json(), "me", inputs, report)
    assert caught.value.code == 1
    assert "report.json has other bytes than its manifest says" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, f"storage.root={tmp_path}/shop.toml/inside")
    code, output = failed(tmp_path, config, AssertionError("not reached"), capsys)
    assert code == 2
    assert output.splitlines()[-1].startswith(f"error: storage.root = {tmp_path}/shop.toml/inside cannot be written (")


@pytest.mark.parametrize(
    ("state", "error", "done", "outcome"),
    [
        ("SUCCEEDED", None, {"resolve": "absent"}, "absent"),
        ("FAILED", {"step": "train", "message": "worker 1 was killed"}, {"resolve": "2026-01-02"}, "failure"),
        ("FAILED", None, {}, "failure"),
    ],
)
def test_the_last_step_gives_the_lease_back(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    state: str,
    error: dict[str, str] | None,
    done: dict[str, str],
    outcome: str,
) -> None:
    config = config_of(tmp_path)
    lease.take(config, "me")
    status = {"done": done, "as_of": "2026-01-02", "error": error}
    storage.write_json(step_runtime.status_uri(config, "me"), status)
    step_runtime.end(config.model_dump_json(), "me", state, "no pod could start")
    event = log.parse_event(capsys.readouterr().err)
    assert (event["outcome"], event["as_of"]) == (outcome, "2026-01-02")
    if outcome == "failure":
        assert event["why"] == ("train: worker 1 was killed" if error else "no pod could start")
    assert not storage.exists(lease.uri_of(config)) and not storage.exists(step_runtime.status_uri(config, "me"))


def test_pages_are_copied_to_where_kfp_shows_them(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "report.html"), b"<p>page")
    target = tmp_path / "kfp" / "page" / "file"
    step_runtime.copy_page(str(tmp_path / "report.html"), os.fspath(target))
    assert target.read_bytes() == b"<p>page"


def test_the_image_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from components import step

    assert "python" in step.IMAGE
    assert json.dumps(step.step.keywords["install_kfp_package"]) == "false"
