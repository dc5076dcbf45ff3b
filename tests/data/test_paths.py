"""What a path means: files, globs, folders, lists and days, never what is hidden or beside."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from des_core.data.read.paths import days_of_paths, digest_of, files_of
from des_core.data.store import digests
from des_core.data.store.digests import Digests
from des_core.errors import DataError


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for name in (
        *("2026-01-02.csv", "2026-01-01.csv", "2026-01-03.csv.gz", "2026-13-01.csv", "notes.md", ".hidden.csv"),
        *("_SUCCESS", "part-0001", "truth/2026-01-01.csv", "2026-02-01/b.csv", "2026-02-01/a.csv", "2026-02-02/a.csv"),
        *("2026-02-02/.a.csv", "other/2026-02-01.csv", "odd [1]/x.csv"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    return tmp_path


def names(files: list[str], root: Path) -> list[str]:
    return [file.removeprefix(f"{root}/") for file in files]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("2026-01-01.csv", ["2026-01-01.csv"]),
        ("2026-01-0?.csv", ["2026-01-01.csv", "2026-01-02.csv"]),
        ("*.gz", ["2026-01-03.csv.gz"]),
        ("*/a.csv", ["2026-02-01/a.csv", "2026-02-02/a.csv"]),
        ("2026-0[2-3]-*/[!a].csv", ["2026-02-01/b.csv"]),
        ("**/2026-02-01.csv", ["other/2026-02-01.csv"]),
        ("2026-02-01", ["2026-02-01/a.csv", "2026-02-01/b.csv"]),
        ("odd [1]/x.csv", ["odd [1]/x.csv"]),
        ("odd [1]", ["odd [1]/x.csv"]),
        ("odd [1]/*.csv", ["odd [1]/x.csv"]),
        (".", ["2026-01-01.csv", "2026-01-02.csv", "2026-01-03.csv.gz", "2026-13-01.csv", "part-0001"]),
        ("{day}.csv", ["2026-01-01.csv", "2026-01-02.csv"]),
    ],
)
def test_one_path(logs: Path, path: str, expected: list[str]) -> None:
    root = str(logs / path) if path != "." else str(logs)
    assert names(files_of(root, "csv"), logs) == expected


def test_a_list_keeps_its_order_and_names_a_file_once(logs: Path) -> None:
    paths = [str(logs / "2026-01-02.csv"), str(logs / "2026-01-0*.csv")]
    assert names(files_of(paths, "csv"), logs) == ["2026-01-02.csv", "2026-01-01.csv"]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["{day}.csv"], {"2026-01-01": ["2026-01-01.csv"], "2026-01-02": ["2026-01-02.csv"]}),
        (["{day}.csv*"], {f"2026-01-0{d}": [f"2026-01-0{d}.csv" + ".gz" * (d == 3)] for d in (1, 2, 3)}),
        (["{day}"], {"2026-02-01": ["2026-02-01/a.csv", "2026-02-01/b.csv"], "2026-02-02": ["2026-02-02/a.csv"]}),
        (["{day}/a.csv"], {"2026-02-01": ["2026-02-01/a.csv"], "2026-02-02": ["2026-02-02/a.csv"]}),
        (
            ["{day}/a.csv", "other/{day}.csv"],
            {"2026-02-01": ["2026-02-01/a.csv", "other/2026-02-01.csv"], "2026-02-02": ["2026-02-02/a.csv"]},
        ),
    ],
)
def test_days(logs: Path, paths: list[str], expected: dict[str, list[str]]) -> None:
    found = days_of_paths([str(logs / path) for path in paths], "csv")
    assert {day: names(files, logs) for day, files in found.items()} == expected
    assert list(found) == sorted(found)


def test_two_dates_in_one_path_must_be_the_same_day(tmp_path: Path) -> None:
    for name in ("2026-01-01/log-2026-01-01.csv", "2026-01-02/log-2026-01-01.csv"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    assert list(days_of_paths(f"{tmp_path}/{{day}}/log-{{day}}.csv", "csv")) == ["2026-01-01"]


@pytest.mark.parametrize("path", ["no.csv", "no*.csv", "no/{day}.csv", "2026-01-01.csv/x.csv"])
def test_no_file(logs: Path, path: str) -> None:
    with pytest.raises(DataError, match=path[:2]):
        files_of(str(logs / path), "csv")


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"no data files.*\.csv"):
        files_of(str(tmp_path), "csv")


def test_days_in_some_paths_only(logs: Path) -> None:
    with pytest.raises(DataError, match="all or to none"):
        days_of_paths([str(logs / "{day}.csv"), str(logs / "part-0001")], "csv")


def test_digest_is_of_the_bytes_as_they_lie(logs: Path) -> None:
    import hashlib

    for name in ("2026-01-01.csv", "2026-01-03.csv.gz"):
        assert digest_of(str(logs / name)) == hashlib.sha256(name.encode()).hexdigest()
    with pytest.raises(DataError, match="no such file"):
        digest_of(str(logs / "gone.csv"))


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest is kept by size and time of change; a file changed just now is always read."""
    log = tmp_path / "a.csv"
    log.write_text("one")
    read: list[str] = []
    monkeypatch.setattr(digests, "digest_of", lambda path: read.append(path) or digest_of(path))

    def ask() -> str:
        known = Digests(str(tmp_path / "root"))
        (found,) = known.of([str(log)])
        known.keep()
        return found

    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    assert [ask(), ask()] == [one, one] and len(read) == 2, "it may change within the clock's step"
    for text, changed, sha256, reads in (("one", 1e9, one, 3), ("one", 1e9, one, 3), ("two", 1.1e9, two, 4)):
        log.write_text(text)
        os.utime(log, (changed, changed))
        assert (ask(), len(read)) == (sha256, reads)


def test_days_in_a_folder_with_a_bracket_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "a[bc]"
    folder.mkdir()
    (folder / "2026-01-01.csv").touch()
    assert list(days_of_paths(str(folder / "{day}.csv"), "csv")) == ["2026-01-01"]
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab/2026-01-01.csv").touch()
    assert files_of(str(folder / "*.csv"), "csv") == [str(folder / "2026-01-01.csv")], "the folder that there is"
