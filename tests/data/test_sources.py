"""Logs in every format become the same checked records; what is wrong is told in one line."""

from __future__ import annotations

import datetime as dt
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from des_core.config import FieldConfig, SourceConfig
from des_core.data.read import blocks
from des_core.data.read.sources import CRITEO_COLUMNS, Chunk, read
from des_core.data.store.encoding import specs_of
from des_core.errors import ConfigError, DataError

HINT = " or true or false; source.positive says which labels count as 1"


def source(path: Path | str = "unused", **options: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), **options})


def chunks(config: SourceConfig, *fields: str, labelled: bool = True, **paths: Path) -> list[Chunk]:
    specs = specs_of([FieldConfig(name=name) for name in fields])
    files = [str(path) for path in paths.values()] or [str(config.path)]
    return list(read(config, files, specs, labelled=labelled))


def columns(found: list[Chunk]) -> dict[str, list[Any]]:
    return pa.concat_tables([chunk.records for chunk in found]).to_pydict()


def labels(found: list[Chunk]) -> list[float]:
    return [label for chunk in found for label in chunk.label_R.tolist()]


def bad(found: list[Chunk]) -> list[tuple[int, str]]:
    return [item for chunk in found for item in chunk.bad]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text("user,item,label,junk\n7,a,1,x\n007,NA,0,y\n,b,1,z\n8,c,0,z\n")
    return path


def test_csv_gives_texts_and_nothing_undeclared(log: Path) -> None:
    found = chunks(source(log), "user", "item")
    assert columns(found) == {
        "user": ["7", "007", None, "8"],
        "item": ["a", None, "b", "c"],
        "label": ["1", "0", "1", "0"],
    }
    assert labels(found) == [1, 0, 1, 0]
    assert found[0].rows_R.tolist() == [0, 1, 2, 3]
    assert found[0].lines_R.tolist() == [2, 3, 4, 5]


def test_scoring_needs_no_label(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    path.write_text("user,item\n7,a\n")
    config = source(path, time="when", group="who")
    found = chunks(config, "user", "item", labelled=False)
    assert columns(found) == {"user": ["7"], "item": ["a"]}
    assert len(found[0].label_R) == 0
    with pytest.raises(DataError, match=r"no column 'label' \(source.label\)"):
        chunks(source(path), "user")


@pytest.mark.parametrize(
    ("texts", "options", "expected", "reasons"),
    [
        (["1", "0", "2", "x", ""], {}, [1, 0], ["'2' is not 0 or 1", "'x' is not 0 or 1", "missing"]),
        (["5", "4.0", "3.5", "x"], {"positive": ">= 4"}, [1, 1, 0], ["'x' is not a number"]),
        (["5", "3"], {"positive": "<4"}, [0, 1], []),
        (["4.0", "3"], {"positive": "== 4"}, [1, 0], []),
        (["click", "view", ""], {"positive": "== click"}, [1, 0], ["missing"]),
        (["click", "view"], {"positive": "!= 'click'"}, [0, 1], []),
        (
            ["4.5", "-1", "nan", "inf"],
            {"task": "rating"},
            [4.5, -1],
            ["'nan' is not a number", "'inf' is not a number"],
        ),
    ],
)
def test_labels(
    tmp_path: Path, texts: list[str], options: dict[str, Any], expected: list[float], reasons: list[str]
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,label\n" + "".join(f"u,{text}\n" for text in texts))
    found = chunks(source(path, **options), "user")
    assert labels(found) == expected
    assert [line for line, _ in bad(found)] == list(range(len(expected) + 2, len(texts) + 2))
    for (_, reason), wanted in zip(bad(found), reasons, strict=True):
        assert wanted in reason


def test_criteo(tmp_path: Path) -> None:
    row = ["1", *(str(i) for i in range(13)), *(f"c{i}" for i in range(26))]
    missing = ["0", *[""] * 39]
    path = tmp_path / "log.tsv"
    path.write_text("\n".join("\t".join(cells) for cells in (row, missing, row[:-1], ['"', *row[1:]])))
    found = chunks(source(path, format="criteo"), *CRITEO_COLUMNS[1:])
    assert columns(found)["C26"] == ["c25", None]
    assert columns(found)["I1"] == ["0", None]
    assert labels(found) == [1, 0]
    assert bad(found) == [(3, "39 columns instead of 40"), (4, f"column label: the label '\"' is not 0 or 1{HINT}")]


@pytest.mark.parametrize("size", [1 << 20, 5])
def test_libsvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    path = tmp_path / "log.libsvm"
    lines = [
        "# a comment",
        "+1 3:0.5 12:1 # 4:4",
        "",
        "-1 7:2e-1",
        "1",
        "0 3:x",
        "1 3:1 5",
        "2 1:1",
        "0 a:1",
        "1 1:1:1",
    ]
    path.write_bytes("\r\n".join(lines).encode() + b"\n1 \xff:1\n0 9:9")
    found = chunks(source(path, format="libsvm"), "features", "values")
    assert columns(found) == {
        "label": ["+1", "-1", "1", "0"],
        "features": [["3", "12"], ["7"], [], ["9"]],
        "values": [[0.5, 1], [0.2], [], [9]],
    }
    assert labels(found) == [1, 0, 1, 0]
    assert [row for chunk in found for row in chunk.rows_R.tolist()] == [0, 1, 2, 9]
    assert bad(found) == [
        (6, "'3:x' is not index:value"),
        (7, "'5' is not index:value"),
        (8, f"column label: the label '2' is not 0 or 1{HINT}"),
        (9, "'a:1' is not index:value"),
        (10, "'1:1:1' is not index:value"),
        (11, "not UTF-8 text"),
    ]


def test_parquet_keeps_types(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    table = pa.table(
        {
            "user": pa.array([7, None, 9]),
            "tags": pa.array([["a"], None, []], pa.list_(pa.string())),
            "kind": pa.array(["x", "NA", None]).dictionary_encode(),
            "label": pa.array([True, False, None]),
            "when": pa.array([dt.datetime(2026, 1, 1)] * 3, pa.timestamp("ms")),
        }
    )
    pq.write_table(table, path)
    found = chunks(source(path, format="parquet", time="when"), "user", "tags", "kind")
    assert columns(found)["user"] == [7, None]
    assert columns(found)["tags"] == [["a"], None]
    assert columns(found)["kind"] == ["x", None]
    assert labels(found) == [1, 0]
    assert found[0].micros_R.tolist() == [1_767_225_600_000_000] * 2
    assert bad(found) == [(3, "column label: the label is missing")]


def test_times_that_are_bad_here_and_there(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,label,t\nu,1,2026-01-01\nu,1,soon\nu,1,\nu,0,2026-01-01 12:00\n")
    found = chunks(source(path, time="t", timezone="Europe/Berlin"), "user")
    assert found[0].micros_R.tolist() == [1_767_222_000_000_000, 1_767_265_200_000_000]
    assert bad(found) == [
        (3, "column t: the time 'soon' is neither unix seconds nor ISO 8601; source.time_format says what it is"),
        (4, "column t: the time is missing"),
    ]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    path = tmp_path / "films.csv"
    path.write_text('item,title,studio\na,"Alien, the",7\nb,NA,8\n,nobody,9\n')
    return path


def test_joins(tmp_path: Path, log: Path, films: Path) -> None:
    studios = tmp_path / "studios.parquet"
    pq.write_table(pa.table({"studio": [7, 8], "city": ["Rome", "NA"], "label": ["x", "y"]}), studios)
    joins = [{"path": str(films), "on": "item"}, {"path": str(studios), "on": "studio", "columns": ["city"]}]
    found = columns(chunks(source(log, join=joins), "user", "title", "city"))
    assert found["title"] == ["Alien, the", None, None, None]
    assert found["city"] == ["Rome", None, None, None]


def test_scoring_takes_a_column_from_the_log_if_it_is_there(tmp_path: Path, films: Path) -> None:
    path = tmp_path / "raw.csv"
    path.write_text("title\nmine\n")
    config = source(path, join=[{"path": str(films), "on": "item"}])
    assert columns(chunks(config, "title", labelled=False)) == {"title": ["mine"]}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("item,title\na,x\na,y\n", {}, "item 'a' has more than one row"),
        ("item,title\na\n", {}, "line 2: 1 columns instead of 2"),
        ("film,title\na,x\n", {}, "no column 'item' to join with; it has film, title"),
        ("item,title\na,x\n", {"columns": ["name"]}, "no column 'name'"),
        ("", {}, "holds no rows"),
        ("item,title,user\na,x,u\n", {}, "'user' is in the log and in a side table"),
    ],
)
def test_side_tables_that_do_not_fit(
    tmp_path: Path, log: Path, text: str, options: dict[str, Any], message: str
) -> None:
    side = tmp_path / "side.csv"
    side.write_text(text)
    with pytest.raises(DataError, match=message):
        chunks(source(log, join=[{"path": str(side), "on": "item", **options}]), "user", "title")


@pytest.mark.parametrize(
    ("options", "fields", "error", "message"),
    [
        ({}, ["usr"], DataError, r"log.csv: no column 'usr' \(field usr\); did you mean 'user'\?"),
        ({}, ["zzz"], DataError, "it has user, item, label, junk"),
        ({"label": "y"}, ["user"], DataError, r"no column 'y' \(source.label\)"),
        ({"time": "ts"}, ["user"], DataError, r"no column 'ts' \(source.time\)"),
        ({"time": "item"}, ["user"], DataError, "source.time = 'item' holds no times: 'a' is neither"),
        ({"header": ["user", "user", "label", "x"]}, ["user"], DataError, "more than one column is named 'user'"),
        ({"join": [{"path": "/no/side.csv", "on": "item"}]}, ["user"], DataError, "/no/side.csv: no such file"),
        ({"delimiter": "é"}, ["user"], ConfigError, "one ASCII character"),
    ],
)
def test_what_cannot_be_read(
    log: Path, options: dict[str, Any], fields: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        chunks(source(log, **options), *fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "form", "message"),
    [
        ("log.parquet", b"PAR1 and then nothing", "parquet", "not a whole Parquet file"),
        ("log.parquet", None, "parquet", "no such file"),
        ("log.csv", b"\x89PNG\0\0", "csv", "binary data"),
        (
            "log.csv",
            gzip.compress(b"user,label\nu,1\n", mtime=0),
            "csv",
            "holds gzip without the ending .gz; rename it",
        ),
        ("log.csv", b"PK\x03\x04\0\0user,label\n", "csv", "holds a zip archive; unpack it"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes | None, form: str, message: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        chunks(source(path, format=form), "user")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_memory_is_that_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,label\n" + "someone,1\n" * 50_000)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 10_000)
    sizes = [chunk.records.num_rows for chunk in read(source(path), [str(path)], specs_of([FieldConfig(name="user")]))]
    assert sum(sizes) == 50_000
    assert max(sizes) < 1100


def test_files_follow_each_other(tmp_path: Path) -> None:
    for name, order in (("a", "user,label"), ("b", "label,user")):
        (tmp_path / name).write_text(f"{order}\n1,1\n")
    found = chunks(source("x"), "user", a=tmp_path / "a", b=tmp_path / "b")
    assert [chunk.path for chunk in found] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert np.concatenate([chunk.rows_R for chunk in found]).tolist() == [0, 0]
