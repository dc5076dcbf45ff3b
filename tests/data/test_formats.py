"""What docs/formats.md promises of labels, times, encodings, files and folders: each row is a case here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from des_core.config import parse_config
from des_core.contracts import FieldSpec
from des_core.data.read.paths import files_of
from des_core.data.read.sources import Chunk, read
from des_core.errors import DataError, DesError, UnusableLogsError

PAGE = (Path(__file__).parent.parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
MICROS = 1_760_000_000_000_000
"""2025-10-09 08:53:20 UTC."""
NOON = 1_412_942_400_000_000
"""2014-10-10 12:00 UTC, an hour of Avazu's logs."""


def field(column: str = "user") -> FieldSpec:
    """A field of one column."""
    return FieldSpec(name=column, column=column, kind="categorical", table=column)


def chunks(path: Path | str, *columns: str, **source: Any) -> list[Chunk]:
    """The checked records of a file or a folder."""
    settings = {"path": str(path), "format": "csv", **source}
    config = parse_config(
        {
            "run": {"name": "a"},
            "source": settings,
            "fields": [{"name": "a"}],
            "storage": {"root": "a"},
            "registry": {"tracking_uri": "sqlite:///a.db"},
        }
    )
    form = config.source.format
    return list(read(config.source, files_of(str(path), form), [field(name) for name in columns or ("user",)]))


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """A text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("texts", "labels"),
    [
        (["1", "0", "1.0"], [1, 0, 1]),
        (["true", "False", " TRUE"], [1, 0, 1]),
        (["yes", "no", "Y"], [1, 0, 1]),
        (["t", "f", "F"], [1, 0, 0]),
        (["1", "-1", "+1"], [1, 0, 1]),
    ],
)
def test_labels(tmp_path: Path, texts: list[str], labels: list[int]) -> None:
    (chunk,) = chunks(write(tmp_path / "a.csv", "label,user\n" + "".join(f"{text},u\n" for text in texts)))
    assert chunk.label_R.tolist() == labels and not chunk.bad


def test_labels_that_are_typed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [True, False, None], "user": ["a", "b", "c"]}), tmp_path / "a.parquet")
    (chunk,) = chunks(tmp_path / "a.parquet", format="parquet")
    assert chunk.label_R.tolist() == [1, 0]
    assert "the label is missing" in chunk.bad[0][1]


def test_a_label_that_is_none_of_these_names_the_key(tmp_path: Path) -> None:
    (chunk,) = chunks(write(tmp_path / "a.csv", "label,user\n1,u\nclick,u\n"))
    assert chunk.bad[0][1].endswith("the label 'click' is not 0 or 1 or true or false; source.positive says "
                                    "which labels count as 1")  # fmt: skip


@pytest.mark.parametrize(
    ("text", "form", "micros"),
    [
        ("1760000000", "", MICROS),
        ("1760000000.5", "", MICROS + 500_000),
        ("1760000000000", "", MICROS),
        ("1760000000000000", "", MICROS),
        ("2025-10-09T08:53:20Z", "", MICROS),
        ("2025-10-09 10:53:20+02:00", "", MICROS),
        ("1760000000", "unix", MICROS),
        ("1760000000000", "unix_ms", MICROS),
        ("1760000000000000", "unix_us", MICROS),
        ("2025-10-09T08:53:20Z", "iso", MICROS),
        ("14101012", "%y%m%d%H", NOON),
        ("10/10/2014 12:00", "%d/%m/%Y %H:%M", NOON),
    ],
)
def test_times(tmp_path: Path, text: str, form: str, micros: int) -> None:
    path = write(tmp_path / "a.csv", f"label,user,at\n1,u,{text}\n0,v,\n")
    (chunk,) = chunks(path, time="at", time_format=form)
    assert chunk.micros_R.tolist() == [micros]
    assert "the time is missing" in chunk.bad[0][1]
    if text.isdigit():
        pq.write_table(pa.table({"label": [1], "user": ["u"], "at": [int(text)]}), tmp_path / "a.parquet")
        (typed,) = chunks(tmp_path / "a.parquet", format="parquet", time="at", time_format=form)
        assert typed.micros_R.tolist() == [micros]


@pytest.mark.parametrize(
    ("text", "form"), [("14101012", ""), ("1760000000", "iso"), ("2025-10-09", "unix"), ("x", "%Y")]
)
def test_times_of_another_form_are_refused_with_the_key(tmp_path: Path, text: str, form: str) -> None:
    path = write(tmp_path / "a.csv", f"label,user,at\n1,u,{text}\n")
    with pytest.raises(DataError, match=r"source.time = 'at' holds no times: .*source.time_format says what it is"):
        chunks(path, time="at", time_format=form)


def test_a_form_of_times_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DesError, match="'seconds' is no form of times; write unix, unix_ms, unix_us, iso or a pattern"):
        chunks(tmp_path, time_format="seconds")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "gb18030", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    names = ["Zoë", "Åsa"] if encoding in ("latin-1", "utf-8") else ["张伟", "王芳"]
    path = write(tmp_path / "a.csv", f"label,user\n1,{names[0]}\n0,{names[1]}\n", encoding)
    (chunk,) = chunks(path, encoding=encoding)
    assert chunk.records.column("user").to_pylist() == names


def test_an_encoding_that_is_not_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "label,user\n1,Zoë\n", "latin-1")
    with pytest.raises(UnusableLogsError, match=r"a.csv: is not text in source.encoding = 'gb18030' .*; name another"):
        chunks(path, encoding="gb18030")
    with pytest.raises(DesError, match="'klingon' is not an encoding known here"):
        chunks(path, encoding="klingon")


def test_blanks_around_the_names_of_columns(tmp_path: Path) -> None:
    (chunk,) = chunks(write(tmp_path / "a.csv", "label, user \n1,u\n"))
    assert chunk.records.column("user").to_pylist() == ["u"]


def test_folders_in_folders_and_their_names_as_columns(tmp_path: Path) -> None:
    for day in ("2026-01-01", "2026-01-02"):
        write(tmp_path / f"logs/dt={day}/part-0.csv", f"label,user\n1,{day[-1]}\n")
    write(tmp_path / "logs/_temporary/part-9.csv", "not a log")
    write(tmp_path / "logs/dt=__HIVE_DEFAULT_PARTITION__/a%20b.csv", "label,user\n0,n\n")
    found = chunks(tmp_path / "logs", "user", "dt")
    rows = [tuple(row.values()) for chunk in found for row in chunk.records.select(["user", "dt"]).to_pylist()]
    assert sorted(rows, key=str) == sorted([("1", "2026-01-01"), ("2", "2026-01-02"), ("n", None)], key=str)


def test_a_column_of_the_file_goes_before_one_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "logs/dt=1/a.csv", "label,user,dt\n1,u,own\n")
    (chunk,) = chunks(tmp_path / "logs", "dt")
    assert chunk.records.column("dt").to_pylist() == ["own"]


def test_queries_of_libsvm(tmp_path: Path) -> None:
    path = write(tmp_path / "a.libsvm", "1 qid:7 3:0.5 # a comment\n0 qid:8 4:1\n-1 5:2\n")
    (chunk,) = chunks(path, "features", "qid", format="libsvm")
    assert chunk.records.column("qid").to_pylist() == ["7", "8", None]
    assert chunk.records.column("features").to_pylist() == [["3"], ["4"], ["5"]]
    assert chunk.label_R.tolist() == [1, 0, 0]


def test_the_page_names_every_key_and_form() -> None:
    for word in ("time_format", "encoding", "positive", "qid", "dt=2026-01-31", "%y%m%d%H", "unix_ms", "gb18030"):
        assert word in PAGE
    assert not re.findall(r"\| *\|", PAGE), "no cell is empty"
