"""A replica: live before there is a champion, swaps without a failed request, keeps what works, names what is wrong."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import handmade
from des_core import storage
from des_core.data.feed.batches import ids_of
from des_core.data.read.forms import in_form
from des_core.data.read.hashing import hash_values
from des_core.engine.models import build
from des_core.errors import DataError
from des_core.log import parse_event
from des_core.release.registry import mlflow_client, registration, registry
from des_core.release.serve import payload, server, serving
from des_core.run import Run
from tests.finished import config_of, dataset_of, finished_run
from tests.release.test_registry import ACCEPT

ROOT = Path(__file__).parent.parent.parent
CHAMPION = "models:/shop@champion"
RECORDS = pa.table({"user": ["ann", "zed"], "tags": ["a|b", ""], "price": ["3", "7.5"]})
KNOWN = {"user": ["ann", "bob"], "tags": ["a", "b"]}
SECRET = "s3cr3t-value"


def model_of(folder: str, run: Run, seed: int) -> str:
    """A model with rows for ann, bob and the tags a and b, written by hand."""
    random = np.random.default_rng(seed)
    ids = {name: ids_of(hash_values(pa.array(texts)), name) for name, texts in KNOWN.items()}
    fields = dataset_of(run.config).fields
    model = build(run.config.model, [field.name for field in fields], 0, seed)
    rows = {name: random.normal(0, 0.5, (len(ids[name]), model.row_width)).astype(np.float32) for name in ids}
    checkpoint = handmade.checkpoint(folder, "by-hand", 1, fields, ids, rows, model)
    handmade.describe(folder, run.key, run.config, fields, checkpoint)
    return folder


def described(run: Run, folder: str) -> pa.Table:
    """The first of these models, as registration takes it."""
    model_of(folder, run, 1)
    return RECORDS


class Shop:
    """A registry with versions 1 and 2 that serve, and 3 that does not; which one is champion is up to the tests."""

    def __init__(self, folder: Path) -> None:
        run = finished_run(folder)
        self.uri = run.config.registry.tracking_uri
        registration.register(run, ACCEPT, described)
        first = Path(registry.fetch("models:/shop/1", self.uri, "").folder)
        self.folders = {"1": first}
        with mlflow_client.connect(self.uri) as client:
            self._client = client
            for number in ("2", "3"):
                shutil.copytree(first.parent.parent, folder / number)
                inside = folder / number / first.relative_to(first.parent.parent)
                model_of(str(inside), run, int(number))
                if number == "3":
                    (weights,) = inside.rglob("weights-*.arrow")
                    weights.write_bytes(b"not what the digest says")
                digest = storage.digest_file(str(inside / "des.json"))
                client.create_model_version("shop", str(folder / number), tags={"des.model_digest": digest})
                self.folders[number] = inside
        self.crown("")

    def crown(self, version: str) -> None:
        """Point the alias at a version, or at none."""
        if version:
            self._client.set_registered_model_alias("shop", "champion", version)
        else:
            self._client.delete_registered_model_alias("shop", "champion")

    def scores(self, version: str) -> list[float]:
        """What a version says to RECORDS."""
        return list(serving.Scorer(str(self.folders[version])).score(RECORDS))


class Client:
    """One connection to a replica."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get(self, path: str) -> tuple[int, str]:
        self._connection.request("GET", path)
        answer = self._connection.getresponse()
        return answer.status, answer.read().decode()

    def post(self, body: bytes, kind: str | None = "application/json", **headers: str) -> tuple[int, Any, str]:
        """Status, parsed body and who answered."""
        self._connection.request(
            "POST", "/invocations", body, headers | ({} if kind is None else {"content-type": kind})
        )
        answer = self._connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.getheader(server.VERSION_HEADER, "")

    def score(self, form: str, data: Any) -> tuple[int, Any, str]:
        return self.post(json.dumps({form: data}).encode())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


class Process:
    """``des serve`` in a process of its own."""

    def __init__(self, log: Path, uri: str, *words: str) -> None:
        command = [sys.executable, "-c", "from pipelines.cli import main; main()", "serve", "--model", CHAMPION]
        self._log = log
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [*command, "--port", "0", "--poll-s", "0.1", "--max-body-mb", "1", *words],
                env=os.environ | {"MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=file,
            )
        self.port = int(self.wait_for("listening")["port"])

    def events(self, name: str) -> list[dict[str, str]]:
        """The log's lines of one kind."""
        found = map(parse_event, self._log.read_text().splitlines())
        return [event for event in found if event.get("event") == name]

    def wait_for(self, name: str, **wanted: str) -> dict[str, str]:
        """The first event of a kind, with these values."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for event in self.events(name):
                if event.items() >= wanted.items():
                    return event
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.02)
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"no {name} in {self._log.read_text()}")


@pytest.fixture(scope="module")
def bare(shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A replica that began without a champion."""
    process = Process(tmp_path_factory.mktemp("server") / "log", shop.uri)
    yield process
    process.process.kill()
    process.process.wait()


def test_without_a_champion_it_lives_and_says_what_it_waits_for(bare: Process, shop: Shop) -> None:
    event = bare.wait_for("no_version")
    assert event["serving"] == "nothing"
    with Client(bare.port) as client:
        status, text = client.get("/ready")
        assert (status, json.loads(text)["reason"]) == (503, event["reason"])
        assert f"{CHAMPION} does not exist yet" in text
        assert client.get("/ping")[0] == client.get("/health")[0] == 200
        status, answer, version = client.score("dataframe_records", [{"user": "ann"}])
        assert (status, answer["error_code"], version) == (503, "TEMPORARILY_UNAVAILABLE", "")
        assert "des_ready 0.0\n" in client.get("/metrics")[1]
    time.sleep(0.5)
    assert len(bare.events("no_version")) == 1, "said once, however often it looks"


@pytest.fixture(scope="module")
def replica(bare: Process, shop: Shop) -> Process:
    """The same replica once version 1 is champion."""
    shop.crown("1")
    bare.wait_for("serving", version="1")
    return bare


@pytest.fixture
def client(replica: Process) -> Iterator[Client]:
    with Client(replica.port) as client:
        yield client


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (
            "dataframe_split",
            {"columns": ["x", *RECORDS.column_names], "data": [[0, "ann", "a|b", 3], [0, "zed", "", "7.5"]]},
        ),
        (
            "dataframe_records",
            [{"user": "ann", "tags": ["a", "b"], "price": 3}, {"user": "zed", "price": 7.5, "x": {}}],
        ),
        ("instances", [{"user": "ann", "tags": ["b", "a"], "price": "3.0"}, {"user": "zed", "tags": [], "price": 7.5}]),
        ("inputs", {"user": ["ann", "zed"], "tags": ["a|b", None], "price": [3, "7.5"]}),
        ("inputs", [{"user": "ann", "tags": "a|b", "price": 3}, {"user": "zed", "tags": None, "price": 7.5}]),
    ],
)
def test_every_form_of_mlflows_protocol_scores_alike(client: Client, shop: Shop, form: str, data: Any) -> None:
    status, answer, version = client.score(form, data)
    assert (status, version) == (200, "1"), answer
    np.testing.assert_allclose(answer["predictions"], shop.scores("1"), rtol=0, atol=1e-6)


def test_csv_and_one_record_and_none(client: Client, shop: Shop) -> None:
    text = b'tags,user,z,price\na|b,ann,"x\ny",3\n,zed,,7.5\n'
    status, answer, _ = client.post(text, "text/csv; charset=UTF-8")
    assert status == 200
    np.testing.assert_allclose(answer["predictions"], shop.scores("1"), rtol=0, atol=1e-6)
    status, answer, _ = client.score("inputs", {"user": "ann", "tags": "a|b", "price": 3})
    assert answer["predictions"] == pytest.approx(shop.scores("1")[:1], abs=1e-6)
    assert client.score("dataframe_records", [])[:2] == (200, {"predictions": []})


def test_absent_values_are_missing_ones(client: Client) -> None:
    whole = {"user": None, "tags": None, "price": None}
    forms = [
        json.dumps({"dataframe_records": [whole, whole]}),
        '{"dataframe_records": [{"user": NaN, "tags": NaN, "price": NaN}, {"user": "", "tags": "", "price": "NA"}]}',
        json.dumps({"dataframe_records": [whole, {}]}),
    ]
    answers = [client.post(form.encode()) for form in forms]
    assert {status for status, _, _ in answers} == {200}
    assert len({str(answer) for _, answer, _ in answers}) == 1


def record(**changed: Any) -> bytes:
    return json.dumps({"dataframe_records": [{"user": "ann", "tags": "a", "price": 1} | changed]}).encode()


@pytest.mark.parametrize(
    ("body", "kind", "status", "named"),
    [
        (record(price=SECRET), "application/json", 400, "record 1: column price: the value is not a number"),
        (record(price="1e99"), "application/json", 400, "column price"),
        (record(price=[SECRET]), "application/json", 400, "field price"),
        (record(user=[SECRET]), "application/json", 400, "field user"),
        (record(user={"a": SECRET}), "application/json", 400, "field user"),
        (record(tags=[{SECRET: 1}, 2]), "application/json", 400, "tags"),
        (record(user="\ud800" + SECRET), "application/json", 400, "'user' holds text that is not valid Unicode"),
        (b'{"dataframe_records": [{"user": "%s"}]}' % SECRET.encode(), "application/json", 400, "field tags: .*'tags'"),
        (
            b'{"dataframe_split": {"columns": ["user"], "data": [["s3cr3t-value", 1]]}}',
            "application/json",
            400,
            "record 1",
        ),
        (b'{"dataframe_split": {"columns": ["user", "user"], "data": [[1, 2]]}}', "application/json", 400, "'user'"),
        (b'{"inputs": {"user": ["s3cr3t-value"], "tags": [1, 2], "price": 1}}', "application/json", 400, "column"),
        (b'{"instances": ["s3cr3t-value"]}', "application/json", 400, "instances: write it as"),
        (b'{"rows": ["s3cr3t-value"]}', "application/json", 400, "one of dataframe_split, dataframe_records, "),
        (b'["s3cr3t-value"]', "application/json", 400, "JSON object"),
        (b'{"instances": s3cr3t-value}', "application/json", 400, "not JSON: Expecting value at byte 14"),
        (b'{"instances": "\xff"}', "application/json", 400, "UTF-8"),
        (b"[" * 100_000, "application/json", 400, "nested too deeply"),
        (b"", "application/json", 400, "the body is empty"),
        (b" \n", "text/csv", 400, "the body is empty"),
        (b"user,tags,price\ns3cr3t-value\n", "text/csv", 400, "as many values in every line"),
        (b"user,tags,price\nann,a,s3cr3t-value\n", "text/csv", 400, "column price"),
        (record(), "text/plain", 415, "application/json or text/csv"),
        (record(), None, 415, "application/json or text/csv"),
        (record(), "application/json; charset=latin-1", 415, "UTF-8"),
        (record(user="x" * (1 << 20)), "application/json", 413, "larger than 1 MiB"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong_and_none_of_its_values(
    client: Client, body: bytes, kind: str | None, status: int, named: str
) -> None:
    found, answer, version = client.post(body, kind)
    assert found == status, answer
    assert set(answer) == {"error_code", "message"}
    with pytest.raises(DataError, match=named):
        raise DataError(answer["message"])
    assert SECRET not in str(answer)
    assert version == ("1" if status == 400 else "")


def test_a_large_body_in_pieces_is_refused_too(client: Client) -> None:
    client._connection.request(
        "POST", "/invocations", iter([b"x" * 700_000] * 2), {"content-type": "text/csv"}, encode_chunked=True
    )
    assert client._connection.getresponse().status == 413


def test_metrics_count_requests_values_and_scores(client: Client) -> None:
    def numbers() -> dict[str, float]:
        lines = [line for line in client.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = numbers()
    client.score("inputs", {"user": ["ann", "zed"], "tags": ["a|b", "a|c|d"], "price": [1, 2]})
    client.post(b"")
    grown = {key: value - before.get(key, 0) for key, value in numbers().items() if value != before.get(key, 0)}
    assert grown['des_requests_total{code="200"}'] == grown['des_requests_total{code="400"}'] == 1
    assert grown["des_request_seconds_count"] == 2
    assert grown['des_request_seconds_bucket{le="+Inf"}'] == 2
    # price is known to no version: there is no row for numbers.
    assert grown['des_values_total{field="tags",version="1"}'] == 5
    assert grown['des_unknown_values_total{field="tags",version="1"}'] == 2
    assert grown['des_unknown_values_total{field="user",version="1"}'] == 1
    assert grown['des_score_count{version="1"}'] == 2
    assert numbers()['des_model_info{model="shop",version="1"}'] == 1
    assert numbers()["des_ready"] == numbers()["des_registry_up"] == 1


def test_mlflow_answers_what_is_its_own(client: Client) -> None:
    import mlflow

    assert client.get("/ping") == client.get("/health") == (200, "\n")
    assert client.get("/version") == (200, mlflow.__version__)
    assert client.get("/nothing")[0] == 404


def test_a_version_that_cannot_be_served_leaves_the_old_one(replica: Process, client: Client, shop: Shop) -> None:
    shop.crown("3")
    event = replica.wait_for("version_failed")
    assert "weights-00000-000.arrow: the weights of table user, prefixes " in event["reason"]
    assert event["serving"] == "version 1"
    assert client.post(record())[0::2] == (200, "1")
    assert client.get("/ready")[0] == 200
    text = client.get("/metrics")[1]
    assert 'des_version_failed{version="3"} 1' in text
    time.sleep(0.5)
    assert len(replica.events("version_failed")) == 1, "said once, however often it tries"
    shop.crown("1")
    deadline = time.monotonic() + 10
    while 'des_version_failed{version="3"}' in client.get("/metrics")[1]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    replica.wait_for("version_failed_over")


def test_no_request_fails_while_the_alias_moves(replica: Process, shop: Shop) -> None:
    expected = {version: shop.scores(version) for version in ("1", "2")}
    assert abs(expected["1"][0] - expected["2"][0]) > 1e-3
    answers: list[list[tuple[int, str]]] = [[], [], [], []]
    stop = threading.Event()

    def load(mine: list[tuple[int, str]]) -> None:
        body = json.dumps({"inputs": RECORDS.to_pydict()}).encode()
        with Client(replica.port) as client:
            while not stop.is_set():
                status, answer, version = client.post(body)
                right = status == 200 and np.allclose(answer["predictions"], expected[version], rtol=0, atol=1e-6)
                mine.append((status if right else -status, version))

    threads = [threading.Thread(target=load, args=(mine,)) for mine in answers]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    for version in ("2", "1", "2"):
        shop.crown(version)
        time.sleep(1.0)
    stop.set()
    for thread in threads:
        thread.join()
    for mine in answers:
        assert {status for status, _ in mine} == {200}, "each answer is its version's own"
        versions = [version for _, version in mine]
        changes = [
            versions[0],
            *(after for before, after in zip(versions, versions[1:], strict=False) if before != after),
        ]
        assert changes == ["1", "2", "1", "2"]


def test_a_model_stays_when_its_alias_or_its_registry_goes(shop: Shop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.crown("1")
    replica = server.Replica(CHAMPION, shop.uri)
    replica.look()
    loaded = replica.current
    assert loaded is not None and loaded.version == "1"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    for uri in (closed, f"{shop.uri}.none"):
        replica.tracking_uri = uri
        replica.look()
        replica.look()
        assert replica.current is loaded
    replica.tracking_uri = shop.uri
    replica.look()
    said = [parse_event(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in said] == [
        "serving",
        "registry_trouble",
        "registry_trouble_over",
        "no_version",
        "no_version_over",
    ]
    assert "cannot be reached" in said[1]["reason"] and said[1]["serving"] == "version 1"


def test_without_a_registry_at_the_start_it_lives_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    replica = server.Replica(CHAMPION, closed)
    replica.look()
    assert replica.current is None and "cannot be reached" in replica.reason
    assert not replica.monitor.registry_up
    assert capsys.readouterr().err.count("\n") == 1


def test_sigterm_finishes_what_is_in_flight_and_leaves_with_0(replica: Process) -> None:
    body = record()
    connection = socket.create_connection(("127.0.0.1", replica.port))
    lines = ("POST /invocations HTTP/1.1", "host: a", "content-type: application/json", f"content-length: {len(body)}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[:5])
    time.sleep(0.2)
    replica.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", replica.port)).close()
    connection.sendall(body[5:])
    assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    connection.close()
    assert replica.process.wait(20) == 0
    assert replica.events("stopped")


def values(kind: type[Any], name: str, found: pa.Table) -> list[Any]:
    column = found.column(name).to_pylist()
    assert all(value is None or isinstance(value, kind) for value in column)
    return column


def test_values_of_several_types_are_texts_as_a_log_would_have_them() -> None:
    mixed = [1, 1.0, "1", True, None, float("nan"), 2**70, 0.1]
    body = json.dumps({"inputs": {"a": mixed, "b": [[1, "x"], None, *[["y"]] * 6], "c": [2**63] * 8}}).encode()
    found = payload.read(body, "application/json", ["a", "b", "c"])
    assert values(str, "a", found) == ["1", "1.0", "1", "true", None, None, str(2**70), "0.1"]
    assert values(list, "b", found)[:3] == [["1", "x"], None, ["y"]]
    keys = hash_values(in_form(found.column("a").combine_chunks(), "number"))
    assert len(set(keys[:3])) == 1 and keys[7] == hash_values(pa.array([0.1]))[0]
    assert hash_values(found.column("c"))[0] == hash_values(pa.array([str(2**63)]))[0]


def test_a_wrong_start_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from pipelines import cli

    def refused(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            cli.main(["serve", *words])
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "give the run's config with -c FILE or set MLFLOW_TRACKING_URI" in refused("--model", CHAMPION)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "write a model as models:/NAME@ALIAS" in refused("--model", "shop")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: Address already in use" in refused("--model", CHAMPION, "--port", port)
    config_of(tmp_path)
    assert "--set changes a config" in refused("--model", CHAMPION, "--set", "run.seed=2")
    signal.signal(signal.SIGTERM, before)
