"""CSV: the same records as Python's reader finds, whatever the block size, and bad ones by their line."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from des_core.data import blocks
from des_core.data.delimited import Raw, read_delimited
from des_core.errors import DataError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "log.csv"


def read(path: Path, header: bool | Sequence[str] = False, *, missing: Sequence[str] = (), **options: Any) -> list[Raw]:
    choose = options.pop("choose", lambda names: names)
    return list(read_delimited(str(path), ",", options.pop("quoting", True), header, missing, choose))


def joined(raws: list[Raw]) -> tuple[list[list[str | None]], list[int], list[int], list[tuple[int, str]], int]:
    """Records, their numbers, their lines, the bad ones, how many there were."""
    records = [list(row.values()) for raw in raws for row in raw.table.to_pylist()]
    rows = [row for raw in raws for row in raw.rows_R.tolist()]
    lines = [line for raw in raws for line in raw.lines_R.tolist()]
    return records, rows, lines, [bad for raw in raws for bad in raw.bad], sum(raw.read for raw in raws)


VALUES = st.text(st.sampled_from('ab",\n é'), max_size=6) | st.text(st.sampled_from('ab"é'), max_size=30)
MISSING = ["", "a", "ab", "aaaaaaaaaaaaaaaaa", "b"]


@given(
    st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=12),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.integers(1, 40),
    st.lists(st.sampled_from(MISSING), unique=True),
)
def test_records_are_those_of_pythons_reader(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    end: str,
    closed: bool,
    size: int,
    missing: list[str],
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows(rows)
    data = text.getvalue() if closed else text.getvalue().removesuffix(end)
    path = tmp_path_factory.mktemp("csv") / "log.csv"
    path.write_bytes(data.encode())
    reader = csv.reader(io.StringIO(data, newline=""))
    expected: list[list[str | None]] = []
    lines, before = [], 0
    for row in reader:
        expected.append([None if text in missing else text for text in row])
        lines.append(before + 1)
        before = reader.line_num
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", size)
        records, numbers, found, bad, count = joined(read(path, missing=missing))
    assert records == expected
    assert numbers == list(range(len(expected)))
    assert (bad, count) == ([], len(expected))
    assert found == lines


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_records_that_are_not_whole(file: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    file.write_bytes(b'a,b\n1,2\n\n3\n4,"5\n6"\n7,8,9\n\xff,1\n10,11\n12,"13\n')
    records, rows, lines, bad, count = joined(read(file, True))
    assert records == [["1", "2"], ["4", "5\n6"], ["10", "11"]]
    assert rows == [0, 2, 5]
    assert lines == [2, 5, 9]
    assert bad == [
        (4, "1 columns instead of 2"),
        (7, "3 columns instead of 2"),
        (8, "column a: not UTF-8 text"),
        (10, "a quote is not closed"),
    ]
    assert count == 7


def test_plain_lines_with_a_bad_one(file: Path) -> None:
    file.write_text("a,b\n1,2\n3\n4,5\n")
    records, rows, lines, bad, _ = joined(read(file, True))
    assert (records, rows, lines) == ([["1", "2"], ["4", "5"]], [0, 2], [2, 4])
    assert bad == [(3, "1 columns instead of 2")]


def test_texts_stay_as_they_are_written(file: Path) -> None:
    file.write_bytes(b'\xef\xbb\xbfid,x\r\n007, 1\r\n7,NA\r\n,"NA"\r\n')
    records, _, _, _, _ = joined(read(file, True, missing=["", "NA"]))
    assert records == [["007", " 1"], ["7", None], [None, None]]


def test_names_of_columns(file: Path) -> None:
    file.write_text("a,b\n1,2\n")
    assert read(file, True)[0].table.column_names == ["a", "b"]
    assert read(file, False)[0].table.column_names == ["0", "1"]
    assert read(file, ["x", "y"])[0].table.num_rows == 2
    assert joined(read(file, ["x", "y", "z"]))[3] == [(1, "2 columns instead of 3"), (2, "2 columns instead of 3")]


def test_only_chosen_columns_are_read_and_judged(file: Path) -> None:
    file.write_bytes(b"a,b,c\n1,\xff\xfe,3\n")
    raws = read(file, True, choose=lambda names: ["c", "a"])
    assert joined(raws)[0] == [["3", "1"]]
    assert raws[0].bad == ()


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
def test_line_ends_are_one_whatever_they_are_made_of(
    file: Path, monkeypatch: pytest.MonkeyPatch, end: str, size: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    file.write_text(end.join(["1,2", "", '"3\n4",5', "6", "", "", "7,8"]), newline="")
    records, rows, lines, bad, _ = joined(read(file))
    assert records == [["1", "2"], ["3\n4", "5"], ["7", "8"]]
    assert rows == [0, 1, 3]
    assert (lines, bad) == ([1, 3, 8], [(5, "1 columns instead of 2")])


def test_quotes_are_letters_where_quoting_is_off(file: Path) -> None:
    file.write_text('"a,b"\n"c,d\n')
    assert joined(read(file, quoting=False))[0] == [['"a', 'b"'], ['"c', "d"]]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.csv", None, "no such file"),
        ("x.csv", b"a,b\n1,\0\n", "binary data"),
        ("x.csv", b"\xff\xfea,b\n", "not UTF-8"),
        ("x.csv.gz", b"a,b\n1,2\n", "cannot be read"),
        ("x.csv.gz", gzip.compress(b"a,b\n1,2\n" * 9999)[:-20], "cannot be read"),
        ("x.csv.zst", b"a,b\n1,2\n", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path / name, True)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_packed_files(tmp_path: Path) -> None:
    for ending, codec in ((".gz", "gzip"), (".zst", "zstd")):
        path = tmp_path / f"log.csv{ending}"
        with pa.CompressedOutputStream(str(path), codec) as stream:
            stream.write(b"a,b\n1,2\n")
        assert joined(read(path, True))[0] == [["1", "2"]]


def test_a_record_without_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(blocks, "LONGEST_RECORD", 1000)
    file.write_text('a,b\n1,"2\n' + "x\n" * 2000)
    with pytest.raises(DataError, match=r"line 2.*quote"):
        read(file, True)


def test_empty_files_hold_no_records(file: Path) -> None:
    for text in ("", "\n\n", "a,b\n"):
        file.write_text(text)
        assert joined(read(file, True))[4] == 0
