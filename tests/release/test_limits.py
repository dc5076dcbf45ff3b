"""What one client can take from a replica: bounded bodies, headers in time, requests and connections in number."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
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
import uvicorn

from benchmarks import handmade
from des_core import storage
from des_core.data.feed.batches import ids_of
from des_core.data.read.hashing import hash_values, splitmix64
from des_core.engine.models import build
from des_core.engine.weights import index
from des_core.errors import CheckpointError, DataError, StorageError
from des_core.release.registry import registration
from des_core.release.serve import cache, payload, server, serving
from des_core.release.serve.limits import Limits, limits_of
from tests.finished import dataset_of, finished_run
from tests.release.test_registry import ACCEPT
from tests.release.test_server import KNOWN, RECORDS, Client, described, model_of, record

ROOT = Path(__file__).parent.parent.parent
LIMITS = Limits(body=1 << 16, bodies=1 << 17, requests=3, connections=8, header_s=0.5, body_s=0.7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("limits")
    return model_of(str(folder / "model"), finished_run(folder), 1)


@contextlib.contextmanager
def listening(model: str, scratch: Path, limits: Limits = LIMITS) -> Iterator[tuple[int, server.Replica]]:
    """A replica with a model, served from a thread."""
    replica = server.Replica("models:/shop@champion", "sqlite:////none/mlflow.db")
    replica.current = server.Loaded("1", model, str(scratch / "scratch"))
    address = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(server.config_of(replica, 1, limits))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [address]}, daemon=True)
    thread.start()
    try:
        yield address.getsockname()[1], replica
    finally:
        running.should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def replica(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, server.Replica]]:
    with listening(model, tmp_path_factory.mktemp("scratch")) as found:
        yield found


def connect(port: int, *lines: str, body: bytes = b"", end: bool = True) -> socket.socket:
    """A connection on which the head of a request was sent, whole or not."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = "\r\n".join(["POST /invocations HTTP/1.1", "host: a", "content-type: application/json", *lines])
    connection.sendall(head.encode() + b"\r\n\r\n" * end + body)
    return connection


def answered(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            data += piece
    connection.close()
    return data


def still_serves(port: int) -> None:
    with Client(port) as client:
        status, answer, _ = client.post(record())
        assert (status, len(answer["predictions"])) == (200, 1)


def test_headers_that_do_not_come_in_time_close_the_connection(replica: tuple[int, server.Replica]) -> None:
    port, _ = replica
    started = time.monotonic()
    silent = socket.create_connection(("127.0.0.1", port), timeout=10)
    slow = connect(port, end=False)
    for _ in range(4):
        time.sleep(0.1)
        slow.sendall(b"x")
    assert answered(slow).startswith(b"HTTP/1.1 408")
    assert answered(silent).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < 5
    body = record()
    kept = connect(port, f"content-length: {len(body)}", body=body)
    assert kept.recv(1 << 16).startswith(b"HTTP/1.1 200")
    kept.sendall(b"POST /inv")
    assert b"HTTP/1.1 408" in answered(kept), "a second request on the same connection too"
    still_serves(port)


def test_a_connection_that_waits_between_requests_stays(replica: tuple[int, server.Replica]) -> None:
    port, _ = replica
    with Client(port) as client:
        assert client.post(record())[0] == 200
        time.sleep(2 * LIMITS.header_s)
        assert client.post(record())[0] == 200


def test_a_body_that_does_not_come_in_time_is_let_go(replica: tuple[int, server.Replica]) -> None:
    port, served = replica
    connections = [connect(port, "content-length: 40000", body=b"x" * 30_000) for _ in range(2)]
    deadline = time.monotonic() + 5
    while served.monitor.load is None or served.monitor.load.bytes < 60_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for connection in connections:
        assert b"HTTP/1.1 408" in answered(connection)
    assert (served.monitor.load.bytes, served.monitor.load.requests) == (0, 0)
    still_serves(port)


def test_all_bodies_together_are_bounded(replica: tuple[int, server.Replica]) -> None:
    port, served = replica
    held = [connect(port, "content-length: 65536", body=b"x" * 65_000) for _ in range(2)]
    time.sleep(0.1)
    more = connect(port, "content-length: 60000", body=b"x" * 5_000)
    text = b""
    while b"too large together" not in text:
        text += more.recv(1 << 16)
    more.close()
    assert text.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in text
    for connection in held:
        connection.close()
    time.sleep(0.2)
    assert served.monitor.load is not None and served.monitor.load.bytes == 0, "clients that went hold nothing"
    still_serves(port)


def test_requests_beyond_the_limit_are_told_to_come_again(replica: tuple[int, server.Replica]) -> None:
    port, _ = replica
    held = [connect(port, "content-length: 10", body=b"x") for _ in range(LIMITS.requests)]
    time.sleep(0.1)
    with Client(port) as client:
        status, answer, _ = client.post(record())
        assert (status, answer["error_code"]) == (503, "TEMPORARILY_UNAVAILABLE")
        assert "3 requests are in hand" in answer["message"]
    for connection in held:
        connection.close()
    time.sleep(0.2)
    still_serves(port)


def test_connections_beyond_the_limit_are_refused_without_a_line_each(
    replica: tuple[int, server.Replica], capfd: pytest.CaptureFixture[str]
) -> None:
    port, served = replica
    connections = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(LIMITS.connections + 20)]
    refused = [answered(connection) for connection in connections[LIMITS.connections :]]
    assert all(text.startswith(b"HTTP/1.1 503") for text in refused)
    assert served.monitor.load is not None and served.monitor.load.refused_connections >= 20
    for connection in connections[: LIMITS.connections]:
        connection.sendall(b"\x00 this is no HTTP\r\n\r\n")
        connection.close()
    time.sleep(0.3)
    still_serves(port)
    assert capfd.readouterr().err == ""
    with Client(port) as client:
        text = client.get("/metrics")[1]
    assert "des_requests_in_flight 0.0\n" in text and "des_body_bytes 0.0\n" in text


def test_more_values_than_are_read_at_once_are_refused_before_any_is(replica: tuple[int, server.Replica]) -> None:
    for body, kind in (
        (b'{"inputs": {"user": [' + b"1," * (payload.MAX_VALUES + 1) + b"1]}}", "application/json"),
        (b"user\n" + b"1\n" * (payload.MAX_VALUES + 1), "text/csv"),
    ):
        with pytest.raises(payload.TooManyError, match="more than 1,000,000 values; send fewer records at once"):
            payload.read(body, kind, ["user"])
    assert server.CODES[413] == "REQUEST_LIMIT_EXCEEDED"


MEMORY = """
import resource, sys
from des_core.release.serve import server
loaded = server.Loaded("1", sys.argv[1], sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
body = b'{"dataframe_records": [' + b",".join([b'{"user":"%07d","x":1}' % n for n in range(490_000)]) + b"]}"
assert 10 << 20 < len(body) < 16 << 20
try:
    loaded.score(body, "application/json")
except server.DataError as error:
    assert "no column" in str(error), error
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_the_largest_body_takes_no_more_than_some_hundred_megabytes(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, model, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 350


def crafted(number: int, bits: int) -> np.ndarray[Any, Any]:
    """Distinct ids whose lowest bits are the same."""
    return (np.arange(number, dtype=np.int64) << bits) | 5


def test_ids_that_all_want_one_seat_cost_no_more_than_others() -> None:
    """Without a secret 40,000 of them take a quarter of a second; with one, what any ids take."""
    ids, others = crafted(40_000, 20), np.random.default_rng(0).integers(0, 1 << 62, 40_000)
    secret = np.uint64(0x1234567890ABCDEF)
    index.dedupe(ids[:10], secret)

    def seconds(values: Any) -> float:
        started = time.perf_counter()
        for _ in range(5):
            index.dedupe(values, secret)
        return time.perf_counter() - started

    assert seconds(ids) < 10 * seconds(others) + 0.01
    for one, two in zip(index.dedupe(ids), index.dedupe(ids, secret), strict=True):
        np.testing.assert_array_equal(one, two)


def test_every_process_has_a_secret_of_its_own(model: str) -> None:
    assert serving.Scorer(model)._secret != serving.Scorer(model)._secret
    assert splitmix64(np.uint64(1)) != 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([["a"], "user"], "columns: every name must be text"),
        ([{"a": 1}, "user"], "columns: every name must be text"),
        ([None, "user"], "columns: every name must be text"),
    ],
)
def test_names_of_columns_are_text(columns: list[Any], message: str) -> None:
    body = json.dumps({"dataframe_split": {"columns": columns, "data": [[1, 2]]}}).encode()
    with pytest.raises(DataError, match=message):
        payload.read(body, "application/json", ["user"])


def test_a_header_that_names_a_column_twice_is_refused() -> None:
    with pytest.raises(DataError, match="two columns are named 'user'"):
        payload.read(b"user,user\n1,2\n", "text/csv", ["user"])
    assert payload.read(b"x,user,x\n1,2,3\n", "text/csv", ["user"]).to_pydict() == {"user": ["2"]}


def test_no_key_of_an_object_is_repeated(model: str, tmp_path: Path) -> None:
    loaded = server.Loaded("1", model, str(tmp_path))
    for field in ("user", "tags", "price"):
        with pytest.raises(DataError) as caught:
            loaded.score(record(**{field: {"hidden": {"hidden": 1}}}), "application/json")
        assert "hidden" not in str(caught.value) and field in str(caught.value)


def test_limits_follow_the_machine() -> None:
    found = limits_of(4, 1 << 20)
    assert found.requests == 128 and found.bodies == 4 << 20
    assert found.connections <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100


def test_a_replica_reads_a_copy_of_what_the_registry_holds(tmp_path: Path) -> None:
    """Whoever truncates files of the artifact store takes nothing from who has mapped a small model."""
    run = finished_run(tmp_path)
    uri = run.config.registry.tracking_uri
    registration.register(run, ACCEPT, described)
    replica = server.Replica("models:/shop@champion", uri)
    replica.look()
    loaded = replica.current
    assert loaded is not None
    expected = loaded.score(record(), "application/json").scores_B
    found = [*tmp_path.rglob("weights-*.arrow")]
    assert found
    for path in found:
        path.write_bytes(b"")
    np.testing.assert_array_equal(loaded.score(record(), "application/json").scores_B, expected)


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DES_CACHE", str(folder))
    monkeypatch.setenv("DES_CACHE_BYTES", "2500")
    return folder


def test_copies_are_bounded_and_the_one_used_longest_ago_goes(copies: Path, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.arrow").write_bytes(bytes([number]) * 1000)

    def fetch(number: int) -> None:
        cache.make_room({f"part/{number}.arrow": 1000})
        with cache.fetch(str(tmp_path / f"{number}.arrow"), f"part/{number}.arrow") as file:
            assert file.read() == bytes([number]) * 1000

    for number in range(2):
        fetch(number)
        os.utime(copies / "part" / f"{number}.arrow", (number, number))
    fetch(0)
    (copies / "part" / "abc.partial-99999999").write_bytes(b"x" * 9000)
    fetch(2)
    assert {path.name for path in copies.rglob("*.arrow")} == {"0.arrow", "2.arrow"}
    assert not list(copies.rglob("*.partial-*"))
    (tmp_path / "0.arrow").unlink()
    fetch(0)
    cache.make_room({"part/0.arrow": 1000, "part/2.arrow": 1000, "other/monster.arrow": 9000})
    assert len(list(copies.rglob("*.arrow"))) == 2, "none that is wanted goes"
    cache.make_room({"other/monster.arrow": 9000})
    assert not list(copies.iterdir()), "one that is larger than the limit is alone"
    with pytest.raises(FileNotFoundError):
        cache.fetch(str(tmp_path / "0.arrow"), "part/0.arrow")


def in_bucket(bucket: str, folder: Path) -> tuple[str, str, list[float]]:
    """A model whose weights lie in a bucket and no longer here, the address of a file, and its scores."""
    model_of(str(folder / "model"), finished_run(folder), 1)
    (weights,) = (folder / "model").rglob("weights-*.arrow")
    (root,) = {path.parents[1] for path in (folder / "model").rglob("manifest.json")}
    expected = list(serving.Scorer(str(folder / "model")).score(RECORDS))
    uri = f"{bucket}/{folder.name}"
    for path in root.rglob("*.*"):
        storage.write_bytes(f"{uri}/{path.relative_to(folder / 'model')}", path.read_bytes())
    address = f"{uri}/{weights.relative_to(folder / 'model')}"
    shutil.rmtree(folder / "model" / "checkpoints")
    return uri, address, expected


def test_weights_in_a_bucket_are_fetched_once_and_a_fault_is_mended_or_named(
    copies: Path, tmp_path: Path, bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    uri, address, expected = in_bucket(bucket, tmp_path)

    def scores() -> list[float]:
        return list(serving.Scorer(str(tmp_path / "model"), uri).score(RECORDS))

    assert scores() == expected
    whole = storage.read_bytes(address)
    storage.delete(address)
    assert scores() == expected, "from the copy"
    (copy,) = copies.rglob("weights-*.arrow")
    assert copy.read_bytes() == whole
    # A file that is mapped is not changed in its place.
    copy.unlink()
    copy.write_bytes(whole[:100] + bytes(len(whole) - 100))
    with pytest.raises(CheckpointError, match=r"weights-00000-000\.arrow is missing, with the weights of table"):
        scores()
    copy.write_bytes(bytes(len(whole)))
    storage.write_bytes(address, whole)
    assert scores() == expected
    assert "event=damaged copy=" in capfd.readouterr().err
    copy.unlink()
    storage.write_bytes(address, whole[:100] + bytes(len(whole) - 100))
    with pytest.raises(CheckpointError, match=r"s3://.*weights-00000-000\.arrow: the weights of table \w+, prefixes"):
        scores()
    assert not list(copies.rglob("*.arrow"))


def test_a_new_version_fetches_and_verifies_its_delta_alone(copies: Path, tmp_path: Path, bucket: str) -> None:
    run = finished_run(tmp_path)
    fields = dataset_of(run.config).fields
    model = build(run.config.model, [field.name for field in fields], 0, 1)
    ids = {name: ids_of(hash_values(pa.array(texts)), name) for name, texts in KNOWN.items()}
    rows = {name: np.full((len(found), model.row_width), 0.1, np.float32) for name, found in ids.items()}
    whole = handmade.checkpoint(f"{bucket}/two", "by-hand", 1, fields, ids, rows, model)
    changed, gone = {"user": ids["user"][:1]}, {"tags": ids["tags"][1:]}
    delta = handmade.checkpoint(
        f"{bucket}/two", "by-hand", 2, fields, changed, {"user": 3 * rows["user"][:1]}, model, whole, gone
    )
    for name, reference in (("1", whole), ("2", delta)):
        handmade.describe(str(tmp_path / name), run.key, run.config, fields, reference)
    first = serving.Scorer(str(tmp_path / "1"))
    storage.delete(f"{whole.uri.rpartition('/')[0]}/weights-00000-000.arrow")
    second = serving.Scorer(str(tmp_path / "2"))
    assert second.score(RECORDS).tolist() != first.score(RECORDS).tolist()
    assert second.verified_bytes == second.rows.size
    shutil.rmtree(copies)
    beside = serving.Scorer(str(tmp_path / "2"), beside=first)
    assert 0 < beside.verified_bytes == second.rows.size - first.rows.size
    assert beside.score(RECORDS).tolist() == second.score(RECORDS).tolist()
    with pytest.raises(CheckpointError, match=r"step-0000000001/weights-00000-000\.arrow is missing"):
        serving.Scorer(str(tmp_path / "2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"model": {"hidden": [10**9], "name": "deepfm"}}}, r"dense\.safetensors does not fit des\.json"),
        ({"config": {"model": {"factors": 1024}}}, r"rows are \[\(17, 'float32'\)\] and the model's have 1025 numbers"),
        ({"checkpoint": "checkpoints/x#sha256:" + "0" * 64}, r"the model's checkpoint is missing"),
        ({"checkpoint": "checkpoints/x"}, r"'checkpoints/x' is not a reference"),
        ({"task": "else"}, r"des\.json is not a Description of this version \(task: "),
    ],
)
def test_sizes_in_a_description_are_compared_with_the_files_before_memory_is_taken(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    model_of(str(folder), finished_run(tmp_path), 1)
    path = folder / "des.json"
    described = json.loads(path.read_text())
    for key, value in change.items():
        if key == "config":
            described["config"]["model"] |= value["model"]
        else:
            described[key] = value
    path.write_text(json.dumps(described))
    started = time.monotonic()
    with pytest.raises((CheckpointError, StorageError), match=message):
        serving.Scorer(str(folder))
    assert time.monotonic() - started < 5
