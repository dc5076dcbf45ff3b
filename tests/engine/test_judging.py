"""Laws of judging on the workers: what columns in one place say, for every number of workers and any distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from des_core.contracts import Dataset
from des_core.data.read.hashing import MISSING
from tests import columns
from tests.engine import tiny
from tests.engine.cases import judged_rows
from tests.engine.group import Group

WORKERS = (1, 2, 3, 4, 7)
CLICKS = {
    "many ties": {"seed": 1, "samples": 500, "digits": 1, "skew": False},
    "few ties": {"seed": 2, "samples": 501, "digits": 3, "skew": False},
    "close together and apart": {"seed": 3, "samples": 400, "digits": 12, "skew": True},
    "one score": {"seed": 4, "samples": 300, "digits": 0, "skew": False},
    "fewer rows than workers": {"seed": 6, "samples": 6, "digits": 12, "skew": False},
}


def expected(task: str, rows: dict[str, Any]) -> dict[str, Any]:
    """What the plain formulas over whole columns say."""
    data = judged_rows(**rows)
    labels, ours, theirs = (np.asarray(data[name], np.float64) for name in ("label", "ours", "theirs"))
    groups = columns.clusters(data["group"], MISSING)
    difference = columns.auc_difference if task == "click" else columns.rmse_difference
    by_group, by_row = (difference(labels, ours, theirs, each) for each in (groups, None))
    return {
        "metrics": columns.judge(task, data["label"], ours, data["group"], MISSING),
        "alone": columns.intervals(task, labels, ours),
        "grouped": columns.intervals(task, labels, ours, groups),
        "bins": columns.calibration_bins(labels, ours),
        "difference": by_group[0],
        "interval": by_group[1],
        "by_rows": by_row[1],
        "groups": int(groups.max()) + 1,
        "theirs": columns.judge(task, data["label"], theirs),
        "theirs_grouped": columns.intervals(task, labels, theirs, groups),
        "theirs_bins": columns.calibration_bins(labels, theirs),
        "roc": columns.roc(labels, ours) if task == "click" else [],
        "theirs_roc": columns.roc(labels, theirs) if task == "click" else [],
    }


def near(found: Any, wanted: Any) -> None:
    """Equal within 1e-12, whatever the form."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            near(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for each, other in zip(found, wanted, strict=True):
            near(each, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", CLICKS)
def test_workers_judge_as_columns_in_one_place_do(group: Callable[[int], Group], name: str) -> None:
    """AUC, GAUC, DeLong of one and of two models, by rows and by groups, log loss, bins and curve; in many rounds."""
    rows = CLICKS[name]
    wanted = expected("click", rows)
    counts = []
    for workers in WORKERS:
        answers = group(workers).do("judge", task="click", rows=rows, batch=97, round_=40)
        assert all(answer["compared"] == answers[0]["compared"] for answer in answers), "all workers know the same"
        assert max(answer["most"] for answer in answers) <= 1.5 * 40 + 4 * workers, "a buffer is a round's"
        found = answers[0]
        for key in ("metrics", "alone", "grouped", "bins", "roc"):
            near(found[key], wanted[key])
        compared, alone = found["compared"], found["compared_alone"]
        near([compared[key] for key in ("difference", "groups")], [wanted[key] for key in ("difference", "groups")])
        for key in ("interval", "by_rows"):
            near(compared[key], wanted[key])
        near(alone["interval"], wanted["by_rows"])
        assert (alone["by_rows"], alone["groups"]) == (None, None)
        near(compared["theirs"]["intervals"], wanted["theirs_grouped"])
        known = {key: value for key, value in wanted["theirs"].items() if key in compared["theirs"]["metrics"]}
        near(compared["theirs"]["metrics"], known)
        near([compared["calibration_bins"], compared["roc"]], [wanted["theirs_bins"], wanted["theirs_roc"]])
        counts.append(
            (found["wins"], found["roc"], found["histogram"], found["metrics"]["auc"], compared["difference"])
        )
    assert all(each == counts[0] for each in counts), "counts are the same to the last bit"


def test_workers_judge_ratings_as_columns_do(group: Callable[[int], Group]) -> None:
    rows = {"seed": 5, "samples": 300, "digits": 7, "skew": False}
    wanted = expected("rating", rows)
    for workers in (1, 3):
        found = group(workers).do("judge", task="rating", rows=rows, batch=50, round_=40)[0]
        for key in ("metrics", "alone", "grouped", "bins"):
            near(found[key], wanted[key])
        for key in ("difference", "interval", "by_rows"):
            near(found["compared"][key], wanted[key])


def test_the_histogram_is_numpys(group: Callable[[int], Group]) -> None:
    data = judged_rows(**CLICKS["few ties"])
    found = group(3).do("judge", task="click", rows=CLICKS["few ties"], batch=97, round_=40)[0]["histogram"]
    high = float(np.quantile(data["ours"], 0.999))
    assert found["high"] == high
    for name, part in (("clicked", data["label"] > 0.5), ("others", data["label"] < 0.5)):
        counts = np.histogram(data["ours"][part], 24, (0.0, high))[0]
        near(found[name], (counts / part.sum()).tolist())


def test_values_of_other_workers_are_found_by_key(group: Callable[[int], Group]) -> None:
    for workers in (1, 2, 3, 7):
        assert set(group(workers).do("look_up", seed=3, here=40, there=150, round_=20)) == {0.0}


@pytest.mark.parametrize("field", ["item", "tags"])
def test_slices_are_the_most_frequent_values_and_a_row_counts_once(
    group: Callable[[int], Group], tmp_path: Path, field: str
) -> None:
    config = tiny.config(tmp_path)
    reference = tiny.store(config, rows=4000)
    dataset = Dataset.load(reference)
    seven = (3, 40, "seven")
    stats = dataset.stats | {"item": dataset.stats["item"].model_copy(update={"top": (seven,)})}
    reference = dataset.model_copy(update={"stats": stats}).write(reference.uri)
    table = pq.read_table(tmp_path / "features/all/data.parquet").slice(3600)
    ours, theirs = np.random.default_rng(5).random((2, 400)).round(2)
    labels = table["_label"].to_numpy().astype(np.float64)
    rows: dict[int, set[int]] = {}
    for row, value in enumerate(table[field].to_pylist()):
        for key in value if isinstance(value, list) else [value]:
            if row % 7:
                rows.setdefault(key, set()).add(row)
    wanted = []
    for key in sorted(rows, key=lambda key: (-len(rows[key]), key))[:20]:
        at = np.array(sorted(rows[key]))
        if not 2 <= labels[at].sum() <= len(at) - 2:
            continue
        groups = columns.clusters(at % 11)
        difference, (low, _) = columns.auc_difference(labels[at], ours[at], theirs[at], groups)
        auc = columns.auc(labels[at], theirs[at]) or 0.0
        text = {MISSING: "(missing)", 3: "seven"} if field == "item" else {}
        value = text.get(key) or f"key {key & (1 << 64) - 1:016x}"
        numbers = {"auc": auc + difference, "champion_auc": auc, "difference": difference, "low": low}
        wanted.append({"field": field, "value": value, "samples": len(at), **numbers})
    assert len(wanted) > 5
    for workers in (1, 3, 4):
        words = {"config": config.model_dump_json(), "dataset": str(reference), "field": field, "seed": 5}
        near(group(workers).do("sliced", **words)[0], wanted)


def test_scores_that_are_not_finite_are_refused_by_the_name_of_the_first(
    group: Callable[[int], Group], tmp_path: Path
) -> None:
    config = tiny.config(tmp_path)
    words = {"config": config.model_dump_json(), "dataset": str(tiny.store(config, rows=4000))}
    for workers in (1, 3):
        group(workers).do("finite", **words, bad=[])
        told = "2 test rows have no finite prediction, the first is sample 0123456789abcdef:3617; is a number"
        with pytest.raises(AssertionError, match=told):
            group(workers).do("finite", **words, bad=[399, 17])
