"""Planted clicks: the truth is told, days agree, and pairs matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.csv as pacsv
import pytest

from des_core.data.read import synthetic
from des_core.data.read.paths import days_of_paths, files_of
from des_core.data.read.synthetic import FIELDS, day_name, generate


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Rank formula; scores have no ties worth the name."""
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable") + 1
    positives = labels.sum()
    area = ranks[labels == 1].sum() - positives * (positives + 1) / 2
    return float(area / positives / (len(labels) - positives))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    assert generate(str(folder), 3, 20_000, 0) == [str(folder / f"2026-01-0{day}.csv") for day in (1, 2, 3)]
    return folder


def test_files_and_columns(logs: Path) -> None:
    assert sorted(path.name for path in logs.iterdir()) == [
        "2026-01-01.csv",
        "2026-01-02.csv",
        "2026-01-03.csv",
        "truth",
    ]
    table = pacsv.read_csv(logs / "2026-01-02.csv")
    truth = pacsv.read_csv(logs / "truth/2026-01-02.csv")
    assert {"time", "label"} | {field.column or field.name for field in FIELDS} == set(table.column_names)
    times = table.column("time").to_numpy()
    assert (np.diff(times) >= 0).all()
    assert 1_767_312_000 <= times[0] < times[-1] < 1_767_312_000 + 86_400
    assert truth.column("row").to_pylist() == list(range(20_000))
    assert truth.column_names == ["row", "probability"]
    assert set(table.column("label").unique().to_pylist()) == {0, 1}


def test_a_folder_or_day_path_never_reads_the_truth(logs: Path) -> None:
    expected = [str(logs / f"2026-01-0{day}.csv") for day in (1, 2, 3)]
    assert files_of(str(logs), "csv") == expected
    assert days_of_paths(str(logs / "{day}.csv"), "csv") == {path[-14:-4]: [path] for path in expected}


def test_the_same_arguments_give_the_same_bytes(logs: Path, tmp_path: Path) -> None:
    generate(str(tmp_path / "again"), 2, 20_000, 0)
    for name in ("2026-01-01.csv", "2026-01-02.csv", "truth/2026-01-02.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (logs / name).read_bytes()
    generate(str(tmp_path / "other"), 1, 20_000, 1)
    assert (tmp_path / "other/2026-01-01.csv").read_bytes() != (logs / "2026-01-01.csv").read_bytes()


def test_logs_made_once_are_kept_and_others_go(tmp_path: Path) -> None:
    first = synthetic.generate_once(str(tmp_path), 3, 100, 0)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert synthetic.generate_once(str(tmp_path), 3, 100, 0) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == stamps
    (tmp_path / "2026-01-02.csv").unlink()
    synthetic.generate_once(str(tmp_path), 3, 100, 0)
    assert (tmp_path / "2026-01-02.csv").exists()
    assert list(synthetic.generate_once(str(tmp_path), 2, 50, 0)) == ["2026-01-01", "2026-01-02"]
    assert sorted(path.name for path in tmp_path.rglob("*.csv")) == ["2026-01-01.csv"] * 2 + ["2026-01-02.csv"] * 2
    assert len((tmp_path / "2026-01-01.csv").read_text().splitlines()) == 51


@pytest.mark.parametrize("seed", range(5))
def test_the_truth_is_worth_knowing(seed: int) -> None:
    for day in (0, 2):
        table, probability = synthetic._one_day(day, 20_000, seed)
        labels = table.column("label").to_numpy()
        assert 0.75 <= auc(labels, probability) <= 0.85
        assert labels.mean() == pytest.approx(probability.mean(), abs=0.01)


def test_clicks_are_drawn_from_the_truth(logs: Path) -> None:
    labels = pacsv.read_csv(logs / "2026-01-01.csv").column("label").to_numpy()
    probability = pacsv.read_csv(logs / "truth/2026-01-01.csv").column("probability").to_numpy()
    for low in np.arange(0, 1, 0.1):
        inside = (probability >= low) & (probability < low + 0.1)
        spread = np.sqrt(probability[inside].mean() / inside.sum())
        assert abs(labels[inside].mean() - probability[inside].mean()) < 4 * spread


def test_new_values_missing_values_and_a_long_tail(logs: Path) -> None:
    seen: set[str] = set()
    for day in range(3):
        table = pacsv.read_csv(logs / f"{day_name(day)}.csv")
        users = table.column("user").to_pylist()
        if day:
            fresh = sum(user not in seen for user in users) / len(users)
            assert 0.005 < fresh < 0.05
        seen |= set(users)
        missing = [sum(not value for value in table.column(name).to_pylist()) for name in ("region", "tags", "price")]
        assert all(0.01 < count / len(users) < 0.1 for count in missing)
        assert table.column("price").null_count
        _, counts = np.unique(users, return_counts=True)
        counts = np.sort(counts)[::-1]
        assert counts[:10].sum() > 0.25 * len(users)
        assert any("|" in tags for tags in table.column("tags").to_pylist())


def test_pairs_say_what_single_values_do_not(logs: Path) -> None:
    """The share of the truth that single values explain is well below all of it."""
    table, probability = synthetic._one_day(0, 20_000, 0)
    logit = np.log(probability / (1 - probability))
    columns = [table.column(name).to_numpy(zero_copy_only=False) for name in ("category", "site", "slot", "region")]
    single = np.zeros(len(logit))
    for _ in range(20):
        for column in columns:
            _, place = np.unique(column, return_inverse=True)
            rest = logit - single
            single += (np.bincount(place, rest) / np.bincount(place))[place]
    labels = table.column("label").to_numpy()
    assert auc(labels, single) < auc(labels, probability) - 0.1
