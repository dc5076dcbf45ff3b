"""Laws of the gate: bounds decide, doubts keep the champion, and the same files give the same verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from des_core import metrics
from des_core.config import GateConfig
from des_core.contracts import Reference
from des_core.release.gate import Champion, Verdict, decide, judge
from tests.finished import finished_run, predictions_of, write_predictions

NONE = Champion(status="none", report="")
SCORED = Champion(status="scored", version="4", report="")
LOST = Champion(status="not_comparable", version="4", reason="column 'age' is gone", report="")


def table(labels: np.ndarray, scores: np.ndarray, first: int = 0) -> pa.Table:
    samples = [f"f:{row}" for row in range(first, first + len(labels))]
    return pa.table({"sample": samples, "label": labels.astype(np.float32), "probability": scores})


LABELS, SCORES = predictions_of(2_000, 1.4, 3)
AUC = metrics.auc(LABELS, SCORES)
assert AUC is not None
WORSE = np.where(np.arange(2_000) % 10 == 0, 1 - SCORES, SCORES)
DROP = AUC - (metrics.auc(LABELS, WORSE) or 0)
BOUNDS = GateConfig()


@pytest.mark.parametrize(
    ("bounds", "scores", "champion", "theirs", "verdict", "word"),
    [
        (BOUNDS, SCORES, NONE, None, "accept", "no champion"),
        (GateConfig(min_auc=0.99), SCORES, NONE, None, "reject", "gate.min_auc = 0.99"),
        (GateConfig(min_auc=AUC), SCORES, NONE, None, "accept", "at least"),
        (BOUNDS, SCORES, SCORED, SCORES, "accept", "+0.0000 from version 4"),
        (BOUNDS, SCORES, SCORED, WORSE, "accept", "within gate.max_auc_drop"),
        (BOUNDS, WORSE, SCORED, SCORES, "reject", "beyond gate.max_auc_drop = 0.002"),
        (GateConfig(max_auc_drop=DROP), WORSE, SCORED, SCORES, "accept", "within"),
        (GateConfig(max_auc_drop=DROP * 0.999), WORSE, SCORED, SCORES, "reject", "beyond"),
        (GateConfig(max_auc_drop=1.0, min_auc=0.99), WORSE, SCORED, SCORES, "reject", "gate.min_auc"),
        (GateConfig(min_samples=2_001), SCORES, NONE, None, "inconclusive", "gate.min_samples = 2,001"),
        (GateConfig(min_samples=2_001), SCORES, SCORED, SCORES, "inconclusive", "2,000 test samples"),
        (BOUNDS, SCORES, LOST, None, "not_comparable", "column 'age' is gone"),
        (GateConfig(min_auc=0.99), SCORES, LOST, None, "reject", "gate.min_auc"),
        (BOUNDS, np.where(SCORES > 0.9, np.nan, SCORES), NONE, None, "reject", "not finite"),
    ],
)
def test_verdicts(
    bounds: GateConfig, scores: np.ndarray, champion: Champion, theirs: np.ndarray | None, verdict: str, word: str
) -> None:
    scored = None if theirs is None else table(LABELS, theirs).drop_columns("label")
    found = judge(bounds, "click", table(LABELS, scores), champion, scored)
    assert found.verdict == verdict
    assert found.accepted == (verdict == "accept")
    assert any(word in reason for reason in found.reasons)
    assert found.champion == champion.version


@pytest.mark.parametrize("only", [0.0, 1.0])
def test_one_class_cannot_decide(only: float) -> None:
    found = judge(BOUNDS, "click", table(np.full(2_000, only), SCORES), SCORED, table(LABELS, SCORES))
    assert found.verdict == "inconclusive"
    assert "both classes" in found.reasons[0]


def test_no_test_rows_cannot_decide() -> None:
    assert judge(BOUNDS, "click", table(np.zeros(0), np.zeros(0)), NONE).verdict == "inconclusive"


def test_rows_are_joined_by_sample_whatever_their_order() -> None:
    order = np.random.default_rng(5).permutation(2_000)
    champion = table(LABELS, WORSE).take(order)
    straight = judge(BOUNDS, "click", table(LABELS, SCORES), SCORED, table(LABELS, WORSE))
    assert judge(BOUNDS, "click", table(LABELS, SCORES), SCORED, champion) == straight
    assert straight.metrics["auc_difference"] == pytest.approx(DROP)


def test_only_rows_that_both_scored_are_compared() -> None:
    champion = table(LABELS[500:], WORSE[500:], first=500)
    found = judge(BOUNDS, "click", table(LABELS, SCORES), SCORED, champion)
    assert found.metrics["compared_samples"] == 1_500
    assert found.metrics["champion_auc"] == metrics.auc(LABELS[500:], WORSE[500:])
    assert found.metrics["auc"] == AUC


def test_too_few_rows_in_common_keep_the_champion() -> None:
    champion = table(LABELS[:50], SCORES[:50])
    found = judge(BOUNDS, "click", table(LABELS, SCORES), SCORED, champion)
    assert (found.verdict, found.accepted) == ("inconclusive", False)
    assert "version 4" in found.reasons[0]


@pytest.mark.parametrize(
    ("bounds", "noise", "verdict"),
    [
        (GateConfig(max_rmse=0.5), 0.1, "accept"),
        (GateConfig(max_rmse=0.05), 0.1, "reject"),
        (GateConfig(max_rmse_rise=0.01), 0.3, "reject"),
        (GateConfig(max_rmse_rise=0.5), 0.3, "accept"),
    ],
)
def test_ratings_are_judged_by_rmse(bounds: GateConfig, noise: float, verdict: str) -> None:
    random = np.random.default_rng(7)
    labels = random.integers(1, 6, 500).astype(np.float64)
    ours, theirs = labels + random.normal(0, noise, 500), labels + random.normal(0, 0.1, 500)
    found = judge(bounds, "rating", table(labels, ours), SCORED, table(labels, theirs))
    assert found.verdict == verdict
    assert found.metrics["rmse"] == pytest.approx(np.sqrt(np.mean((ours - labels) ** 2)))


def test_equal_ratings_are_no_doubt() -> None:
    assert judge(GateConfig(max_rmse=1), "rating", table(np.full(200, 3.0), np.full(200, 3.1)), NONE).accepted


def test_a_verdict_is_kept_until_what_it_judged_changes(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    NONE.write(run.path("champion.json"))
    first = decide(run)
    written = Path(run.path("gate.json")).stat().st_mtime_ns
    assert decide(run) == first
    assert Path(run.path("gate.json")).stat().st_mtime_ns == written
    labels, scores = predictions_of(4_000, 1.4, 1)
    write_predictions(run, labels, np.sqrt(scores), "champion.parquet")
    Champion(status="scored", version="9", report="").write(run.path("champion.json"))
    second = Verdict.load(decide(run))
    assert (second.champion, second.inputs) == ("9", str(run.reference("champion.json")))
    assert Reference.parse(second.inputs).read()["version"] == "9"
