"""The feature store: order, splits, what is left behind after bad logs, and the same bytes twice."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from des_core import storage
from des_core.config import Config, parse_config
from des_core.contracts import FILE, GROUP, LABEL, ROW, ROW_GROUP, TIME, Dataset, Reference, Segment
from des_core.data.feed.batches import Stream
from des_core.data.read.hashing import hash_text, splitmix64
from des_core.data.store import encoded, runs, sorting
from des_core.data.store.features import ingest, ingest_days, source_files
from des_core.errors import DataError, StorageError

FIELDS = [{"name": "user"}, {"name": "price", "kind": "numeric"}, {"name": "tags", "kind": "multi"}]
NOON = 1_767_268_800
"""2026-01-01 12:00 UTC."""

Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def config(split: dict[str, Any] | None = None, seed: int = 0, fields: Any = None, **source: Any) -> Config:
        for key in ("path", "train", "valid", "test"):
            if isinstance(source.get(key), str):
                source[key] = str(tmp_path / source[key])
        return parse_config(
            {
                "run": {"name": "r", "seed": seed},
                "source": source,
                "split": split or {},
                "fields": FIELDS if fields is None else fields,
                "storage": {"root": str(tmp_path / "root")},
            }
        )

    return config


def write_log(path: Path, rows: int, first: int = 0, start: int = NOON, step: int = 1) -> None:
    """Rows numbered by their price; times go down, so that order must be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["user,price,tags,label,t"]
    lines += [f"u{i % 7},{first + i},a|b{i % 3},{i % 2},{start - i * step}" for i in range(rows)]
    path.write_text("\n".join(lines) + "\n")


def load(reference: Reference) -> Dataset:
    return Dataset.load(reference)


def rows_of(reference: Reference, part: str) -> pa.Table:
    dataset = load(reference)
    root = reference.uri.removesuffix("/manifest.json")
    return pa.concat_tables([pq.read_table(f"{root}/{file.path}") for file in dataset.parts[part].files])


def store(folder: Path) -> Path:
    """The feature store that was made last."""
    return max((folder / "root/features").iterdir(), key=lambda path: path.stat().st_mtime_ns)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "digests.json"
    }


def test_columns_of_a_part(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 100)
    reference = ingest(make(path="log.csv", time="t", group="user"))
    dataset, table = load(reference), rows_of(reference, "all")
    assert table.schema.field("user").type == pa.int64()
    assert table.schema.field("price").type == pa.float32()
    assert table.schema.field("tags").type == pa.list_(pa.int64())
    assert [str(table.schema.field(name).type) for name in (LABEL, TIME, GROUP, FILE, ROW)] == [
        *("float", "int64", "int64", "int32", "int64")
    ]
    price = table.column("price").to_numpy().astype(int)
    assert price.tolist() == list(range(99, -1, -1)), "in time order"
    assert table.column(ROW).to_pylist() == price.tolist()
    assert table.column(TIME).to_pylist() == [(NOON - row) * 1_000_000 for row in price.tolist()]
    assert table.column(LABEL).to_pylist() == [row % 2 for row in price.tolist()]
    users = hash_text(pa.array([f"u{row % 7}" for row in price.tolist()]))
    assert table.column("user").to_pylist() == table.column(GROUP).to_pylist() == users.tolist()
    assert dataset.files == (storage.digest_file(str(tmp_path / "log.csv"))[:16],)
    (file,) = dataset.parts["all"].files
    assert file.sha256 == storage.digest_file(f"{store(tmp_path)}/{file.path}")
    assert file.sha256[:16] in file.path
    assert (dataset.has_time, dataset.has_group, dataset.task) == (True, True, "click")


def test_time_splits_are_the_last_rows(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 100)
    config = make({"valid": 0.2, "test": 0.1}, path="log.csv", time="t")
    dataset = load(ingest(config))
    assert dataset.splits == {
        "train": (Segment(part="all", start=0, stop=70),),
        "valid": (Segment(part="all", start=70, stop=90),),
        "test": (Segment(part="all", start=90, stop=100),),
    }
    assert dataset.spec == config.features_digest


def test_shuffles_follow_seed_file_and_row(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "a.csv", 60)
    write_log(tmp_path / "b.csv", 60, first=60)
    got = rows_of(ingest(make(seed=5, path="*.csv")), "all")
    keys = []
    for file in range(2):
        base = splitmix64(splitmix64(np.uint64(5)) ^ np.uint64(file))
        keys += [int(splitmix64(base ^ np.uint64(row))) for row in range(60)]
    expected = np.argsort(np.array(keys, np.uint64) >> np.uint64(1), kind="stable")
    assert got.column("price").to_numpy().astype(int).tolist() == expected.tolist()
    assert got.column(FILE).to_pylist() == (expected // 60).tolist()
    assert got.column(ROW).to_pylist() == (expected % 60).tolist()
    assert got.column(TIME).null_count == 120
    other = rows_of(ingest(make(seed=6, path="*.csv")), "all")
    assert other.column("price").to_pylist() != got.column("price").to_pylist()
    timed = rows_of(ingest(make({"by": "random"}, seed=5, path="*.csv", time="t")), "all")
    assert timed.column("price").to_pylist() == got.column("price").to_pylist()
    assert timed.column(TIME).null_count == 0


def test_equal_times_keep_the_order_of_files_and_rows(tmp_path: Path, make: Make) -> None:
    for number, name in enumerate("ab"):
        write_log(tmp_path / f"{name}.csv", 50, first=50 * number, step=0)
    got = rows_of(ingest(make(path="*.csv", time="t")), "all")
    assert got.column("price").to_pylist() == list(range(100))


def test_spilling_changes_nothing(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path / "log.csv", 3000, step=-1)
    config = make(path="log.csv")
    once = ingest(config)
    bytes_once = tree(tmp_path / "root")
    storage.delete(str(tmp_path / "root"))
    monkeypatch.setattr(encoded, "RUN_BYTES", 1)
    monkeypatch.setattr(runs, "RUN_ROWS", 100)
    monkeypatch.setattr("des_core.data.read.blocks.BLOCK_BYTES", 9000)
    assert ingest(config) == once
    assert tree(tmp_path / "root") == bytes_once


def test_row_groups_have_one_size(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", ROW_GROUP + 10)
    dataset = load(ingest(make(path="log.csv")))
    metadata = pq.ParquetFile(store(tmp_path) / dataset.parts["all"].files[0].path).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [ROW_GROUP, 10]


def test_days_in_the_path_become_parts(tmp_path: Path, make: Make) -> None:
    for day in range(1, 5):
        write_log(tmp_path / f"logs/2026-01-0{day}.csv", 10 * day, start=NOON + day * 86_400)
    config = make({"by": "day"}, path="logs/{day}.csv", time="t")
    assert source_files(config) == {f"2026-01-0{d}": [f"{tmp_path}/logs/2026-01-0{d}.csv"] for d in range(1, 5)}
    reference = ingest(config)
    dataset = load(reference)
    assert [(name, part.rows, part.first_file) for name, part in dataset.parts.items()] == [
        (f"2026-01-0{day}", 10 * day, day - 1) for day in range(1, 5)
    ]
    assert {name: [segment.part for segment in segments] for name, segments in dataset.splits.items()} == {
        "train": ["2026-01-01", "2026-01-02"],
        "valid": ["2026-01-03"],
        "test": ["2026-01-04"],
    }
    assert [storage.digest_file(f"{tmp_path}/logs/2026-01-0{d}.csv")[:16] for d in range(1, 5)] == list(dataset.files)
    named = make({"by": "day", "valid": "2026-01-01", "test": ["2026-01-02", "2026-01-03"]}, path="logs/{day}.csv")
    assert {name: [s.part[-1] for s in segments] for name, segments in load(ingest(named)).splits.items()} == {
        "train": ["4"],
        "valid": ["1"],
        "test": ["2", "3"],
    }
    shares = load(ingest(make({"valid": 0.2, "test": 0.35}, path="logs/{day}.csv", time="t")))
    assert shares.splits["train"] == (
        Segment(part="2026-01-01", start=0, stop=10),
        Segment(part="2026-01-02", start=0, stop=20),
        Segment(part="2026-01-03", start=0, stop=15),
    )
    assert shares.splits["valid"][0] == Segment(part="2026-01-03", start=15, stop=30)
    assert [shares.rows(name) for name in ("train", "valid", "test")] == [45, 20, 35]
    chance = load(ingest(make(path="logs/{day}.csv")))
    assert [len(chance.splits[name]) for name in ("train", "valid", "test")] == [4, 4, 4]


def test_a_field_that_one_day_does_not_have(tmp_path: Path, make: Make) -> None:
    """Values that are all missing are values; a column that is not there is a mistake, told with its file."""
    config = make({"by": "day"}, path="logs/{day}.csv", time="t")
    for day in range(1, 5):
        write_log(tmp_path / f"logs/2026-01-0{day}.csv", 60, start=NOON + 86_400 * (day - 1))
    second = tmp_path / "logs/2026-01-02.csv"
    second.write_text("user,price,tags,label,t\n" + "".join(f",,,{i % 2},{NOON + 86_400 + i}\n" for i in range(60)))
    dataset = load(ingest(config))
    assert dataset.rows("train") == 120
    assert {name: stats.missing_share for name, stats in dataset.stats.items()} == dict.fromkeys(
        ("user", "price", "tags"), 0.5
    )
    second.write_text("user,price,label,t\n" + "".join(f"u{i},{i},{i % 2},{NOON + 86_400 + i}\n" for i in range(60)))
    with pytest.raises(DataError, match=r"2026-01-02\.csv: no column 'tags' \(field tags\); it has user, price"):
        ingest(config)


def test_days_of_event_time_become_parts(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "a.csv", 60, step=3600)
    write_log(tmp_path / "b.csv", 60, first=60, step=3600)
    reference = ingest(make({"by": "day"}, path="*.csv", time="t", timezone="Asia/Tokyo"))
    dataset = load(reference)
    assert list(dataset.parts) == ["2025-12-30", "2025-12-31", "2026-01-01"]
    assert [dataset.parts[day].rows for day in dataset.parts] == [2 * 14, 2 * 24, 2 * 22]
    assert [part.first_file for part in dataset.parts.values()] == [0, 0, 0]
    assert len(dataset.files) == 2
    first = rows_of(reference, "2025-12-31")
    micros = first.column(TIME).to_numpy()
    assert (np.diff(micros) >= 0).all()
    assert first.column(FILE).to_pylist()[:2] == [0, 1]
    manifests = tree(tmp_path / "root")
    assert ingest(make({"by": "day"}, path="*.csv", time="t", timezone="Asia/Tokyo")) == reference
    assert tree(tmp_path / "root") == manifests


def test_given_files(tmp_path: Path, make: Make) -> None:
    for number, name in enumerate(("train", "valid", "test")):
        write_log(tmp_path / f"{name}.csv", 100, first=100 * number)
    three = load(ingest(make(train="train.csv", valid="valid.csv", test="test.csv", time="t")))
    assert {name: three.splits[name] for name in three.splits} == {
        name: (Segment(part=name, start=0, stop=100),) for name in ("train", "valid", "test")
    }
    held_out = []
    for more in ({"time": "t"}, {}):
        reference = ingest(make({"valid": 0.25}, train="train.csv", test="test.csv", **more))
        two = load(reference)
        cut = two.splits["train"][0].stop
        assert 60 < cut < 90
        assert two.splits["valid"] == (Segment(part="train", start=cut, stop=100),)
        rows = rows_of(reference, "train").column(ROW).to_pylist()
        assert sorted(rows) == list(range(100))
        held_out.append(set(rows[cut:]))
        assert not storage.exists(f"{store(tmp_path)}/valid")
        if more:
            assert rows[:cut] == sorted(rows[:cut], reverse=True), "in time order"
            assert rows[cut:] == sorted(rows[cut:], reverse=True)
    assert held_out[0] == held_out[1], "seed, file and row decide, not the order"


def test_twice_gives_the_same_bytes_and_does_no_work(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 500)
    config = make(path="log.csv", time="t")
    reference = ingest(config)
    before = tree(tmp_path / "root")
    times = {path: os.stat(tmp_path / "root" / path).st_mtime_ns for path in before}
    assert ingest(config) == reference
    assert {path: os.stat(tmp_path / "root" / path).st_mtime_ns for path in before} == times
    storage.delete(str(tmp_path / "root"))
    assert ingest(config) == reference
    assert tree(tmp_path / "root") == before


def test_a_changed_log_or_config_is_ingested_again_and_old_files_go(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 500)
    first = ingest(make(path="log.csv"))
    write_log(tmp_path / "log.csv", 600)
    second = ingest(make(path="log.csv"))
    assert first.sha256 != second.sha256
    write_log(tmp_path / "2026-01-01.csv", 600)
    third = ingest(make(path="{day}.csv"))
    names = {Path(path).name.split("-")[0] for path in tree(store(tmp_path))}
    assert names == {"manifest.json", "rows", "sketches"}
    assert load(second).rows("train") == 480 and storage.exists(second.uri), "another config has a store of its own"
    assert sorted(os.listdir(store(tmp_path))) == ["2026-01-01", "manifest.json"]
    assert load(third).rows("train") == 480


def test_crashes_leave_nothing_that_is_taken_for_whole(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 500)
    config = make(path="log.csv")
    reference = ingest(config)
    clean = tree(tmp_path / "root")
    features = store(tmp_path)
    (features / ".scratch-all").mkdir()
    (features / ".scratch-all/0.arrow").write_bytes(b"half")
    (features / "all/manifest.json").unlink()
    (features / "all/incoming-0.parquet.partial-1").write_bytes(b"half")
    assert ingest(config) == reference
    assert tree(tmp_path / "root") == clean
    next(features.glob("all/rows-*")).unlink()
    assert ingest(config) == reference
    next(features.glob("all/sketches-*")).write_bytes(b"half")
    (features / "manifest.json").write_bytes(b"{")
    assert ingest(config) == reference
    assert tree(tmp_path / "root") == clean


def test_a_crash_while_a_changed_log_is_ingested_keeps_the_old_features(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_log(tmp_path / "log.csv", 500)
    config = make(path="log.csv")
    reference = ingest(config)
    before = tree(tmp_path / "root")
    write_log(tmp_path / "log.csv", 600)

    def crash(self: object) -> Iterator[pa.Table]:
        yield pq.read_table(store(tmp_path) / load(reference).parts["all"].files[0].path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sorting.Sorter, "sorted", crash)
        with pytest.raises(KeyboardInterrupt):
            ingest(config)
    assert {path: data for path, data in tree(tmp_path / "root").items() if ".scratch-" not in path} == before
    assert load(ingest(config)).parts["all"].rows == 600
    assert not list(store(tmp_path).glob(".scratch-*"))


def test_a_users_own_folder_in_the_store_stays(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 100)
    config = make(path="log.csv")
    mine = Path(config.features_root) / "mine"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("keep")
    ingest(config)
    assert (store(tmp_path) / "mine/notes.txt").read_text() == "keep"


def test_rows_far_from_their_day_are_put_aside(tmp_path: Path, make: Make) -> None:
    """Outside the day they are counted; beyond recurring.allowed_lateness they are bad rows, with the reason."""
    config = make({"by": "day"}, path="logs/{day}.csv", time="t", max_bad_share=0.5, timezone="Asia/Tokyo")
    midnight = 1_767_193_200  # of 2026-01-01 in Tokyo
    seconds = [-86_401, -86_400, -1, 0, 86_399, 86_400, 2 * 86_400 - 1, 2 * 86_400]
    path = tmp_path / "logs/2026-01-01.csv"
    path.parent.mkdir()
    lines = [f"u,{i},a,{i % 2},{midnight + second}" for i, second in enumerate(seconds)]
    path.write_text("\n".join(["user,price,tags,label,t", *lines]) + "\n")
    part = ingest_days(config, {"2026-01-01": [str(path)]})["2026-01-01"]
    assert (part.part.rows, part.part.bad_rows, part.outside) == (6, 2, 4)
    listed = (store(tmp_path) / "2026-01-01/quarantine.csv").read_text().splitlines()
    assert [line.rsplit(",", 2)[1] for line in listed[1:]] == ["2", "9"]
    assert "recurring.allowed_lateness = 24 hours from 2026-01-01" in listed[1]


def test_one_day_at_a_time(tmp_path: Path, make: Make) -> None:
    fields = [*FIELDS[:1], {"name": "price", "kind": "numeric", "transform": "bucket"}]
    config = make({"by": "day"}, fields=fields, path="logs/{day}.csv", time="t")
    for day in range(1, 4):
        write_log(tmp_path / f"logs/2026-01-0{day}.csv", 100 * day, start=NOON + 86_400 * (day - 1))
    with pytest.raises(DataError, match="there are 1: 2026-01-02"):
        ingest(config, "2026-01-02")
    with pytest.raises(DataError, match="there are 2"):
        ingest(config, "2026-01-01")
    frozen = load(ingest(config, "2026-01-03"))
    assert list(frozen.parts) == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert load(ingest(config)) == frozen
    write_log(tmp_path / "logs/2026-01-04.csv", 1000, first=5000, start=NOON + 86_400 * 3)
    begun = store(tmp_path) / "2026-01-05/incoming-0.parquet.partial-7"
    begun.parent.mkdir()
    begun.write_bytes(b"another process writes this day")
    later = load(ingest(config, "2026-01-04"))
    assert [segment.part for segment in later.splits["train"]] == ["2026-01-01", "2026-01-02"]
    assert later.fields == frozen.fields, "numbers mean what they meant on the first day"
    assert later.stats != frozen.stats
    assert begun.exists()
    (tmp_path / "logs/2026-01-01.csv").unlink()
    assert list(load(ingest(config, "2026-01-04")).parts) == [f"2026-01-0{day}" for day in range(1, 5)]
    assert list(load(ingest(config)).parts) == [f"2026-01-0{day}" for day in range(2, 5)]
    assert not begun.exists()
    with pytest.raises(DataError, match="--day 2026-02-01: no logs of that day; there are 2026-01-02"):
        ingest(config, "2026-02-01")
    with pytest.raises(DataError, match=r"--day 2026-01-02 needs \{day\}"):
        ingest(make(path="logs/2026-01-02.csv"), "2026-01-02")


def test_statistics_are_of_the_train_rows(tmp_path: Path, make: Make) -> None:
    lines = ["user,price,tags,label"]
    lines += [f"{'hot' if i % 4 else i},{i if i % 5 else ''},{'x|y' if i % 2 else ''},{i % 2}" for i in range(1000)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    fields = [*FIELDS[:1], {"name": "price", "kind": "numeric", "transform": "standard"}, FIELDS[2]]
    reference = ingest(make(fields=fields, path="log.csv"))
    dataset = load(reference)
    train = rows_of(reference, "all").slice(0, dataset.splits["train"][0].stop)
    price = train.column("price").drop_null().to_numpy().astype(np.float64)
    assert dataset.fields[1].mean == pytest.approx(price.mean(), rel=1e-9)
    assert dataset.fields[1].std == pytest.approx(price.std(), rel=1e-9)
    users = train.column("user").to_numpy()
    hot = int(hash_text(pa.array(["hot"]))[0])
    assert dataset.stats["user"].top[0] == (hot, int((users == hot).sum()), "hot")
    assert dataset.stats["user"].cardinality == len(np.unique(users))
    assert dataset.stats["price"].missing_share == train.column("price").null_count / len(train)
    listed = train.column("tags").combine_chunks().flatten()
    assert dataset.stats["tags"].lookups_per_sample == len(listed) / len(train)
    assert {text for _, _, text in dataset.stats["tags"].top} == {"x", "y", "(missing)"}


def test_bad_records_go_to_quarantine(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 400)
    text = (tmp_path / "log.csv").read_text().splitlines()
    text[10], text[20], text[30] = "u,1", "u,many,a,1,1767225605", 'u,1,"a\nb",7,1767225605'
    (tmp_path / "log.csv").write_text("\n".join(text))
    reference = ingest(make(path="log.csv", time="t"))
    part = load(reference).parts["all"]
    assert (part.rows, part.bad_rows) == (397, 3)
    listed = (store(tmp_path) / part.quarantine).read_text().splitlines()
    assert listed == [
        "file,line,reason",
        f"{tmp_path}/log.csv,11,2 columns instead of 5",
        f"{tmp_path}/log.csv,21,column price: 'many' is not a number",
        f"{tmp_path}/log.csv,31,column label: the label '7' is not 0 or 1 or true or false; "
        "source.positive says which labels count as 1",
    ]
    rows = rows_of(reference, "all").column(ROW).to_pylist()
    assert sorted(rows) == [row for row in range(400) if row not in (9, 19, 29)]


def test_too_many_bad_records_fail_and_leave_nothing(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 100)
    with (tmp_path / "log.csv").open("a") as file:
        file.write(f"u,x,a,1,{1_767_225_605}\nu,y,a,1,{1_767_225_605}\nu\nu,z,a,1,{1_767_225_605}\n")
    with pytest.raises(DataError) as caught:
        ingest(make(path="log.csv", time="t"))
    assert str(caught.value) == (
        "4 of 104 records are bad (3.85%), more than source.max_bad_share = 0.01: "
        f"{tmp_path}/log.csv line 102: column price: 'x' is not a number; "
        f"{tmp_path}/log.csv line 103: column price: 'y' is not a number; "
        f"{tmp_path}/log.csv line 104: 1 columns instead of 5"
    )
    assert not (tmp_path / "root/features").exists()
    assert load(ingest(make(path="log.csv", time="t", max_bad_share=0.1))).parts["all"].bad_rows == 4


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ({"path": "gone.csv"}, {}, "gone.csv: no such file"),
        ({"path": "empty.csv"}, {}, "empty.csv: no records"),
        ({"path": "header.csv"}, {}, "header.csv: no records"),
        ({"path": "one.csv"}, {}, "the test split would be empty: there are 1 rows|the valid split"),
        ({"path": "log.csv", "time": "user"}, {}, "source.time = 'user' holds no times: 'u0'"),
        ({"path": "log.csv", "time": "t"}, {"by": "day"}, "there are 1: 2026-01-01"),
        ({"path": "log.csv", "time": "t"}, {"by": "day", "test": "2026-01-05"}, "split.test: day '2026-01-05' has no"),
        (
            {"path": "log.csv", "label": "price"},
            {},
            "column price: the label '2' is not 0 or 1 or true or false; source.positive says",
        ),
        ({"path": "hours.csv", "time": "t"}, {}, "source.time = 't' holds no times: '14102100' is 1970-06-13 as unix"),
        ({"path": "days.csv", "time": "t"}, {}, "source.time = 't' holds no times: '20141021' is 1970-08-22 as unix"),
        ({"path": "bad.csv", "max_bad_share": 1.0}, {}, "no good record among 2"),
        ({"path": "log.csv", "join": [{"path": "/gone.csv", "on": "user"}]}, {}, "/gone.csv: no such file"),
    ],
)
def test_logs_that_give_no_features(
    tmp_path: Path, make: Make, source: dict[str, Any], split: dict[str, Any], message: str
) -> None:
    write_log(tmp_path / "log.csv", 100)
    write_log(tmp_path / "one.csv", 1)
    write_log(tmp_path / "header.csv", 0)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "bad.csv").write_text("user,price,tags,label\nu,1,a,5\nu,1,a\n")
    for name, time in (("hours", "14102100"), ("days", "20141021")):
        (tmp_path / f"{name}.csv").write_text("user,price,tags,label,t\n" + f"u,1,a,1,{time}\n" * 5)
    with pytest.raises(DataError, match=message) as caught:
        ingest(make(split, **source))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "root/features").glob("*/manifest.json"))


def test_packed_and_plain_logs_hold_the_same_rows(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 100)
    plain = rows_of(ingest(make(path="log.csv")), "all")
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    assert rows_of(ingest(make(path="log.csv.gz")), "all") == plain


def test_synthetic_logs_are_made_first(tmp_path: Path) -> None:
    def config(**more: Any) -> Config:
        source = {"format": "synthetic", "days": 3, "rows_per_day": 500, **more}
        document = {"run": {"name": "r"}, "source": source, "split": {"by": "day"}}
        return parse_config({**document, "storage": {"root": str(tmp_path)}})

    reference = ingest(config())
    dataset = load(reference)
    assert list(dataset.parts) == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert [dataset.rows(name) for name in ("train", "valid", "test")] == [500, 500, 500]
    assert (dataset.has_time, dataset.has_group) == (True, True)
    logs = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "raw").rglob("*.csv")}
    assert len(logs) == 6
    assert ingest(config()) == reference
    assert {path: os.stat(path).st_mtime_ns for path in logs} == logs
    assert list(source_files(config(days=4))) == [f"2026-01-0{day}" for day in range(1, 5)]
    assert list(load(ingest(config(days=4))).parts)[3:] == ["2026-01-04"]


def test_movielens(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "movielens-latest-small"
    source = {"path": str(folder / "ratings.csv"), "label": "rating", "positive": ">= 4", "time": "timestamp"}
    config = parse_config(
        {
            "run": {"name": "r"},
            "source": {**source, "group": "userId", "join": [{"path": str(folder / "movies.csv"), "on": "movieId"}]},
            "storage": {"root": str(tmp_path)},
            "fields": [
                {"name": "user", "column": "userId"},
                {"name": "genres", "kind": "multi"},
                {"name": "year", "column": "title", "derive": r"regex:\((\d{4})\)\s*$"},
                {"name": "hour", "column": "timestamp", "derive": "hour"},
                {"name": "weekday", "column": "timestamp", "derive": "weekday"},
            ],
        }
    )
    reference = ingest(config)
    dataset, table = load(reference), rows_of(reference, "all")
    assert [dataset.rows(name) for name in ("train", "valid", "test")] == [80_668, 10_084, 10_084]
    assert table.column(LABEL).to_numpy().mean() == pytest.approx(0.482, abs=0.001)
    assert (np.diff(table.column(TIME).to_numpy()) >= 0).all()
    stats = dataset.stats
    assert stats["genres"].top[0][2] == "Drama"
    assert (stats["hour"].cardinality, stats["weekday"].cardinality) == (24, 7)
    assert stats["year"].missing_share < 0.001


def test_criteo_needs_no_fields(shared_data: Path, tmp_path: Path) -> None:
    source = {"format": "criteo", "path": str(shared_data / "criteo-10k")}
    config = parse_config({"run": {"name": "r"}, "source": source, "storage": {"root": str(tmp_path)}})
    reference = ingest(config)
    dataset, table = load(reference), rows_of(reference, "all")
    assert (len(dataset.fields), len(table)) == (39, 10_000)
    assert table.column(LABEL).to_numpy().mean() == pytest.approx(0.218, abs=0.001)
    assert dataset.stats["C1"].top[0][2] == "05db9164"
    assert dataset.parts["all"].bad_rows == 0


def test_memory_does_not_grow_with_the_log(tmp_path: Path, make: Make) -> None:
    script = """
import sys, pyarrow as pa
from des_core import cpus
from des_core.config import parse_config
from des_core.data.read import blocks
from des_core.data.store import encoded, merging, sorting
from des_core.data.store.features import ingest
blocks.BLOCK_BYTES, encoded.RUN_BYTES, merging.FILE_BYTES, sorting.SLICE_ROWS = 1 << 18, 1 << 20, 1 << 20, 4096
cpus.cpu_quota = lambda: 1
ingest(parse_config(sys.argv[1]))
print(pa.default_memory_pool().max_memory())
"""
    peaks = []
    for rows in (70_000, 300_000):
        write_log(tmp_path / f"{rows}.csv", rows)
        config = make(path=f"{rows}.csv").model_dump_json()
        command = [sys.executable, "-c", script, config]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        peaks.append(int(done.stdout))
        storage.delete(str(tmp_path / "root"))
    assert peaks[1] < 1.5 * peaks[0], peaks


def test_a_flipped_bit_in_stored_rows_is_found(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 2000)
    reference = ingest(make(path="log.csv", time="t", group="user"))
    part = load(reference).parts["all"]
    path = store(tmp_path) / part.files[0].path
    whole = path.read_bytes()
    columns = [LABEL, GROUP, TIME, ROW, "user", "price", "tags"]

    def read() -> pa.Table:
        return pa.concat_tables(Stream(reference, "train", columns).batches(1 << 20))

    expected, found = read(), 0
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(whole), 300).tolist():
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            assert read().equals(expected), f"byte {place // 8} of {len(whole)}"
        except StorageError as error:
            assert "is damaged or missing" in str(error) and "\n" not in str(error)
            found += 1
    assert found > 250
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="is damaged or missing"):
        read()
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="is damaged or missing"):
        read()


def test_damaged_sketches_are_made_again(tmp_path: Path, make: Make) -> None:
    write_log(tmp_path / "log.csv", 500)
    config = make(path="log.csv", time="t")
    before = storage.read_bytes(ingest(config).uri)
    for path in store(tmp_path).rglob("sketches-*.arrow"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    assert storage.read_bytes(ingest(config).uri) == before


def test_a_field_newer_than_the_logs_is_missing_on_days_before_it(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for day, names in enumerate(("user,label,t", "user,label,t,brand,size"), 1):
        more = "" if day == 1 else ",acme,3"
        lines = [f"u{n},{n % 2},2026-01-0{day}T00:00:{n:02d}{more}" for n in range(10)]
        (tmp_path / f"2026-01-0{day}.csv").write_text("\n".join([names, *lines]) + "\n")
    fields = [{"name": "user"}, {"name": "brand"}, {"name": "size", "kind": "numeric"}, {"name": "m", "kind": "multi"}]
    fields[3]["column"] = "brand"
    config = make(path="{day}.csv", time="t", fields=fields, split={"by": "time"})
    files = source_files(config)
    made = ingest_days(config, files)
    assert list(made) == ["2026-01-01", "2026-01-02"]
    told = capsys.readouterr().err
    assert told.count("event=no_column") == 2 and "column=brand wanted_for='field brand'" in told
    old, new = (pq.read_table(store(tmp_path) / part.part.files[0].path) for part in made.values())
    assert len(set(old.column("brand").to_pylist())) == 1 != set(new.column("brand").to_pylist())
    assert old.column("size").null_count == 10 and new.column("size").null_count == 0
    assert {len(keys) for keys in old.column("m").to_pylist()} == {1}, "the key of a missing value"
    # The last day is where a wrong name shows, before any other day is read.
    with pytest.raises(DataError, match=r"2026-01-02.csv: no column 'brnd' .*did you mean 'brand'"):
        ingest_days(make(path="{day}.csv", time="t", fields=[{"name": "brnd"}]), files)
    assert "part=2026-01-01" not in capsys.readouterr().err
    # The columns that make a row a sample are needed on every day.
    (tmp_path / "2026-01-01.csv").write_text("user,t\nu1,2026-01-01T00:00:00\n")
    with pytest.raises(DataError, match=r"2026-01-01.csv: no column 'label' \(source.label\)"):
        ingest_days(config, files)
