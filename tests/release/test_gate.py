"""Laws of the gate: bounds decide, doubts keep the champion, and the same files give the same verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.stages import resolve
from des_core import storage
from des_core.config import GateConfig, parse_config
from des_core.contracts import Reference
from des_core.errors import ConfigError, StorageError, UserError
from des_core.release.judge.gate import decide, judge
from des_core.verdict import Champion, NewRows, SliceDifference, Verdict
from tests import columns
from tests.finished import finished_run, predictions_of, write_champion

NONE = Champion(status="none", report="")
SCORED = Champion(status="scored", version="4", report="")
LOST = Champion(status="not_comparable", version="4", reason="column 'age' is gone", report="")
REFERRED = Champion(status="scored", version="4", reference="2", report="")


def judged(
    bounds: GateConfig,
    labels: np.ndarray,
    scores: np.ndarray,
    champion: Champion = NONE,
    theirs: np.ndarray | None = None,
    reference: np.ndarray | None = None,
    task: str = "click",
    groups: np.ndarray | None = None,
    slices: dict[str, tuple[SliceDifference, ...]] | None = None,
    **more: Any,
) -> Verdict:
    """The verdict on a candidate whose rows, and those of the versions beside it, are measured in one place."""
    found = {}
    if theirs is not None:
        found["comparison"] = columns.comparison(task, labels, scores, theirs, groups, slices=slices or {})
    if reference is not None:
        found["reference_comparison"] = columns.comparison(task, labels, scores, reference, groups)
    candidate = columns.measured(task, labels, scores, groups)
    return judge(bounds, task, candidate, champion.model_copy(update=found), **more)


LABELS, SCORES = predictions_of(2_000, 1.4, 3)
AUC = columns.auc(LABELS, SCORES)
assert AUC is not None
WORSE = np.where(np.arange(2_000) % 10 == 0, 1 - SCORES, SCORES)
LOW = columns.auc_difference(LABELS, WORSE, SCORES)[1][0]
SLIGHTLY = np.clip(SCORES + np.random.default_rng(2).normal(0, 0.02, 2_000), 0.001, 0.999)
"""As good as SCORES but for noise."""
BOUNDS = GateConfig()
SIZE = {"rows": 900.0, "admitted": 1_000.0, "evicted": 100.0, "load": 0.5}
GOOD_DAY = {"samples": 5_000.0, "auc": 0.75, "logloss": 0.5, "ne": 0.9, "calibration": 1.0}
CALM = {"psi": 0.02, "new_share": 0.03, "missing_share": 0.05, "missing_before": 0.04}


def new_rows(drift: dict[str, float] | None = None, **days: dict[str, float]) -> NewRows:
    """The record of a run of 2026-01-04 whose champion scored d3 and d4, the 3rd and the 4th."""
    return NewRows(
        as_of="2026-01-04",
        version="4",
        drift={"user": CALM, "item": CALM | (drift or {})},
        days={f"2026-01-0{day[1]}": GOOD_DAY | numbers for day, numbers in ({"d4": {}} | days).items()},
    )


@dataclass(frozen=True)
class Case:
    """What is judged, and what must come of it."""

    verdict: str
    word: str
    """In one of the reasons."""
    bounds: GateConfig = BOUNDS
    scores: np.ndarray = field(default_factory=lambda: SCORES)
    champion: Champion = NONE
    theirs: np.ndarray | None = None
    reference: np.ndarray | None = None
    new_rows: NewRows | None = None
    days_at_fault: tuple[str, ...] = ()


def faulty(word: str, rows: NewRows, *days: str, **bounds: float) -> Case:
    """A candidate as good as the champion, on data that are not."""
    return Case("reject", word, GateConfig(**bounds), SCORES, SCORED, SCORES, None, rows, days)


D3, D4 = "2026-01-03", "2026-01-04"
CASES = {
    "first model": Case("accept", "no champion"),
    "equal": Case("accept", "+0.0000 (+0.0000 to +0.0000) from version 4", champion=SCORED, theirs=SCORES),
    "better": Case("accept", "within gate.max_auc_drop", champion=SCORED, theirs=WORSE),
    "equal but for noise": Case("accept", "within", scores=SLIGHTLY, champion=SCORED, theirs=SCORES),
    "worse": Case("reject", "beyond gate.max_auc_drop = 0.015", scores=WORSE, champion=SCORED, theirs=SCORES),
    "surely within": Case("accept", "within", GateConfig(max_auc_drop=-LOW * 1.001), WORSE, SCORED, SCORES),
    "not surely within": Case("reject", "beyond", GateConfig(max_auc_drop=-LOW * 0.999), WORSE, SCORED, SCORES),
    "too few rows to tell": Case(
        "reject", "so few rows tell no difference below", GateConfig(max_auc_drop=1e-4), SLIGHTLY, SCORED, SCORES
    ),
    "no drop at all": Case("reject", "beyond", GateConfig(max_auc_drop=0), SCORES, SCORED, SCORES),
    "auc": Case("reject", "gate.min_auc = 0.99", GateConfig(min_auc=0.99)),
    "auc, champion worse": Case("reject", "gate.min_auc", GateConfig(min_auc=0.99), SCORES, SCORED, WORSE),
    "auc at its bound": Case("accept", "at least", GateConfig(min_auc=AUC)),
    "log loss": Case("reject", "log loss 0.5074 is above gate.max_logloss = 0.5", GateConfig(max_logloss=0.5)),
    "log loss kept": Case("accept", "AUC", GateConfig(max_logloss=0.51)),
    "entropy": Case("reject", "normalised entropy 0.7830 is above", GateConfig(max_ne=0.78)),
    "entropy by default": Case("reject", "gate.max_ne = 1", scores=SCORES**0.1),
    "calibration low": Case("reject", "calibration 0.9579 is below", GateConfig(min_calibration=0.96)),
    "calibration high": Case("reject", "calibration 0.9579 is above", GateConfig(max_calibration=0.95)),
    "load": Case("reject", "load 0.50 of the index is above gate.max_load = 0.4", GateConfig(max_load=0.4)),
    "rows": Case("reject", "900 rows is above gate.max_rows = 899", GateConfig(max_rows=899)),
    "evicted": Case("reject", "10.0% of the rows admitted", GateConfig(max_evicted_share=0.09)),
    "table kept": Case("accept", "AUC", GateConfig(max_load=0.5, max_rows=900, max_evicted_share=0.1)),
    "few": Case("inconclusive", "gate.min_samples = 2,001", GateConfig(min_samples=2_001)),
    "few, with champion": Case("inconclusive", "2,000 test", GateConfig(min_samples=2_001), SCORES, SCORED, SCORES),
    "not finite": Case("reject", "not finite", scores=np.where(SCORES > 0.9, np.nan, SCORES)),
    "champion not finite": Case(
        "not_comparable", "not finite", champion=SCORED, theirs=np.where(SCORES > 0.9, np.inf, SCORES)
    ),
    "champion lost": Case("not_comparable", "column 'age' is gone", champion=LOST),
    "champion lost, bounds decide": Case(
        "accept", "gate.on_schema_change = absolute", GateConfig(on_schema_change="absolute"), SCORES, LOST
    ),
    "champion lost, bounds reject": Case(
        "reject", "gate.min_auc", GateConfig(on_schema_change="absolute", min_auc=0.99), SCORES, LOST
    ),
    "champion lost, bad anyway": Case("reject", "gate.min_auc", GateConfig(min_auc=0.99), champion=LOST),
    "small losses added up": Case(
        "reject", "from the reference version 2's", BOUNDS, WORSE, REFERRED, WORSE, reference=SCORES
    ),
    "reference kept": Case("accept", "from the reference version 2's", BOUNDS, SCORES, REFERRED, WORSE, SCORES),
    "reference lost": Case(
        "not_comparable",
        "the reference version 2 cannot be compared: format",
        champion=REFERRED.model_copy(update={"reference_reason": "format"}),
        theirs=SCORES,
    ),
    "good day": Case("accept", "within", BOUNDS, SCORES, SCORED, SCORES, None, new_rows()),
    "psi": faulty("the day's data: field item: population stability index 0.600", new_rows({"psi": 0.6}), D4),
    "new values": faulty("40.0% of the values are new", new_rows({"new_share": 0.4}), D4, max_new_share=0.3),
    "missing": faulty("+36.0% rows without a value", new_rows({"missing_share": 0.4}), D4),
    "drift off": Case("accept", "", GateConfig(max_psi=1), SCORES, SCORED, SCORES, None, new_rows({"psi": 0.6})),
    "labels shuffled": faulty(
        "the day's data: on the new rows of 2026-01-04 version 4's normalised entropy 1.0900 is above gate.max_ne = 1",
        new_rows(d4={"auc": 0.51, "ne": 1.09}),
        D4,
    ),
    "champion's own auc": faulty(
        "version 4's AUC 0.6000 is below gate.min_auc", new_rows(d4={"auc": 0.6}), D4, min_auc=0.7
    ),
    "an earlier day of the window": faulty("rows of 2026-01-03", new_rows(d3={"ne": 1.1, "samples": 4_000.0}), D3),
    "both days": faulty("rows of 2026-01-03", new_rows({"psi": 2.0}, d3={"ne": 1.1}), D3, D4),
    "rest of a day": Case(
        "accept", "within", BOUNDS, SCORES, SCORED, SCORES, None, new_rows(d3={"ne": 1.1, "samples": 500.0})
    ),
    "a person took the days": Case(
        "accept",
        "within",
        champion=SCORED,
        theirs=SCORES,
        new_rows=new_rows({"psi": 2.0}, d3={"ne": 1.1}).model_copy(update={"accepted": (D3, D4)}),
    ),
    "few new rows": Case(
        "accept", "within", BOUNDS, SCORES, SCORED, SCORES, None, new_rows(d4={"ne": 1.1, "samples": 99.0})
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts(name: str) -> None:
    case = CASES[name]
    found = judged(
        case.bounds,
        LABELS,
        case.scores,
        case.champion,
        case.theirs,
        case.reference,
        new_rows=case.new_rows,
        table=SIZE,
    )
    assert found.verdict == case.verdict, found.reasons
    assert found.accepted == (case.verdict == "accept")
    assert any(case.word in reason for reason in found.reasons), found.reasons
    assert (found.champion, found.reference) == (case.champion.version, case.champion.reference)
    assert (found.data_at_fault, found.days_at_fault) == (bool(case.days_at_fault), case.days_at_fault)
    if found.accepted and "took the days" not in name:
        assert all(check.kept for check in found.checks)
    Verdict.model_validate_json(found.model_dump_json())


def test_every_bound_has_its_line_and_every_number_its_interval() -> None:
    bounds = GateConfig(max_logloss=1, min_calibration=0.5, max_calibration=2, max_load=0.9, max_rows=10_000)
    rows = new_rows({"psi": 0.03})
    found = judged(bounds, LABELS, SLIGHTLY, REFERRED, SCORES, WORSE, new_rows=rows, table=SIZE)
    names = [check.name for check in found.checks]
    assert len(names) == len(set(names))
    assert set(names) >= {
        "min_auc",
        "max_logloss",
        "max_ne",
        "min_calibration",
        "max_calibration",
        "max_load",
        "max_rows",
        "max_auc_drop",
        "max_auc_drop reference",
        "max_psi item",
        "min_auc 2026-01-04",
        "max_ne 2026-01-04",
    }
    assert [line.field for line in found.drift] == ["user", "item"] and all(line.kept for line in found.drift)
    for name in ("auc", "logloss", "calibration", "champion_auc", "reference_auc", "auc_difference"):
        low, high = found.intervals[name]
        assert low < found.metrics[name] < high, name
    assert found.intervals["reference_auc_difference"][0] > 0


@pytest.mark.parametrize("only", [0.0, 1.0])
def test_one_class_cannot_decide(only: float) -> None:
    found = judged(BOUNDS, np.full(2_000, only), SCORES, SCORED, SCORES)
    assert found.verdict == "inconclusive"
    assert "both classes" in found.reasons[0]


def test_a_single_click_cannot_decide() -> None:
    found = judged(BOUNDS, np.arange(2_000) == 7, SCORES, SCORED, SCORES)
    assert found.verdict == "inconclusive"
    assert "two of each class" in found.reasons[0]


def test_no_test_rows_cannot_decide() -> None:
    assert judged(BOUNDS, np.zeros(0), np.zeros(0)).verdict == "inconclusive"


def test_bad_data_are_named_even_where_the_rows_cannot_decide() -> None:
    found = judged(BOUNDS, np.zeros(2_000), SCORES, SCORED, SCORES, new_rows=new_rows({"psi": 3.0}))
    assert (found.verdict, found.data_at_fault) == ("reject", True)


def beside(rows: slice) -> Verdict:
    """Of a candidate on all rows, a champion that could score some of them."""
    compared = columns.comparison("click", LABELS[rows], SCORES[rows], WORSE[rows])
    champion = SCORED.model_copy(update={"comparison": compared})
    return judge(BOUNDS, "click", columns.measured("click", LABELS, SCORES), champion)


def test_only_rows_that_both_scored_are_compared() -> None:
    found = beside(slice(500, None))
    assert found.metrics["compared_samples"] == 1_500
    assert found.metrics["champion_auc"] == columns.auc(LABELS[500:], WORSE[500:])
    assert found.metrics["auc"] == AUC


def test_too_few_rows_in_common_keep_the_champion() -> None:
    found = beside(slice(50))
    assert (found.verdict, found.accepted) == ("inconclusive", False)
    assert "version 4" in found.reasons[0]


def test_an_equal_candidate_is_accepted_as_often_as_the_interval_says() -> None:
    """Whose lower bound is above minus the margin: half of the time at the bound itself, less than that for worse."""
    accepted = 0
    for seed in range(60):
        labels, scores = predictions_of(2_000, 1.4, seed)
        noise = np.random.default_rng(seed).normal(0, 0.02, 2_000)
        ours, theirs = (np.clip(scores + side * noise, 0.001, 0.999) for side in (1, -1))
        accepted += judged(BOUNDS, labels, ours, SCORED, theirs).accepted
    assert accepted >= 57


SLICED = GateConfig(slices=("site",), slice_min_samples=200, max_auc_drop=0.2)
IN_SEVEN = np.where(np.arange(2_000) % 3 == 0, 1 - SCORES, SCORES)
"""Wrong on the rows of one value."""


def sliced(bounds: GateConfig, scores: np.ndarray) -> Verdict:
    """The verdict where a third of the rows are of site seven, a third of another one, and few of none."""
    values = {
        "seven": np.arange(0, 2_000, 3),
        "eight": np.arange(1, 2_000, 3),
        "(missing)": np.array([2, 5, 8, 11, 14]),
    }
    lines = [columns.slice_of("site", name, LABELS[at], scores[at], SCORES[at]) for name, at in values.items()]
    return judged(bounds, LABELS, scores, SCORED, SCORES, slices={"site": tuple(lines), "other": tuple(lines)})


def test_a_slice_that_got_worse_rejects_what_passes_as_a_whole() -> None:
    generous = GateConfig(max_auc_drop=1, max_ne=10)
    assert judged(generous, LABELS, IN_SEVEN, SCORED, SCORES).accepted
    found = sliced(SLICED.model_copy(update={"max_auc_drop": 1.0, "max_ne": 10.0}), IN_SEVEN)
    assert found.verdict == "reject"
    assert found.reasons[0].startswith("site = seven: AUC differs by -")
    assert [(line.field, line.value, line.samples, line.kept) for line in found.slices] == [
        ("site", "seven", 667, False),
        ("site", "eight", 667, True),
    ]
    allowed = SLICED.model_copy(update={"max_auc_drop": 1.0, "max_ne": 10.0, "slice_max_auc_drop": 1.0})
    assert sliced(allowed, IN_SEVEN).accepted


def test_slices_that_hold_are_told_in_one_line_and_small_ones_not_at_all() -> None:
    found = sliced(SLICED, SLIGHTLY)
    assert found.accepted
    assert [check.name for check in found.checks if check.name.startswith("slice")] == ["slice_max_auc_drop site"]
    assert not sliced(SLICED.model_copy(update={"slice_min_samples": 668}), SLIGHTLY).slices


def test_a_field_by_which_nobody_compared_is_asked_for(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "gate.slices=['user']")
    labels, scores = predictions_of(4_000, 1.4, 1)
    compared = columns.comparison("click", labels, scores, scores)
    write_champion(run, status="scored", version="9", comparison=compared)
    with pytest.raises(UserError, match=r"champion.json: the champion was not compared by user; run des evaluate"):
        decide(run)
    write_champion(run, status="scored", version="9", comparison=compared, slices=("user",))
    assert Verdict.load(decide(run)).accepted


@pytest.mark.parametrize(
    ("bounds", "noise", "verdict"),
    [
        (GateConfig(max_rmse=0.5), 0.1, "accept"),
        (GateConfig(max_rmse=0.05), 0.1, "reject"),
        (GateConfig(max_rmse_rise=0.01), 0.3, "reject"),
        (GateConfig(max_rmse_rise=0.21), 0.3, "reject"),
        (GateConfig(max_rmse_rise=0.5), 0.3, "accept"),
    ],
)
def test_ratings_are_judged_by_rmse(bounds: GateConfig, noise: float, verdict: str) -> None:
    random = np.random.default_rng(7)
    labels = random.integers(1, 6, 500).astype(np.float64)
    ours, theirs = labels + random.normal(0, noise, 500), labels + random.normal(0, 0.1, 500)
    found = judged(bounds, labels, ours, SCORED, theirs, task="rating")
    assert found.verdict == verdict
    assert found.metrics["rmse"] == pytest.approx(np.sqrt(np.mean((ours - labels) ** 2)))
    low, high = found.intervals["rmse_difference"]
    assert low < found.metrics["rmse_difference"] < high


def test_equal_ratings_are_no_doubt() -> None:
    assert judged(GateConfig(max_rmse=1), np.full(200, 3.0), np.full(200, 3.1), task="rating").accepted


def test_a_verdict_is_kept_until_what_it_judged_changes(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    write_champion(run)
    first = decide(run)
    written = Path(run.path("gate.json")).stat().st_mtime_ns
    assert decide(run) == first
    assert Path(run.path("gate.json")).stat().st_mtime_ns == written
    labels, scores = predictions_of(4_000, 1.4, 1)
    compared = columns.comparison("click", labels, scores, np.sqrt(scores))
    write_champion(run, status="scored", version="9", comparison=compared)
    second = Verdict.load(decide(run))
    assert (second.champion, second.inputs) == ("9", str(run.reference("champion.json")))
    assert Reference.parse(second.inputs).read()["version"] == "9"


def test_slices_of_a_format_with_its_own_fields_are_checked_before_anything_is_computed(tmp_path: Path) -> None:
    config = parse_config(
        {"run": {"name": "demo"}, "source": {"format": "synthetic"}, "storage": {"root": str(tmp_path)}}
    )
    for field_name, message in (("sites", "there is no field 'sites'; did you mean site"), ("price", "is a number")):
        with pytest.raises(ConfigError, match=message):
            resolve(config.model_copy(update={"gate": GateConfig(slices=(field_name,))}))


def test_a_report_that_is_not_the_champions_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    write_champion(run)
    assert Verdict.load(decide(run)).verdict == "accept"
    storage.delete(run.path("gate.json"))
    path = Path(run.path("report.json"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"report.json has other bytes than its manifest says"):
        decide(run)


def test_rows_of_one_user_count_for_less_than_rows_of_many() -> None:
    """The bound is held by the interval over groups; that of independent rows stands beside it."""
    labels, scores = predictions_of(4_000, 1.4, 1)
    other = np.clip(scores + np.random.default_rng(2).normal(0, 0.02, 4_000), 0, 1)
    record = NONE.model_copy(update={"status": "scored", "version": "9"})
    found = judged(GateConfig(), labels, scores, record, other, groups=np.arange(4_000) // 400)
    alone = judged(GateConfig(), labels, scores, record, other)
    assert "rows of 10 groups, within" in found.reasons[-1] and "groups" not in alone.reasons[-1]
    assert found.intervals["auc_difference_by_rows"] == alone.intervals["auc_difference"]
    assert found.intervals["auc_difference"] != alone.intervals["auc_difference"]
    assert found.metrics == alone.metrics
    assert found.intervals["auc"] != alone.intervals["auc"]
