"""A reader meets a whole file or none, and never other bytes than its manifest promises."""

import gzip
import hashlib
import json
import os
from pathlib import Path

import pytest

from des_core import storage
from des_core.contracts import Part, Reference
from des_core.errors import StorageError


@pytest.fixture(params=["", "file://"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that is not there yet, as a path and as an address."""
    return f"{request.param}{tmp_path / 'store'}"


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


def test_a_relative_path_counts_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write_bytes("runs/a", b"x")
    assert (tmp_path / "runs" / "a").read_bytes() == b"x"


def test_a_reference_says_where_and_what(root: str) -> None:
    part = Part(path="day/rows.parquet", sha256="0" * 64, rows=7)
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
