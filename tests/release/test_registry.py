"""The registry on SQLite: one version per run, aliases by verdict, no pickle, and errors of one line."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from des_core import storage
from des_core.contracts import Reference
from des_core.errors import RegistryError
from des_core.release import lineage, prediction, registry, tracking
from des_core.release.gate import Verdict
from des_core.run import Day, Run
from tests.finished import config_of, finished_run

EXAMPLE = pa.table({"user": ["ann", None], "tags": ["a|b", ""], "price": ["3", "7.5"]})
ACCEPT = Verdict(accepted=True, verdict="accept", reasons=("good",), metrics={})
REJECT = Verdict(accepted=False, verdict="reject", reasons=("bad",), metrics={}, champion="1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder with one database, which takes seconds to make."""
    return tmp_path_factory.mktemp("shop")


def export(run: Run) -> tuple[str, pa.Table]:
    """A model of which one file stays in storage."""
    model = run.path("model")
    storage.write_json(storage.join(model, "des.json"), {"uri": {"rows.npy": "s3://elsewhere/rows.npy"}})
    storage.write_bytes(storage.join(model, "index.npy"), b"index")
    storage.write_bytes(storage.join(model, "rows.npy"), b"large")
    return model, EXAMPLE


def refuse(run: Run) -> tuple[str, pa.Table]:
    raise AssertionError("a run that is registered must not be exported again")


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[Run, Reference]:
    run = finished_run(folder)
    ACCEPT.write(run.path("gate.json"))
    storage.write_bytes(run.path("report.html"), b"<p>report")
    assert registry.standing(run) == ("", "", ())
    assert registry.champion(run.config, str(folder)) is None
    assert not (folder / "runs/shop/mlflow.db").exists(), "asking must not make a database"
    reference, adopted = registry.register(run, ACCEPT, export)
    assert not adopted
    return run, reference


@pytest.fixture(scope="module")
def client(first: tuple[Run, Reference]) -> Any:
    with registry._client(first[0].config.registry.tracking_uri) as client:
        return client


def aliases(client: Any) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model("shop").aliases.items()}


def test_the_first_accepted_model_is_candidate_and_champion(first: tuple[Run, Reference]) -> None:
    run, reference = first
    record = registry.Registered.load(reference)
    assert (record.name, record.version, record.accepted) == ("shop", "1", True)
    assert record.aliases == ("candidate", "champion")
    assert registry.standing(run) == ("1", "1", ("candidate", "champion"))


def test_a_version_leads_back_to_all_that_made_it(first: tuple[Run, Reference], client: Any) -> None:
    run = first[0]
    version = client.get_model_version_by_alias("shop", "champion")
    assert version.tags["des.run_key"] == run.key
    assert json.loads(version.tags["des.config"]) == run.config.model_dump(mode="json")
    assert version.tags["des.dataset"] == str(run.dataset)
    assert version.tags["des.verdict"] == "accept"
    assert float(version.tags["des.test_auc"]) == pytest.approx(storage.read_json(run.path("report.json"))["auc"], 1e-5)
    assert version.tags["des.git_commit"] == lineage.code_version()
    logged = client.get_run(version.run_id)
    assert logged.data.metrics["bytes/fm/counted"] == 278_528
    assert len(client.get_metric_history(version.run_id, "loss")) == 96
    assert logged.data.params["model.name"] == "fm"
    assert {file.path for file in client.list_artifacts(version.run_id)} >= {
        "report.html",
        "report.json",
        "config.json",
    }


def test_the_artifact_is_the_export_without_pickle_and_without_what_stays_in_storage(
    first: tuple[Run, Reference], folder: Path
) -> None:
    found = registry.champion(first[0].config, str(folder / "unused"))
    assert found is not None
    assert sorted(path.name for path in Path(found.folder).iterdir()) == ["des.json", "index.npy"]
    assert str(folder / "runs/shop/artifacts") in found.folder
    assert not (folder / "unused").exists(), "a local artifact is read in place"
    whole = Path(found.folder).parent.parent
    assert not [path for path in whole.rglob("*") if path.suffix in (".pkl", ".pyc", ".pickle")]
    assert (whole / "code/des_core/release/serving.py").exists()
    described = yaml.safe_load((whole / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "des_core.release.serving"
    assert [column["name"] for column in json.loads(described["signature"]["inputs"])] == EXAMPLE.column_names
    example = json.loads((whole / "input_example.json").read_text())
    assert example["columns"] == EXAMPLE.column_names


def test_the_same_run_again_adopts_its_version(first: tuple[Run, Reference]) -> None:
    run, reference = first
    assert registry.register(run, ACCEPT, refuse) == (reference, True)


def test_aliases_that_a_crash_left_out_are_set_by_the_next_try(first: tuple[Run, Reference], client: Any) -> None:
    client.delete_registered_model_alias("shop", "champion")
    client.delete_model_version_tag("shop", "1", "des.complete")
    registry.register(first[0], ACCEPT, refuse)
    assert aliases(client) == {"candidate": "1", "champion": "1"}


def test_a_rejected_model_is_a_candidate_and_the_champion_stays(
    first: tuple[Run, Reference], folder: Path, client: Any
) -> None:
    run = finished_run(folder, "run.seed=2")
    reference, _ = registry.register(run, REJECT, export)
    record = registry.Registered.load(reference)
    assert (record.version, record.aliases, record.accepted) == ("2", ("candidate",), False)
    assert aliases(client) == {"candidate": "2", "champion": "1"}
    # The champion's own run, registered again, takes nothing back.
    registry.register(first[0], ACCEPT, refuse)
    assert aliases(client) == {"candidate": "2", "champion": "1"}


def test_a_verdict_against_a_champion_of_the_past_is_refused(first: tuple[Run, Reference], folder: Path) -> None:
    run = finished_run(folder, "run.seed=3")
    with pytest.raises(
        RegistryError, match=r"champion of shop is now version 1, the gate compared none; run des evalu"
    ):
        registry.register(run, ACCEPT, export)
    assert registry.standing(run) == ("1", "", ())


def test_a_model_is_found_by_alias_and_by_number(first: tuple[Run, Reference], folder: Path) -> None:
    uri = first[0].config.registry.tracking_uri
    by_alias = registry.fetch("models:/shop@champion", uri, str(folder))
    assert by_alias == registry.fetch("models:/shop/1", uri, str(folder))
    assert by_alias.version == "1"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "models:/shop@gold",
            r"does not exist at sqlite.*; shop has versions 1.* and aliases @candidate = .*@champion = 1",
        ),
        ("models:/shop/99", r"does not exist .*; shop has versions 1"),
        ("models:/shoe@champion", r"does not exist .*; registered models: shop"),
        ("shop", r"shop: write a model as models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/shop/latest", r"write a model as"),
    ],
)
def test_a_model_that_is_not_there_is_one_line_that_says_what_is(
    first: tuple[Run, Reference], folder: Path, model: str, message: str
) -> None:
    with pytest.raises(RegistryError, match=message) as caught:
        registry.fetch(model, first[0].config.registry.tracking_uri, str(folder))
    assert "\n" not in str(caught.value)


def test_the_next_day_goes_on_from_what_the_champions_tags_say(tmp_path: Path) -> None:
    whole = finished_run(tmp_path)
    assert registry.parent(whole.config) is None
    registry.register(whole, ACCEPT, export)
    checkpoint = Path(whole.checkpoints, "step-0000000096", "manifest.json")
    found = registry.parent(whole.config)
    assert found is not None
    assert found[:4] == ("1", "", 0, ())
    assert Reference.parse(f"{tmp_path}/runs/shop/{found.checkpoint}").read() == json.loads(checkpoint.read_text())
    day = Day(
        as_of="2026-01-03",
        days={"2026-01-03": "0" * 64},
        left_out=("2026-01-01", "2026-01-02"),
        cut=lineage.micros("2026-01-03T21:36:00.000007+00:00"),
        champion=found.version,
        checkpoint=found.checkpoint,
    )
    run = finished_run(tmp_path, day=day)
    registry.register(run, ACCEPT.model_copy(update={"champion": "1"}), export)
    found = registry.parent(run.config)
    assert found is not None
    assert found[:4] == ("2", "2026-01-03", day.cut, ("2026-01-01", "2026-01-02"))
    assert run.key[:12] in found.checkpoint
    late = finished_run(tmp_path, day=day.model_copy(update={"as_of": "2026-01-04"}))
    with pytest.raises(
        RegistryError, match="is now version 2, the run of 2026-01-04 was pinned to 1; run the day again"
    ):
        registry.register(late, ACCEPT.model_copy(update={"champion": "1"}), export)


def test_a_database_that_was_never_made_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="there is no MLflow database at sqlite"):
        registry.fetch("models:/shop@champion", f"sqlite:///{tmp_path}/none/mlflow.db", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_database_of_something_else_is_one_line(tmp_path: Path, first: tuple[Run, Reference]) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table alembic_version (version_num text)")
        database.execute("insert into alembic_version values ('not one of theirs')")
    database.close()
    with pytest.raises(RegistryError, match=r"MLflow at sqlite.* refused: ") as caught:
        registry.fetch("models:/shop@champion", f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_mlflow_says_nothing_on_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = finished_run(folder, "run.seed=4")
    registry.register(run, REJECT, export)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "/tmp/mlruns", "mlruns"])
def test_a_plain_folder_is_refused_with_the_fix(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"write it as sqlite:////.*mlruns/mlflow.db"):
        tracking.check(uri)


def test_a_database_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database")
    with pytest.raises(RegistryError, match="not an SQLite database"):
        tracking.check(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(RegistryError, match="cannot be written"):
        tracking.check(f"sqlite:///{tmp_path}/text.db/mlflow.db")
    tracking.check(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def silent_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port where somebody takes calls and never answers."""
    monkeypatch.setattr(tracking, "CONNECT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_server_that_is_down_is_named_in_time(scheme: str) -> None:
    uri = f"{scheme}://somebody:secret@127.0.0.1:{closed_port()}/base"
    start = time.monotonic()
    with pytest.raises(RegistryError, match=r"MLflow at .*127.0.0.1:\d+/base cannot be reached") as caught:
        tracking.check(uri)
    assert "secret" not in str(caught.value)
    assert time.monotonic() - start < 15


def test_a_server_that_never_answers_is_named_in_time(silent_port: int) -> None:
    with pytest.raises(RegistryError, match="cannot be reached"):
        tracking.check(f"http://127.0.0.1:{silent_port}")


def test_any_answer_is_an_answer() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        tracking.check(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def test_a_model_is_looked_up_where_the_config_or_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError, match="give the run's config with -c FILE or set MLFLOW_TRACKING_URI"):
        prediction.tracking_uri("models:/shop@champion", None)
    config = config_of(tmp_path)
    Path(config.run.dir).mkdir(parents=True)
    Path(config.run.dir, "mlflow.db").touch()
    own = f"sqlite:///{tmp_path}/runs/shop/mlflow.db"
    assert prediction.tracking_uri("models:/shop/3", None) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert prediction.tracking_uri("models:/shop@champion", None) == "http://mlflow:5000"
    assert prediction.tracking_uri("models:/shop@champion", config) == own


def test_our_code_is_named_by_commit_or_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import des_core

    package = tmp_path / "des_core"
    package.mkdir()
    monkeypatch.setattr(des_core, "__file__", str(package / "__init__.py"))
    assert lineage.code_version() == des_core.__version__
    (tmp_path / ".git").mkdir()
    assert lineage.code_version() == des_core.__version__
    shutil.rmtree(tmp_path / ".git")
    git = ["-c", "user.name=a", "-c", "user.email=a@b"]
    lineage._git(tmp_path, "init", "-q")
    (package / "__init__.py").touch()
    lineage._git(tmp_path, "add", ".")
    lineage._git(tmp_path, *git, "commit", "-qm", "first")
    commit = lineage._git(tmp_path, "rev-parse", "HEAD")
    assert lineage.code_version() == commit
    (package / "__init__.py").write_text("changed = True")
    assert lineage.code_version() == f"{commit}+changes"
