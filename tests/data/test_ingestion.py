"""The features are the same however logs are cut into pieces, by however many tasks, in whatever order, and resumed."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from des_core import cpus, processes, storage
from des_core.config import Config, parse_config
from des_core.contracts import ROW, ROW_GROUP, TIME, Dataset
from des_core.data.feed.batches import Stream
from des_core.data.read import blocks, sources, spans
from des_core.data.store import encoded, engine_local, features, merging, parts, pieces, runs, sketches, tasks
from des_core.data.store.features import ingest
from des_core.errors import DataError, WorkerError

NOON = 1_767_268_800
"""2026-01-01 12:00 UTC."""

FIELDS = [
    {"name": "user"},
    {"name": "price", "kind": "numeric", "transform": "bucket"},
    {"name": "tags", "kind": "multi"},
    {"name": "rare"},
    {"name": "hour", "column": "t", "derive": "hour"},
]


def config_of(folder: Path, root: str = "", **tables: Any) -> Config:
    source = {"path": str(folder / "log.csv"), "time": "t", "group": "user", "max_bad_share": 0.2}
    source |= tables.pop("source", {})
    document = {
        "run": {"name": "r"},
        "source": source,
        "fields": FIELDS,
        "storage": {"root": root or str(folder / "root")},
    }
    return parse_config(document | tables)


def write_log(path: Path, rows: int, seed: int = 0) -> None:
    """Times in no order, ties, bad records, empty lines, values over lines, stray quotes, a field that comes late."""
    draw = random.Random(seed)
    lines = ["user,price,tags,rare,label,t"]
    for i in range(rows):
        user = f"u{draw.randrange(60)}"
        price = f"{draw.randrange(400)}" if i % 11 else ""
        tags = "|".join(f"t{draw.randrange(9)}" for _ in range(draw.randrange(4)))
        if i % 13 == 0:
            tags = f'"x\n{"y" * draw.randrange(30)}, ""z""\r\n|w"'
        rare = "" if i < rows // 2 else f"0{draw.randrange(5)}"
        time = NOON + draw.randrange(-130_000, 130_000) // 100 * 100
        line = f"{user},{price},{tags},{rare},{i % 2},{time}"
        if i % 29 == 0:
            line = f'"{user},{price}'
        if i % 31 == 0:
            line = line.replace(str(time), "never")
        lines += [line] + [""] * (i % 17 == 0)
    path.write_bytes("\n".join(lines).encode())


def tree(root: str) -> dict[str, bytes]:
    """Every file of the feature stores."""
    folder = Path(root)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "digests.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def ingested(config: Config) -> dict[str, bytes]:
    """The files of a new feature store."""
    storage.delete(config.storage.root)
    ingest(config)
    return tree(config.storage.root)


@contextmanager
def shuffled() -> Iterator[tasks.Run]:
    """An engine whose items are done in any order, the first tries of some being lost."""
    draw, tried = random.Random(3), set()

    def run(call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, tasks.Outcome]]:
        for place in draw.sample(range(len(items)), len(items)):
            outcome = tasks.attempt(call, items[place])
            if str(items[place]) not in tried and draw.random() < 0.5:
                tried.add(str(items[place]))
                outcome = tasks.Outcome(lost="killed by signal 9")
            yield place, outcome

    yield run


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Blocks of 2000 bytes, files of a row group of 256 rows; in this process, for others do not see these numbers."""
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 1)
    for module in (merging, parts, sketches):
        monkeypatch.setattr(module, "ROW_GROUP", 256)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(blocks, "LONGEST_VALUE", 400)
    monkeypatch.setattr(merging, "FILE_BYTES", 1)
    return monkeypatch


def cut(patch: pytest.MonkeyPatch, piece: int, run: int = 1 << 20, batch: int = 64) -> None:
    """Cut logs into pieces of some bytes, and these into runs."""
    patch.setattr(pieces, "PIECE_BYTES", piece)
    patch.setattr(encoded, "RUN_BYTES", run)
    patch.setattr(runs, "RUN_ROWS", batch)


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"source": {"time": ""}, "fields": FIELDS[:4]},
        {"split": {"by": "day"}, "source": {"timezone": "Asia/Tokyo"}},
        {"source": {"quoting": "none", "max_bad_share": 0.9}},
        {"source": {"header": ["user", "price", "tags", "rare", "label", "t"]}},
    ],
    ids=["time", "random", "event-days", "no-quotes", "no-header"],
)
def test_pieces_change_nothing(tmp_path: Path, small: pytest.MonkeyPatch, tables: dict[str, Any]) -> None:
    write_log(tmp_path / "log.csv", 700)
    config = config_of(tmp_path, **tables)
    whole = ingested(config)
    assert sum("/rows-" in path for path in whole) >= 2
    assert any(path.endswith("quarantine.csv") for path in whole)
    small.setattr(tasks, "engine_of", lambda _: shuffled())
    for piece, run, batch in ((1, 2000, 7), (7500, 5000, 5000)):
        cut(small, piece, run, batch)
        assert ingested(config) == whole, f"pieces of {piece} bytes"


def test_small_files_share_pieces_and_packed_ones_stay_whole(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    for number in range(6):
        write_log(tmp_path / f"part-{number}.csv", 40 + 200 * (number == 3), seed=number)
    packed = tmp_path / "part-4.csv"
    (tmp_path / "part-4.csv.gz").write_bytes(gzip.compress(packed.read_bytes(), mtime=0))
    packed.unlink()
    config = config_of(tmp_path, source={"path": str(tmp_path / "part-*")})
    whole = ingested(config)
    cut(small, 5000)
    found = pieces.pieces_of_spans(
        pieces.spans_of_files(config.source, features.source_files(config)["all"], next(iter_engine())), ["0"] * 6
    )
    assert len(found[0].spans) > 1 and len({piece.files for piece in found}) < len(found)
    assert ingested(config) == whole


def iter_engine() -> Iterator[tasks.Run]:
    with engine_local.tasks() as run:
        yield run


def test_parquet_is_cut_by_row_groups(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    small.setattr(spans, "PARQUET_BATCH", 100)
    small.setattr(sources, "PARQUET_BATCH", 100)
    draw = np.random.default_rng(0)
    rows = 3000
    table = pa.table(
        {
            "user": draw.integers(0, 50, rows),
            "price": draw.random(rows),
            "tags": pa.array([["a", "b"][: i % 3] for i in range(rows)]),
            "rare": pa.array([None] * 1500 + ["07"] * 1500),
            "label": draw.integers(0, 2, rows),
            "t": NOON + draw.integers(0, 500, rows),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=70)
    config = config_of(tmp_path, source={"path": str(tmp_path / "log.parquet"), "format": "parquet"})
    whole = ingested(config)
    for piece in (1, 20_000):
        cut(small, piece)
        assert ingested(config) == whole


def test_libsvm_is_cut_too(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    lines = [
        f"{i % 2} " + " ".join(f"{draw.randrange(99)}:{draw.random():.3f}" for _ in range(i % 5)) for i in range(900)
    ]
    lines[5], lines[300], lines[301] = "# nothing here", "", "1 3:x"
    (tmp_path / "log.libsvm").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "log.libsvm"), "format": "libsvm", "time": "", "group": ""}
    config = config_of(tmp_path, source=source, fields=[])
    whole = ingested(config)
    cut(small, 1)
    assert ingested(config) == whole


def test_a_field_that_later_pieces_take_for_something_else(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    """The first values settle what a field's values are, wherever they are: here texts, and numbers later."""
    lines = ["user,price,tags,rare,label,t"]
    rare = [""] * 200 + ["1.10"] * 100 + ["word"] + ["2.0"] * 300
    lines += [f"u,{i},a,{value},{i % 2},{NOON + i}" for i, value in enumerate(rare)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    config = config_of(tmp_path, fields=[{"name": "rare"}], source={"group": ""})
    whole = ingested(config)
    cut(small, 1)
    assert ingested(config) == whole


def test_processes_change_nothing_and_a_killed_one_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes read this package as it is, so the pieces are cut by the caller alone."""
    for number in range(6):
        write_log(tmp_path / f"day-{number}.csv", 900, seed=number)
    config = config_of(tmp_path, source={"path": str(tmp_path / "day-*.csv")})
    whole = ingested(config)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 3)
    killed = []

    def kill_one() -> None:
        while not killed:
            for child in multiprocessing.active_children():
                if list(Path(config.features_root).glob(".scratch-all/piece-*")):
                    os.kill(child.pid, signal.SIGKILL)
                    killed.append(child.pid)
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        assert ingested(config) == whole
    finally:
        killed.append(0)
        thread.join()
    assert len(killed) == 2
    assert not multiprocessing.active_children()


def test_what_is_done_is_not_done_again(tmp_path: Path, small: pytest.MonkeyPatch) -> None:
    write_log(tmp_path / "log.csv", 700)
    config = config_of(tmp_path)
    cut(small, 4000)
    whole = ingested(config)
    storage.delete(config.storage.root)
    calls: list[str] = []
    interrupted = 0

    @contextmanager
    def counting(_: Config) -> Iterator[tasks.Run]:
        def run(call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, tasks.Outcome]]:
            for place, item in enumerate(items):
                if call.__name__ != "count_span":
                    if len(calls) == 3 * (interrupted + 1):
                        raise KeyboardInterrupt
                    calls.append(str(item))
                yield place, tasks.attempt(call, item)

        yield run

    small.setattr(tasks, "engine_of", counting)
    while interrupted < 50:
        try:
            ingest(config)
            break
        except KeyboardInterrupt:
            interrupted += 1
            leftover = Path(config.features_root) / ".scratch-all/run-0000-0.arrow"
            leftover.write_bytes(b"of another plan")
    assert interrupted >= 2 and len(calls) == len(set(calls))
    assert tree(config.storage.root) == whole


def test_a_process_that_always_dies_is_one_line(tmp_path: Path) -> None:
    def run(call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, tasks.Outcome]]:
        for place, item in enumerate(items):
            yield place, tasks.Outcome(lost="killed by signal 9") if item == "b" else tasks.attempt(call, item)

    with pytest.raises(WorkerError, match=r"^b: its process died 3 times \(killed by signal 9\)"):
        tasks.run_all(run, str.upper, ["a", "b"])


def test_the_first_mistake_in_the_logs_is_told_whichever_comes_first() -> None:
    tried: list[str] = []

    def call(item: str) -> str:
        tried.append(item)
        if item in "bd":
            raise DataError(f"{item} is bad")
        return item

    def run(call: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, tasks.Outcome]]:
        yield from ((place, tasks.attempt(call, items[place])) for place in (3, 0, 1, 2))

    with pytest.raises(DataError, match=r"^b is bad$"):
        tasks.run_all(run, call, list("abcd"))
    assert sorted(tried) == list("abd"), "a mistake is not tried again"


def test_a_part_of_several_files_is_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2 * ROW_GROUP + 500
    lines = ["user,label,t"] + [f"u{i % 9},{i % 2},{NOON + rows - i}" for i in range(rows)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    config = config_of(tmp_path, fields=[{"name": "user"}], source={"group": ""})
    monkeypatch.setattr(merging, "FILE_BYTES", 1)
    reference = ingest(config)
    dataset = Dataset.load(reference)
    assert [file.rows for file in dataset.parts["all"].files] == [ROW_GROUP, ROW_GROUP, 500]
    read = {}
    for split in ("train", "valid", "test"):
        table = pa.concat_tables(Stream(reference, split, [ROW, TIME]).batches(10_000))
        assert table.num_rows == dataset.rows(split)
        read[split] = table[ROW].to_pylist()
    assert read["train"] + read["valid"] + read["test"] == list(range(rows))[::-1]
    one = Stream(reference, "train", [ROW], seed=5)
    whole = pa.concat_tables(one.batches(10_000))[ROW].to_pylist()
    assert sorted(whole) == sorted(read["train"])
    assert pa.concat_tables(one.batches(10_000, cursor=70_001))[ROW].to_pylist() == whole[70_001:]
    manifest = json.loads(Path(reference.uri).read_text())
    assert manifest["stats"]["user"]["cardinality"] == 9


def test_no_more_processes_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 8)
    monkeypatch.setattr(processes, "memory_bytes", lambda: 1.9 * engine_local.PROCESS_BYTES)
    with engine_local.tasks() as run:
        found = list(run(lambda _: os.getpid(), range(3)))
    assert {outcome.value for _, outcome in found} == {os.getpid()}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("quoting", ["minimal", "none"])
def test_any_cut_of_a_text_gives_the_same_records(
    tmp_path: Path, small: pytest.MonkeyPatch, end: str, quoting: str
) -> None:
    """Whatever ends a line, where quotes are closed or not, with a mark of UTF-8 or without."""
    for seed in range(6):
        draw = random.Random(seed)
        lines = [
            draw.choice(
                ["u,1,a", "u,1", "", '"u,1', 'u,x"', f'"u,{end}""x",2,a', '"u\n",3,a', '"u\r\r",4,a', "u,\xff,a"]
            )
            for _ in range(150)
        ]
        data = end.join(["user,price,label", *lines]) + draw.choice(["", end, '"', "\r"])
        path = tmp_path / f"{seed}.csv"
        path.write_bytes(b"\xef\xbb\xbf" * (seed % 2) + data.encode("latin-1"))
        source = config_of(tmp_path, source={"path": str(path), "quoting": quoting, "time": "", "group": ""}).source
        for block, piece in ((100, 300), (37, 40)):
            small.setattr(blocks, "BLOCK_BYTES", block)
            small.setattr(blocks, "LONGEST_VALUE", draw.choice([20, 60, 400]))
            cut(small, piece)
            with engine_local.tasks() as run:
                (found,) = pieces.spans_of_files(source, [str(path)], run)
            assert len(found) > 2
            whole, parted = (
                list(sources.read(source, each, [], False, more=["user", "price"]))
                for each in ([spans.Span(path=str(path))], found)
            )
            assert [(c.rows_R.tolist(), c.lines_R.tolist(), c.bad, c.read, c.records) for c in parted] == [
                (c.rows_R.tolist(), c.lines_R.tolist(), c.bad, c.read, c.records) for c in whole
            ]
