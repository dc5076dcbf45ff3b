"""A reader meets a whole file or none, and never other bytes than its manifest promises."""

import gzip
import hashlib
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from des_core import storage
from des_core.contracts import Part, Reference, RowsFile
from des_core.data.read import blocks, paths
from des_core.data.store import parts
from des_core.errors import DataError, StorageError, UnavailableError, UserError


@pytest.fixture(params=["path", "file", "s3"])
def root_of_any_names(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """As ``root``; the server that stands for Google's takes names with signs in them apart, unlike the real one."""
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/store"
    return ("file://" if request.param == "file" else "") + str(tmp_path / "store")


@pytest.fixture(params=["path", "file", "s3", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that is not there yet: as a path, as an address, and in a bucket."""
    if request.param in ("s3", "gs"):
        return f"{request.getfixturevalue('bucket' if request.param == 's3' else 'gs_bucket')}/store"
    return ("file://" if request.param == "file" else "") + str(tmp_path / "store")


def test_what_was_written_is_read(root: str) -> None:
    uri = storage.join(root, "a", "b.json")
    assert not storage.exists(uri)
    value = {"b": [1, 2.5, None], "a": "ü"}
    digest = storage.write_json(uri, value)
    assert storage.exists(uri)
    assert storage.read_json(uri, digest) == value
    assert storage.digest_file(uri) == digest == hashlib.sha256(storage.read_bytes(uri)).hexdigest()
    assert storage.list_folder(storage.join(root, "a")) == ["b.json"]


def test_the_same_value_is_the_same_bytes(root: str) -> None:
    one, two = storage.join(root, "one"), storage.join(root, "two")
    assert storage.write_json(one, {"a": 1, "b": 2}) == storage.write_json(two, {"b": 2, "a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        storage.write_json(one, float("nan"))
    assert storage.read_json(one) == {"a": 1, "b": 2}


def test_a_writer_that_fails_leaves_what_was_there(root: str) -> None:
    uri = storage.join(root, "rows.bin")
    for before in (None, b"old"):
        if before is not None:
            storage.write_bytes(uri, before)
        with pytest.raises(RuntimeError, match="out of luck"), storage.writer(uri) as file:
            file.write(b"half")
            raise RuntimeError("out of luck")
        assert storage.exists(uri) == (before is not None)
        assert before is None or storage.read_bytes(uri) == before
    assert storage.list_folder(root) == ["rows.bin"]


def test_a_file_appears_only_when_its_writer_ends(root: str) -> None:
    uri = storage.join(root, "rows.bin")
    with storage.writer(uri) as file:
        file.write(b"rows")
        file.flush()
        assert not storage.exists(uri)
    assert storage.read_bytes(uri) == b"rows"


def test_missing_or_changed_bytes_are_refused(root: str) -> None:
    uri = storage.join(root, "rows.bin")
    with pytest.raises(StorageError, match=r"rows.bin is missing; run the step that writes it again"):
        storage.read_bytes(uri)
    digest = storage.write_bytes(uri, b"rows")
    storage.write_bytes(uri, b"rowz")
    with pytest.raises(StorageError, match=r"rows.bin has other bytes than its manifest says"):
        storage.read_bytes(uri, digest)


def test_delete_takes_a_file_a_folder_or_nothing(root: str) -> None:
    storage.write_bytes(storage.join(root, "a", "b"), b"")
    storage.delete(storage.join(root, "a", "b"))
    assert storage.list_folder(storage.join(root, "a")) == []
    storage.delete(storage.join(root, "a"))
    storage.delete(storage.join(root, "a"))
    assert storage.list_folder(root) == []


ODD = ("a b", "100%25", "x#y", "who?", "{day}", "plus+", "[1]", "ü", "at@home", "q=1&r=2")


def test_names_are_taken_as_they_stand(root_of_any_names: str) -> None:
    for name in ODD:
        storage.write_bytes(storage.join(root_of_any_names, name, name), name.encode())
    assert storage.list_folder(root_of_any_names) == sorted(ODD)
    for name in ODD:
        assert storage.list_folder(storage.join(root_of_any_names, name)) == [name]
        assert storage.read_bytes(storage.join(root_of_any_names, name, name)) == name.encode()
        storage.delete(storage.join(root_of_any_names, name, name))
        assert not storage.exists(storage.join(root_of_any_names, name, name))


def test_logs_are_found_by_day_glob_and_folder(root_of_any_names: str) -> None:
    root = root_of_any_names
    days = ["2026-01-01", "2026-01-02"]
    for day in days:
        storage.write_bytes(f"{root}/logs {day}/clicks#1.csv", b"a,b\n")
        storage.write_bytes(f"{root}/logs {day}/_SUCCESS", b"")
    wanted = [f"{root}/logs {day}/clicks#1.csv" for day in days]
    assert paths.days_of_paths(f"{root}/logs {{day}}/*.csv", "csv") == dict(
        zip(days, [[w] for w in wanted], strict=True)
    )
    for form in (
        f"{root}/**/*.csv",
        f"{root}/logs*/clicks#?.csv",
        f"{root}/logs {{day}}",
        wanted,
    ):
        assert paths.files_of(form, "csv") == wanted
    assert paths.digest_of(wanted[0]) == hashlib.sha256(b"a,b\n").hexdigest()
    with pytest.raises(DataError, match="no such file; correct the path"):
        paths.files_of(f"{root}/none/*.csv", "csv")
    with pytest.raises(DataError, match="no such file; correct the path"):
        paths.digest_of(f"{root}/none.csv")


def test_a_bucket_has_one_client_and_no_folder_to_be_made_first(bucket: str) -> None:
    one, path = storage.resolve(f"{bucket}/a/b/")
    assert path == f"{bucket.removeprefix('s3://')}/a/b"
    assert storage.resolve(f"{bucket}/c")[0] is one
    assert storage.resolve(bucket) == (one, bucket.removeprefix("s3://"))
    storage.write_bytes(f"{bucket}/a/b", b"x")
    assert storage.list_folder(bucket) == ["a"]


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    for action in (storage.exists, storage.read_bytes, storage.list_folder):
        with pytest.raises(
            StorageError, match=r"^s3://no-such-bucket: no such bucket; create it or correct the address$"
        ):
            action("s3://no-such-bucket/a")


def test_a_store_that_does_not_answer_is_named_in_time(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    start = time.monotonic()
    with pytest.raises(
        UnavailableError, match=rf"^{bucket} at {endpoint} cannot be reached: .*; check address and rights \(waited"
    ):
        storage.exists(f"{bucket}/a")
    assert time.monotonic() - start < 15


def test_a_store_that_comes_late_is_waited_for(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    late = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    timer = threading.Timer(2.0, late.start)
    timer.start()
    try:
        # An answer, and a final one: nobody has made a bucket there.
        with pytest.raises(StorageError, match=r"no-bucket-yet: no such bucket"):
            storage.exists("s3://no-bucket-yet/a")
    finally:
        timer.join()
        late.stop()


def test_a_store_that_goes_away_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    storage.write_bytes(f"{bucket}/a", b"x")
    server.stop()
    for action in (storage.exists, storage.read_bytes):
        with pytest.raises(UnavailableError, match=rf"^{bucket}/a: the store failed: ") as caught:
            action(f"{bucket}/a")
        assert "\n" not in str(caught.value)
    with pytest.raises(UnavailableError, match=rf"^{bucket}/b: the store failed: "):
        storage.write_bytes(f"{bucket}/b", b"x")
    # Not a word of the logs and parts there: they are neither damaged nor unusable, and no day goes to quarantine.
    with pytest.raises(UnavailableError, match=rf"^{bucket}/a: the store failed: "):
        paths.digest_of(f"{bucket}/a")
    with (
        pytest.raises(UnavailableError, match=rf"^{bucket}/a.csv: the store failed: "),
        blocks._opened(f"{bucket}/a.csv"),
    ):
        pass
    refused = OSError("AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")
    with pytest.raises(UnavailableError, match=r"^s3://x/part.parquet: the store failed: AWS Error NETWORK"):
        parts.damaged("s3://x/part.parquet", refused)
    assert isinstance(parts.damaged("/data/part.parquet", refused), StorageError)
    denied = OSError("AWS Error ACCESS_DENIED during GetObject operation")
    assert "is damaged or missing" in str(parts.damaged("s3://x/part.parquet", denied))


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("s3:///a", r"^s3:///a: write a place in storage as a path, s3://BUCKET/PATH or"),
        ("hdfs://host/a", r"^hdfs://host/a: write a place"),
        (
            "s3://KEY:SECRET@bucket/a",
            r"^s3://\*\*\*@bucket: an address is stored with every result; give keys .* in AWS_",
        ),
    ],
)
def test_an_address_that_is_none_is_the_users_to_mend(uri: str, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        storage.resolve(uri)
    assert "SECRET" not in str(caught.value).replace("AWS_SECRET", "")


def test_a_relative_path_counts_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("runs/a", b"x")
    assert (tmp_path / "runs" / "a").read_bytes() == b"x"


def test_a_reference_says_where_and_what(root: str) -> None:
    part = Part(files=(RowsFile(path="day/rows.parquet", sha256="0" * 64, rows=7),))
    reference = part.write(storage.join(root, "odd#sha256:name.json"))
    assert Reference.parse(str(reference)) == reference
    assert Part.load(reference) == part
    for text in ("rows.json", "rows.json#sha256:12"):
        with pytest.raises(StorageError, match="is not a reference; write it as URI#sha256:HEX"):
            Reference.parse(text)


def test_a_record_of_another_form_is_refused(root: str) -> None:
    uri = storage.join(root, "part.json")
    reference = Reference(uri, storage.write_json(uri, {"path": "p"}))
    with pytest.raises(StorageError, match=r"part.json is not a Part of this version") as caught:
        Part.load(reference)
    assert "\n" not in str(caught.value)


def test_a_local_file_is_readable_by_others(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "a.json"), {})
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert json.loads((tmp_path / "a.json").read_text()) == {}


def test_a_digest_is_of_the_bytes_as_they_lie(tmp_path: Path) -> None:
    packed = gzip.compress(b"text", mtime=0)
    path = str(tmp_path / "log.csv.gz")
    assert storage.write_bytes(path, packed) == storage.digest_file(path) == hashlib.sha256(packed).hexdigest()
    assert storage.read_bytes(path) == packed


@pytest.mark.parametrize("path", ["../rows.parquet", "/etc/passwd", "a/../../b", "s3://other/rows", "a\\..\\b"])
def test_no_path_in_a_manifest_leads_out_of_its_folder(root: str, path: str) -> None:
    uri = storage.join(root, "part.json")
    file = {"path": "day/rows.parquet", "sha256": "0" * 64, "rows": 1}
    for part in ({"files": [file | {"path": path}]}, {"files": [file], "quarantine": path}):
        reference = Reference(uri, storage.write_json(uri, part))
        with pytest.raises(StorageError, match="leads out of the feature store"):
            Part.load(reference)


def test_a_large_object_is_sent_as_it_is_written_and_half_of_one_is_taken_away(
    bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not by way of a local disk, which may be smaller."""
    monkeypatch.setattr(storage, "AT_ONCE_BYTES", 1 << 20)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    piece = bytes(range(256)) * 4096
    uri = f"{bucket}/large"
    with storage.writer(uri) as file:
        for _ in range(12):
            file.write(piece)
            assert not list(tmp_path.iterdir())
    assert storage.digest_file(uri) == hashlib.sha256(piece * 12).hexdigest()
    for pieces in (1, 12):
        with pytest.raises(RuntimeError), storage.writer(f"{uri}-{pieces}") as file:
            for _ in range(pieces):
                file.write(piece[: len(piece) - (pieces == 1)])
            raise RuntimeError
        assert not storage.exists(f"{uri}-{pieces}")


def test_googles_store_that_does_not_answer_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", closed)
    monkeypatch.setattr(storage, "CONNECT_S", 0.5)
    monkeypatch.setattr(storage.remote, "ELSEWHERE_S", 0.5)
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=rf"^gs://somewhere at {closed} cannot be reached: .* \(waited \d+ s\)$"):
        storage.exists("gs://somewhere/a")
    assert time.monotonic() - started < 20
