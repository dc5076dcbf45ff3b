"""The registry on SQLite and on Postgres: one version per run, aliases by verdict, no pickle, errors of one line."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import yaml

from des_core import log, storage
from des_core.addresses import sqlite_address, sqlite_path
from des_core.contracts import Reference
from des_core.errors import RegistryError, UnavailableError
from des_core.release.registry import availability, lineage, mlflow_client, registration, registry
from des_core.release.serve import prediction
from des_core.run import Day, Run
from des_core.verdict import Verdict
from pipelines import cli, summary
from tests.finished import config_of, finished_run

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = pa.table({"user": ["ann", None], "tags": ["a|b", ""], "price": ["3", "7.5"]})
ACCEPT = Verdict(accepted=True, verdict="accept", reasons=("good",), metrics={})
REJECT = Verdict(accepted=False, verdict="reject", reasons=("bad",), metrics={}, champion="1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run folder with one database, which takes seconds to make."""
    return tmp_path_factory.mktemp("shop")


def describe(run: Run, folder: str) -> pa.Table:
    """A model, and a file in a folder beside it."""
    storage.write_json(storage.join(folder, "des.json"), {"checkpoint": run.key})
    storage.write_bytes(storage.join(folder, "checkpoints/weights.arrow"), b"small")
    return EXAMPLE


def refuse(run: Run, folder: str) -> pa.Table:
    raise AssertionError("a run that is registered must not be described again")


def fetched(run: Run, into: str) -> registry.StoredModel:
    """The champion of the run's name."""
    config = run.config
    return registry.fetch(f"models:/{config.run.name}@champion", config.registry.tracking_uri, into)


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[Run, Reference]:
    run = finished_run(folder)
    ACCEPT.write(run.path("gate.json"))
    storage.write_bytes(run.path("report.html"), b"<p>report")
    assert registry.standing(run) == ("", "", ())
    assert registry.resolve("models:/shop@champion", run.config.registry.tracking_uri) == ""
    assert not (folder / "runs/shop/mlflow.db").exists(), "asking must not make a database"
    reference, adopted = registration.register(run, ACCEPT, describe)
    assert not adopted
    return run, reference


@pytest.fixture(scope="module")
def client(first: tuple[Run, Reference]) -> Any:
    with mlflow_client.connect(first[0].config.registry.tracking_uri) as client:
        return client


def aliases(client: Any) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model("shop").aliases.items()}


def test_the_first_accepted_model_is_candidate_and_champion(first: tuple[Run, Reference]) -> None:
    run, reference = first
    record = registration.Registered.load(reference)
    assert (record.name, record.version, record.accepted) == ("shop", "1", True)
    assert record.aliases == ("candidate", "champion")
    assert registry.standing(run) == ("1", "1", ("candidate", "champion"))


def test_a_version_leads_back_to_all_that_made_it(first: tuple[Run, Reference], client: Any) -> None:
    run = first[0]
    version = client.get_model_version_by_alias("shop", "champion")
    assert version.tags["des.run_key"] == run.key
    assert json.loads(version.tags["des.config"]) == run.config.recorded.model_dump(mode="json")
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


def test_the_artifact_is_what_was_described_without_pickle(first: tuple[Run, Reference], folder: Path) -> None:
    found = fetched(first[0], str(folder / "unused"))
    assert sorted(path.name for path in Path(found.folder).iterdir()) == ["checkpoints", "des.json"]
    assert str(folder / "runs/shop/artifacts") in found.folder
    assert not (folder / "unused").exists(), "a local artifact is read in place"
    whole = Path(found.folder).parent.parent
    assert not [path for path in whole.rglob("*") if path.suffix in (".pkl", ".pyc", ".pickle")]
    assert len([path for path in whole.rglob("*") if path.is_file()]) < 12, "no copy of our own code"
    described = yaml.safe_load((whole / "MLmodel").read_text())
    assert described["flavors"]["python_function"]["loader_module"] == "des_core.release.serve.pyfunc"
    example = json.loads((whole / "input_example.json").read_text())
    assert example["columns"] == EXAMPLE.column_names


def test_the_same_run_again_adopts_its_version(first: tuple[Run, Reference]) -> None:
    run, reference = first
    assert registration.register(run, ACCEPT, refuse) == (reference, True)


def test_aliases_that_a_crash_left_out_are_set_by_the_next_try(first: tuple[Run, Reference], client: Any) -> None:
    client.delete_registered_model_alias("shop", "champion")
    client.delete_model_version_tag("shop", "1", "des.complete")
    registration.register(first[0], ACCEPT, refuse)
    assert aliases(client) == {"candidate": "1", "champion": "1"}


def test_a_rejected_model_is_a_candidate_and_the_champion_stays(
    first: tuple[Run, Reference], folder: Path, client: Any
) -> None:
    run = finished_run(folder, "run.seed=2")
    reference, _ = registration.register(run, REJECT, describe)
    record = registration.Registered.load(reference)
    assert (record.version, record.aliases, record.accepted) == ("2", ("candidate",), False)
    assert aliases(client) == {"candidate": "2", "champion": "1"}
    # The champion's own run, registered again, takes nothing back.
    registration.register(first[0], ACCEPT, refuse)
    assert aliases(client) == {"candidate": "2", "champion": "1"}


def test_a_verdict_against_a_champion_of_the_past_is_refused(first: tuple[Run, Reference], folder: Path) -> None:
    run = finished_run(folder, "run.seed=3")
    with pytest.raises(
        RegistryError, match=r"champion of shop is now version 1, the gate compared none; run des evalu"
    ):
        registration.register(run, ACCEPT, describe)
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


class Line(NamedTuple):
    """Runs of one name in one registry, by number of the day."""

    folder: Path
    overrides: tuple[str, ...]

    def whole(self, *more: str) -> Run:
        """A run over whole logs."""
        return finished_run(self.folder, *self.overrides, *more)

    def day(self, number: int, champion: str, *more: str, left_out: tuple[str, ...] = ()) -> Run:
        """A day's run that was pinned to a champion."""
        as_of = f"2026-01-{number:02d}"
        cut = lineage.micros(f"{as_of}T21:36:00.000007+00:00")
        days = {as_of: f"{number:064x}"}
        day = Day(as_of=as_of, days=days, left_out=left_out, cut=cut, champion=champion)
        return finished_run(self.folder, *self.overrides, *more, day=day)

    @property
    def uri(self) -> str:
        return config_of(self.folder, *self.overrides).registry.tracking_uri


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, folder: Path, first: object) -> tuple[Path, tuple[str, ...]]:
    """A folder, and the setting of a database that is there already."""
    if request.param == "sqlite":
        return folder, ()
    server = request.getfixturevalue("postgres")
    return folder, (f"registry.tracking_uri={server}", f"storage.root={folder}/elsewhere")


@pytest.fixture
def line(place: tuple[Path, tuple[str, ...]], request: pytest.FixtureRequest) -> Line:
    """A name that nothing is registered under yet."""
    name = re.sub("[^a-z]+", "-", request.node.name).strip("-")[-63:].strip("-")
    return Line(place[0], (f"run.name={name}", *place[1]))


def against(champion: str, verdict: Verdict = ACCEPT) -> Verdict:
    return verdict.model_copy(update={"champion": champion})


def registered(run: Run, verdict: Verdict, describe_: registration.Describe = describe) -> tuple[Any, ...]:
    """Version, aliases and acceptance after registering a run."""
    record = registration.Registered.load(registration.register(run, verdict, describe_)[0])
    return record.version, record.aliases, record.accepted


def test_the_next_day_goes_on_from_what_the_champions_tags_say(line: Line) -> None:
    whole = line.whole()
    assert registry.parent(whole.config) is None
    assert registered(whole, ACCEPT) == ("1", ("candidate", "champion"), True)
    found = registry.parent(whole.config)
    assert found is not None and found[:4] == ("1", "", 0, ())
    checkpoint = Reference.parse(f"{whole.config.storage.root}/{found.checkpoint}").read()
    assert checkpoint == {"run_key": whole.key}
    skipped = ("2026-01-01", "2026-01-02")
    day = line.day(3, "1", left_out=skipped)
    assert registered(day, against("1")) == ("2", ("candidate", "champion"), True)
    assert registered(line.day(4, "2"), against("2", REJECT)) == ("3", ("candidate",), False)
    found = registry.parent(day.config)
    assert found is not None and found[:4] == ("2", "2026-01-03", day.day and day.day.cut, skipped)
    assert day.key[:12] in found.checkpoint


def test_a_chain_leads_from_a_version_to_the_first(line: Line) -> None:
    sure = ACCEPT.model_copy(update={"metrics": {"auc": 0.8}, "intervals": {"auc": (0.79, 0.81)}})
    for number, (champion, verdict) in enumerate([("", ACCEPT), ("1", REJECT), ("1", sure)], 1):
        registered(line.day(number, champion), against(champion, verdict))
    name = line.whole().config.run.name
    chain = registry.chain(f"models:/{name}@champion", line.uri)
    assert [(link.version, link.parent_version, link.verdict) for link in chain] == [
        ("3", "1", "accept"),
        ("1", "", "accept"),
    ]
    assert chain[0].aliases == ("candidate", "champion") and chain[1].aliases == ()
    assert chain[0].days == {"2026-01-03": f"{3:064x}"}
    assert chain[0].trained_through == "2026-01-03T21:36:00.000007+00:00"
    assert chain[0].environment == hashlib.sha256(lineage.environment().encode()).hexdigest()
    assert [link.version for link in registry.chain(f"models:/{name}/2", line.uri)] == ["2", "1"]
    with pytest.raises(RegistryError, match=rf"models:/{name}/9 does not exist at .*; {name} has versions 1, 2, 3 and"):
        registry.chain(f"models:/{name}/9", line.uri)
    with mlflow_client.connect(line.uri) as client:
        files = {file.path for file in client.list_artifacts(chain[0].mlflow_run)}
        assert files >= {"config.json", "environment.txt", "inputs.json", "report.json", "training.json"}
        metrics = client.get_run(chain[0].mlflow_run).data.metrics
        assert [metrics[f"gate/auc{end}"] for end in ("_low", "", "_high")] == [0.79, 0.8, 0.81]
        client.delete_model_version(name, "1")
    assert [link.version for link in registry.chain(f"models:/{name}/3", line.uri)] == ["3"]


def test_versions_say_what_must_stay_until_their_weights_are_deleted(line: Line) -> None:
    assert registry.versions(line.whole().config) == []
    registered(line.day(1, ""), ACCEPT)
    registered(line.day(2, "1"), against("1"))
    config = line.whole().config
    second, first = registry.versions(config)
    assert (second.number, second.aliases) == (2, ("candidate", "champion"))
    assert first.run_key == line.day(1, "").key and first.run_key[:12] in first.checkpoint
    registry.weights_deleted(config, [1])
    assert [one.checkpoint for one in registry.versions(config)] == [second.checkpoint, ""]
    with pytest.raises(
        RegistryError, match=rf"models:/{config.run.name}/1: its weights were deleted by \[retention\] on"
    ):
        registry.fetch(f"models:/{config.run.name}/1", line.uri, "unused")


def test_two_processes_that_register_one_run_make_one_version(line: Line) -> None:
    run = line.whole()

    def beaten(run: Run, folder: str) -> pa.Table:
        """Between our look and our version, the same run is registered elsewhere."""
        assert registered(run, ACCEPT) == ("1", ("candidate", "champion"), True)
        return describe(run, folder)

    assert registered(run, ACCEPT, beaten) == ("1", ("candidate", "champion"), True)
    with mlflow_client.connect(line.uri) as client:
        assert len(client.search_model_versions(f"name='{run.config.run.name}'")) == 1


def test_of_two_runs_against_one_champion_the_later_is_superseded(line: Line) -> None:
    def beaten(run: Run, folder: str) -> pa.Table:
        assert registered(line.whole("run.seed=1"), ACCEPT) == ("1", ("candidate", "champion"), True)
        return describe(run, folder)

    run = line.whole()
    assert registered(run, ACCEPT, beaten) == ("2", ("candidate",), False)
    assert registry.standing(run) == ("1", "2", ("candidate",))
    assert registered(run, ACCEPT, refuse) == ("2", ("candidate",), False), "nor does trying again make it champion"
    assert registry.chain(f"models:/{run.config.run.name}/2", line.uri)[0].verdict == "superseded"


def test_an_alias_moved_by_hand_is_heeded(line: Line) -> None:
    first, second = line.day(1, ""), line.day(2, "1")
    registered(first, ACCEPT)
    registered(second, against("1"))
    name = first.config.run.name
    with mlflow_client.connect(line.uri) as client:
        client.set_registered_model_alias(name, "champion", "1")
    found = registry.parent(first.config)
    assert found is not None and (found.version, found.as_of) == ("1", "2026-01-01")
    assert registry.resolve(f"models:/{name}@champion", line.uri) == "1"
    assert registry.standing(second) == ("1", "2", ("candidate",))
    with pytest.raises(
        RegistryError, match=r"now version 1, the run of 2026-01-03 was pinned to 2; run the day again, .*2026-01-03$"
    ):
        registration.register(line.day(3, "2"), against("2"), refuse)
    # The one that was left is registered already, and stays left.
    assert registered(second, against("1"), refuse) == ("2", ("candidate",), True)
    assert registered(line.day(3, "1"), against("1")) == ("3", ("candidate", "champion"), True)


def test_no_password_is_written_anywhere(tmp_path: Path, postgres: str) -> None:
    hook = "notify.webhook=https://hooks.example.com/services/T0/hidden-hook"
    line = Line(tmp_path, ("run.name=discreet", hook, f"registry.tracking_uri={postgres}"))
    run = line.whole()
    ACCEPT.write(run.path("gate.json"))
    registered(run, ACCEPT)
    assert "secret" in line.uri
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        assert b":secret" not in content and b"hidden-hook" not in content, file
    version = registry.chain(f"models:/{run.config.run.name}/1", line.uri)[0]
    with mlflow_client.connect(line.uri) as client:
        tags = client.get_run(version.mlflow_run).data.tags | client.get_model_version(run.config.run.name, "1").tags
    assert not [key for key, value in tags.items() if "secret" in value or "hidden-hook" in value]
    assert json.loads(tags["des.config"])["registry"]["tracking_uri"].startswith("postgresql://***@127.0.0.1:")
    with pytest.raises(RegistryError) as caught:
        registry.fetch("models:/none@champion", line.uri, "unused")
    assert "secret" not in str(caught.value)
    assert "secret" not in json.dumps(summary.of_run(run, unchanged=False))


def test_a_password_that_is_refused_is_said_at_once(postgres: str) -> None:
    start = time.monotonic()
    with pytest.raises(RegistryError, match=r"refused: .*authentication failed.*; correct registry.track") as caught:
        registry.resolve("models:/none@champion", postgres.replace("secret", "secret2"))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


def test_des_lineage_prints_a_chain(
    folder: Path, first: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(folder, ("run.name=told",))
    monkeypatch.setenv("DES_IMAGE", "ghcr.io/des/des-python:1")
    monkeypatch.setattr(lineage, "code_version", lambda: "0123456789abcdef")
    registered(line.day(1, ""), ACCEPT)
    registered(line.day(2, "1"), against("1"))

    def told(model: str, *words: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["lineage", model, *words])
        return left.value.code, "".join(capsys.readouterr())

    monkeypatch.setenv("MLFLOW_TRACKING_URI", line.uri)
    code, text = told("models:/told@champion", "--json")
    *lines, answer = text.splitlines()
    assert code == 0
    assert [link["version"] for link in json.loads(answer)["chain"]] == ["2", "1"]
    assert json.loads(answer)["chain"][0]["image"] == "ghcr.io/des/des-python:1"
    events = [log.parse_event(printed) for printed in lines]
    assert [(event["version"], event.get("parent_version"), event["git_commit"]) for event in events] == [
        ("2", "1", "0123456789abcdef"),
        ("1", None, "0123456789abcdef"),
    ]
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, text = told("models:/told/2")
    heads, second, oldest, *_ = text.splitlines()
    assert heads.split()[0] == "version"
    assert second.split()[:5] == ["2", "2026-01-02", "2026-01-02", "21:36:00", "accept"]
    assert second.index("candidate, champion") == heads.index("aliases")
    assert oldest.split()[-1] == "none"
    code, text = told("models:/told/7", "-c", str(folder / "shop.toml"), "--set", f"run.dir={folder}/runs/shop")
    assert code == 2
    assert text.startswith("error: models:/told/7 does not exist at sqlite") and len(text.splitlines()) == 1


def test_where_storage_is_a_bucket_the_model_is_found_without_a_driver_for_it(
    folder: Path, first: object, bucket: str
) -> None:
    run = finished_run(folder, "run.name=cloud", f"storage.root={bucket}/shop")
    assert registered(run, ACCEPT) == ("1", ("candidate", "champion"), True)
    found = fetched(run, "unused")
    assert found.folder.startswith(f"{run.config.run.dir}/artifacts/")
    assert sorted(path.name for path in Path(found.folder).iterdir()) == ["checkpoints", "des.json"]
    parent = registry.parent(run.config)
    assert parent is not None and parent.checkpoint.startswith("checkpoints/")
    assert Reference.parse(f"{bucket}/shop/{parent.checkpoint}").read() == {"run_key": run.key}


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
    registration.register(run, REJECT, describe)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "/tmp/mlruns", "mlruns"])
def test_a_plain_folder_is_refused_with_the_fix(uri: str) -> None:
    with pytest.raises(RegistryError, match=r"write it as sqlite:////.*mlruns/mlflow.db"):
        availability.check(uri)


def test_a_database_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is not a database")
    with pytest.raises(RegistryError, match="not an SQLite database"):
        availability.check(f"sqlite:///{tmp_path}/text.db")
    with pytest.raises(RegistryError, match="cannot be written"):
        availability.check(f"sqlite:///{tmp_path}/text.db/mlflow.db")
    availability.check(f"sqlite:///{tmp_path}/new/folder/mlflow.db")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def silent_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port where somebody takes calls and never answers."""
    monkeypatch.setattr(availability, "CONNECT_S", 0.3)
    monkeypatch.setattr(availability, "API_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


OPEN = "import sys; from des_core.release.registry import mlflow_client\nwith mlflow_client.connect(sys.argv[1]): pass"


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    uri = sqlite_address(str(path))
    process = subprocess.Popen([sys.executable, "-c", OPEN, uri], cwd=ROOT)
    while not (found := [one for one in tmp_path.glob("mlflow.db.partial-*") if one.stat().st_size]):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert found and not path.exists(), "nothing half-made has the database's name"
    # As an earlier version of ours, or MLflow itself, was killed among the migrations.
    with contextlib.closing(sqlite3.connect(path)) as database:
        for table in ("experiments", "runs", "alembic_version"):
            database.execute(f"create table {table} (id integer)")
        database.commit()
    with mlflow_client.connect(uri) as client:
        assert client.search_registered_models() == []
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.half-made"]


def test_any_folder_can_hold_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "what? #1 50% ünd & so"
    folder.mkdir()
    run = finished_run(folder)
    ACCEPT.write(run.path("gate.json"))
    registration.register(run, ACCEPT, describe)
    assert list(tmp_path.iterdir()) == [folder], "no other folder is made"
    assert (folder / "runs/shop/mlflow.db").exists() and registry.standing(run).champion == "1"
    found = fetched(run, str(tmp_path / "unused"))
    assert Path(found.folder).is_relative_to(folder)
    (shown,) = re.findall(r"--backend-store-uri (.*)", summary.mlflow_ui(run.config.registry.tracking_uri))
    assert sqlite_path(shlex.split(shown)[0]) == str(folder / "runs/shop/mlflow.db")


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_server_that_is_down_is_named_in_time(scheme: str) -> None:
    uri = f"{scheme}://somebody:secret@127.0.0.1:{closed_port()}/base"
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=r"MLflow at .*127.0.0.1:\d+/base cannot be reached") as caught:
        availability.check(uri)
    assert "secret" not in str(caught.value)
    assert time.monotonic() - start < 15


def test_a_server_that_never_answers_is_named_in_time(silent_port: int) -> None:
    with pytest.raises(UnavailableError, match="cannot be reached"):
        availability.check(f"http://127.0.0.1:{silent_port}")


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[Any]]]:
    """Address of a server that gives these answers in turn, the last one for ever, and the requests it got."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    left, asked = list(answers), []

    class Scripted(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Scripted) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


MLFLOWS_OWN = b'{"error_code": "ENDPOINT_NOT_FOUND", "message": "no such endpoint"}'


@pytest.mark.parametrize(
    ("status", "body", "passes"),
    [
        (200, b"{}", False),
        (401, b"", False),
        (403, b"Invalid Host header", False),
        (404, MLFLOWS_OWN, False),
        (404, b"", True),
        (404, b"default backend - 404", True),
        (429, b"", True),
        (500, b"", True),
        (502, b"<html>Bad Gateway", True),
        (503, b"no endpoints", True),
        (504, b"", True),
    ],
)
def test_an_answer_of_mlflow_is_an_answer_and_a_proxys_is_waited_for(status: int, body: bytes, passes: bool) -> None:
    with answering((status, body)) as (uri, asked):
        if passes:
            with pytest.raises(UnavailableError, match=rf"cannot be reached \(HTTP {status}"):
                availability.check(uri)
        else:
            availability.check(uri)
    assert [path.partition("?")[0] for path, _ in asked] == ["/api/2.0/mlflow/experiments/search"]
    with answering((status, body), (200, b"{}")) as (uri, asked):
        availability.check(uri, wait_s=5.0)
    assert len(asked) == 1 + passes


def test_a_user_and_a_password_in_an_address_are_sent(capfd: pytest.CaptureFixture[str]) -> None:
    with answering((200, b"{}")) as (uri, asked):
        availability.check(uri.replace("://", "://ann:p%40ss@"))
    assert asked[0][1] == "Basic " + base64.b64encode(b"ann:p@ss").decode()


class Link:
    """A way to a server that can be cut."""

    def __init__(self, port: int) -> None:
        self._target, self.open = port, True
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, seconds: float) -> None:
        """Break all connections and refuse new ones for a while."""
        self.open = False
        for one in self._pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        timer = threading.Timer(seconds, lambda: setattr(self, "open", True))
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Break all connections and take no more."""
        self.open = False
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for one in self._pairs:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._target))
            self._pairs += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for end in (one, other):
            end.close()


def test_a_registry_that_goes_away_while_registering_is_waited_for(
    tmp_path: Path, postgres: str, capfd: pytest.CaptureFixture[str]
) -> None:
    port = int(postgres.rpartition(":")[2].partition("/")[0])
    link = Link(port)
    uri = postgres.replace(f":{port}/", f":{link.port}/")
    line = Line(tmp_path, ("run.name=patient", "registry.wait_s=60", f"registry.tracking_uri={uri}"))
    run = line.whole()
    ACCEPT.write(run.path("gate.json"))
    cuts = [2.0]

    def cut(run: Run, folder: str) -> pa.Table:
        if cuts:
            link.cut(cuts.pop())
        return describe(run, folder)

    reference, adopted = registration.register(run, ACCEPT, cut)
    assert not adopted and not cuts
    assert registration.Registered.load(reference).version == "1"
    assert "event=waiting" in capfd.readouterr().err
    with mlflow_client.connect(uri) as client:
        (version,) = client.search_model_versions("name='patient'")
        experiment = client.get_experiment_by_name("patient")
        (kept,) = client.search_runs([experiment.experiment_id])
        assert version.run_id == kept.info.run_id, "a half-made run does not stay"
    # Not in the time that it was given.
    (tmp_path / "late").mkdir()
    late = Line(tmp_path / "late", ("run.name=hasty", "registry.wait_s=1", f"registry.tracking_uri={uri}"))
    link.cut(60.0)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        registration.register(late.whole(), ACCEPT, describe)
    link.close()


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
    monkeypatch.setenv("DES_REVISION", "0123abc")
    assert lineage.code_version() == "0123abc"
    monkeypatch.delenv("DES_REVISION")
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


def test_a_version_whose_files_cannot_be_checked_is_refused(line: Line) -> None:
    run = line.whole()
    registered(run, ACCEPT)
    name = run.config.run.name
    with mlflow_client.connect(line.uri) as client:
        client.delete_model_version_tag(name, "1", "des.model_digest")
    with pytest.raises(RegistryError, match=rf"models:/{name}/1 has no tag des.model_digest, by which its files are"):
        registry.fetch(f"models:/{name}/1", line.uri, "unused")


def test_a_run_that_is_judged_again_keeps_its_version(line: Line) -> None:
    """An older candidate that is accepted by other bounds becomes champion only if nothing stands in between."""
    first, second, third = line.day(1, ""), line.day(2, "1"), line.day(3, "1")
    registered(first, ACCEPT)
    assert registered(second, against("1", REJECT)) == ("2", ("candidate",), False)
    assert registered(third, against("1", REJECT)) == ("3", ("candidate",), False)
    assert registered(second, against("1"), refuse) == ("2", ("champion",), True)
    assert registry.standing(third) == ("2", "3", ("candidate",)), "the latest stays candidate"
    assert registered(third, against("1"), refuse) == ("3", ("candidate",), False), "another champion stands now"
    found = registry.recorded(second)
    assert found is not None and found.gate == against("1").written_sha256
    assert registry.recorded(line.day(4, "2")) is None


FULL = """
import resource, sys
from pathlib import Path
from des_core.errors import DesError
from des_core.release.registry import registration
from tests.finished import finished_run
from tests.release.test_registry import ACCEPT, describe
run = finished_run(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    registration.register(run, ACCEPT, describe)
except DesError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_a_locked_database_is_known_by_sqlites_code_whatever_wraps_it(tmp_path: Path) -> None:
    from mlflow.exceptions import MlflowException
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import OperationalError

    uri = sqlite_address(str(tmp_path / "x.db"))
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as other:
        other.execute("create table t (a)")
        other.execute("begin exclusive")
        engine = create_engine(uri, connect_args={"timeout": 0})
        with pytest.raises(OperationalError) as caught, engine.connect() as connection:
            connection.execute(text("insert into t values (1)"))
        engine.dispose()
    # As MLflow's session raises it, with a text of its own.
    wrapped = MlflowException("something failed")  # type: ignore[no-untyped-call]
    wrapped.__cause__ = caught.value
    assert mlflow_client._passes(uri, caught.value) and mlflow_client._passes(uri, wrapped)
    assert not mlflow_client._passes(uri, MlflowException("database is locked, says a user's text"))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("size", [50_000, 500_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_made(tmp_path: Path, size: int) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), str(size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(
        r"StorageError: sqlite:.*: the disk is full or at fault; make room and start it again\n", done.stderr
    )
    assert not list((tmp_path / "runs/shop").glob("mlflow.db*"))
