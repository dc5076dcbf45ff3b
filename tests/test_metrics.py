"""Metrics against their definitions, term by term."""

from __future__ import annotations

import numpy as np
import pytest

from des_core import metrics


def by_pairs(labels: np.ndarray, scores: np.ndarray) -> float:
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    return float(wins / (len(positive) * len(negative)))


@pytest.mark.parametrize("digits", [1, 2, 12])
def test_auc_counts_pairs_and_halves_ties(digits: int) -> None:
    rng = np.random.default_rng(digits)
    labels, scores = (rng.random(700) < 0.3).astype(np.float32), rng.random(700).round(digits)
    assert metrics.auc(labels, scores) == pytest.approx(by_pairs(labels, scores), abs=1e-12)
    assert metrics.auc(np.ones(5), scores[:5]) is None


def test_gauc_weighs_groups_by_samples_and_leaves_out_those_of_one_class() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 500)
    labels, scores = (rng.random(500) < 0.3).astype(np.float32), rng.random(500).round(2)
    labels[groups == 7] = 0
    total = weight = 0.0
    for group in range(40):
        mine = groups == group
        if 0 < labels[mine].sum() < mine.sum():
            total += by_pairs(labels[mine], scores[mine]) * mine.sum()
            weight += mine.sum()
    assert metrics.gauc(labels, scores, groups) == pytest.approx(total / weight, abs=1e-12)


def test_entropy_and_calibration_of_a_perfectly_calibrated_constant() -> None:
    labels = np.array([1, 0, 0, 0] * 25, np.float32)
    constant = np.full(100, 0.25)
    assert metrics.normalised_entropy(labels, constant) == pytest.approx(1)
    assert metrics.calibration(labels, constant) == pytest.approx(1)
    assert metrics.logloss(labels, constant) == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))
    assert np.isfinite(metrics.logloss(labels, np.zeros(100)))
    assert metrics.calibration(np.zeros(3), constant[:3]) is None


def test_roc_spans_the_square_and_its_area_is_the_auc() -> None:
    rng = np.random.default_rng(1)
    labels = (rng.random(3000) < 0.4).astype(np.float32)
    scores = labels * 0.3 + rng.random(3000)
    curve = np.array(metrics.roc(labels, scores))
    assert curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1] and len(curve) <= 200
    assert (np.diff(curve, axis=0) >= 0).all()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(metrics.auc(labels, scores), abs=2e-3)


def test_bins_hold_every_sample_once() -> None:
    rng = np.random.default_rng(1)
    predictions = rng.random(1003)
    labels = (rng.random(1003) < predictions).astype(np.float32)
    bins = metrics.calibration_bins(labels, predictions)
    assert sum(each["samples"] for each in bins) == 1003
    observed = sum(each["observed"] * each["samples"] for each in bins)
    assert observed == pytest.approx(labels.sum(), rel=1e-6)
    assert max(abs(each["predicted"] - each["observed"]) for each in bins) < 0.25


def test_ratings_are_judged_by_error() -> None:
    judged = metrics.judge("rating", np.array([1.0, 5.0]), np.array([2.0, 3.0]))
    assert judged["rmse"] == pytest.approx(np.sqrt(2.5)) and judged["mae"] == 1.5 and judged["auc"] is None
