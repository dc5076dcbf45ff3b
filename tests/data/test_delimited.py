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

from des_core.data.read import blocks
from des_core.data.read.delimited import Raw, read_delimited
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
        ("x.csv.gz", gzip.compress(b"a,b\n1,2\n" * 9999, mtime=0)[:-20], "cannot be read"),
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
    for ending, codec in ((".gz", "gzip"), (".zst", "zstd"), (".GZ", "gzip")):
        path = tmp_path / f"log.csv{ending}"
        with pa.CompressedOutputStream(str(path), codec) as stream:
            stream.write(b"a,b\n1,2\n")
        assert joined(read(path, True))[0] == [["1", "2"]]


def test_a_record_without_end(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(blocks, "LONGEST_RECORD", 1000)
    file.write_text("a,b\n1," + "x" * 2000)
    with pytest.raises(DataError, match=r"line 2: no record ends within 64 MiB"):
        read(file, True)


@pytest.mark.parametrize("size", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize(
    "stray",
    [
        '1,"Drama',  # to the end of the file
        '1,"5 inch',  # to the next quoted value, whose first letter follows the quote
        '"1,x',
        '1,"a ""b',
    ],
)
@pytest.mark.parametrize("rest", ["8,9\n" * 40, '8,"foo"\n' * 40, '8,9\n"a",b\n'])
def test_a_stray_quote_costs_its_own_line_alone(
    file: Path, monkeypatch: pytest.MonkeyPatch, size: int, stray: str, rest: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    for end in ("", "\n"):
        text = f"a,b\n1,2\n{stray}\n{rest}".removesuffix("\n") + end
        file.write_text(text)
        records, rows, lines, bad, count = joined(read(file, True))
        assert count == len(text.strip().split("\n")) - 1, "every line is a record or a bad one"
        assert bad == [(3, "a quote is not closed")]
        assert records == [["1", "2"], *([one.strip('"') for one in line.split(",")] for line in rest.split())]
        assert rows == [0, *range(2, count)] and lines == [2, *range(4, count + 2)]


def test_a_quoted_value_over_lines_has_a_longest_size(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LONGEST_VALUE", 100)
    whole = "x\n" * 40
    file.write_text(f'a,b\n1,"{whole}"\n2,"' + "3,4\n" * 40 + '5,6"\n')
    records, _, _, bad, count = joined(read(file, True))
    assert records[:2] == [["1", whole], ["3", "4"]] and records[-1] == ["5", '6"']
    assert bad == [(43, "a quote is not closed")] and count == 42
    file.write_text('a,b\n1,"' + "x" * 500 + '"\n')
    assert joined(read(file, True))[0] == [["1", "x" * 500]], "a value on one line may be of any size"


def test_a_value_over_lines_that_leaves_other_columns_is_no_value(file: Path) -> None:
    file.write_text('a,b,c\n1,"x,3\n4,5",6,7\n8,9,10\n')
    records, _, _, bad, count = joined(read(file, True))
    assert records == [["8", "9", "10"]]
    assert bad == [(2, "a quote is not closed"), (3, "4 columns instead of 3")] and count == 3


def test_a_header_with_a_stray_quote_is_named(file: Path) -> None:
    file.write_text('a,"b\n1,2\n')
    with pytest.raises(DataError, match=r'the first line.*close it, or set source.quoting = "none"'):
        read(file, True)
    file.write_text('"a,b\n"1,2\n')
    with pytest.raises(DataError, match=r'every line opens a quote.* set source.quoting = "none"'):
        read(file, False)


def test_empty_files_hold_no_records(file: Path) -> None:
    for text in ("", "\n\n", "a,b\n"):
        file.write_text(text)
        assert joined(read(file, True))[4] == 0
