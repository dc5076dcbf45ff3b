"""Metrics against their definitions, term by term."""

from __future__ import annotations

import numpy as np
import pytest

from tests import columns as metrics


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


def test_samples_without_a_group_are_left_out_of_gauc_and_counted() -> None:
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 20, 400)
    labels, scores = (rng.random(400) < 0.4).astype(np.float32), rng.random(400)
    judged = metrics.judge("click", labels, scores, groups, no_group=7)
    known = groups != 7
    assert judged["gauc"] == metrics.gauc(labels[known], scores[known], groups[known])
    assert judged["gauc"] != metrics.gauc(labels, scores, groups)
    assert judged["without_group"] == (~known).sum()
    assert metrics.judge("click", labels, scores)["without_group"] is None
    assert metrics.gauc(labels[:0], scores[:0], groups[:0]) is None


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


def structural(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of pairs won by each positive and by each negative, pair by pair."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    return wins.mean(axis=1), wins.mean(axis=0)


def correlated(samples: int, digits: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and three models' scores that share what they know."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(samples) < 0.3).astype(np.float32)
    common = labels * 0.8 + rng.normal(0, 1, samples)
    return labels, np.stack([common + rng.normal(0, noise, samples) for noise in (0.2, 0.3, 0.9)]).round(digits)


@pytest.mark.parametrize("digits", [0, 1, 12])
def test_delong_is_the_covariance_of_structural_components(digits: int) -> None:
    labels, scores = correlated(400, digits, digits)
    aucs, covariance = metrics.delong(labels, scores)
    parts = [structural(labels, each) for each in scores]
    of_positives, of_negatives = (np.cov(np.stack(side)) for side in zip(*parts, strict=True))
    expected = of_positives / (labels == 1).sum() + of_negatives / (labels == 0).sum()
    np.testing.assert_allclose(covariance, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(aucs, [by_pairs(labels, each) for each in scores], rtol=0, atol=1e-12)


def test_errors_are_those_of_a_bootstrap() -> None:
    labels, scores = correlated(2_000, 12, 4)
    probabilities = 1 / (1 + np.exp(-scores + 1))
    rng = np.random.default_rng(8)
    drawn: dict[str, list[float]] = {"auc": [], "difference": [], "logloss": [], "calibration": [], "rmse": []}
    for _ in range(2_500):
        rows = rng.integers(0, 2_000, 2_000)
        ours, theirs = (metrics.auc(labels[rows], scores[model][rows]) or 0 for model in (0, 2))
        drawn["auc"].append(ours)
        drawn["difference"].append(ours - theirs)
        drawn["logloss"].append(metrics.logloss(labels[rows], probabilities[0][rows]))
        drawn["calibration"].append(metrics.calibration(labels[rows], probabilities[0][rows]) or 0)
        errors = [np.sqrt(np.mean((probabilities[model][rows] - labels[rows]) ** 2)) for model in (0, 2)]
        drawn["rmse"].append(errors[0] - errors[1])
    found = metrics.intervals("click", labels, probabilities[0])
    found["difference"] = metrics.auc_difference(labels, scores[0], scores[2])[1]
    found["rmse"] = metrics.rmse_difference(labels, probabilities[0], probabilities[2])[1]
    for name, values in drawn.items():
        low, high = found[name]
        assert (high - low) / 2 / metrics.Z95 == pytest.approx(np.std(values), rel=0.06), name
        assert (high + low) / 2 == pytest.approx(np.mean(values), abs=0.1 * np.std(values)), name


def test_the_same_rows_make_a_difference_sharper_than_its_two_sides() -> None:
    labels, scores = correlated(2_000, 12, 5)
    low, high = metrics.auc_difference(labels, scores[0], scores[1])[1]
    alone = metrics.auc_interval(labels, scores[0])
    assert high - low < 0.5 * (alone[1] - alone[0])
    assert metrics.auc_difference(labels, scores[0], scores[0]) == (0.0, (0.0, 0.0))
    assert metrics.auc_difference(labels, scores[0], 3 * scores[0] + 1) == (0.0, (0.0, 0.0)), "ranks alone count"
    assert metrics.rmse_difference(labels, scores[0], scores[0]) == (0.0, (0.0, 0.0))


def test_a_class_of_one_sample_shows_no_variance() -> None:
    labels = np.array([1, 0, 0, 0, 0], np.float32)
    with pytest.raises(ValueError, match="1 positives and 4 negatives"):
        metrics.delong(labels, np.arange(5.0)[None])
    assert sorted(metrics.intervals("click", labels, np.full(5, 0.2))) == ["calibration", "logloss"]


def alike(random: np.random.Generator, groups: int, each: int, depth: float) -> tuple[np.ndarray, ...]:
    """Labels, two models' scores, and groups whose rows are alike: they share part of the logit and of the errors."""
    group = np.repeat(np.arange(groups), each)
    shared = random.normal(0, depth, (3, groups))[:, group]
    own = random.normal(0, 1, (3, groups * each))
    logits = own[0] + shared[0]
    labels = (random.random(len(group)) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    ours, theirs = (logits + 0.8 * (own[n] + shared[n]) for n in (1, 2))
    return labels, 1 / (1 + np.exp(-ours)), 1 / (1 + np.exp(-theirs)), group


def test_groups_of_one_row_are_independent_rows() -> None:
    labels, ours, theirs, group = alike(np.random.default_rng(0), 2_000, 1, 0.5)
    for plain, grouped in (
        (metrics.auc_difference(labels, ours, theirs), metrics.auc_difference(labels, ours, theirs, group)),
        (metrics.rmse_difference(labels, ours, theirs), metrics.rmse_difference(labels, ours, theirs, group)),
    ):
        assert grouped[0] == pytest.approx(plain[0], abs=1e-12)
        np.testing.assert_allclose(grouped[1], plain[1], rtol=2e-3)
    for task in ("click", "rating"):
        plain_, grouped_ = metrics.intervals(task, labels, ours), metrics.intervals(task, labels, ours, group)
        assert plain_.keys() == grouped_.keys()
        for name, span in plain_.items():
            np.testing.assert_allclose(grouped_[name], span, rtol=2e-3)


def test_the_variance_by_groups_is_the_bootstraps_over_groups() -> None:
    """Rows of a group stay together in each resample; the interval of independent rows is far too narrow."""
    random = np.random.default_rng(1)
    labels, ours, theirs, group = alike(random, 120, 25, 1.5)
    rows = [np.flatnonzero(group == g) for g in range(120)]
    draws = []
    for _ in range(400):
        taken = np.concatenate([rows[g] for g in random.integers(0, 120, 120)])
        draws.append(
            (
                (metrics.auc(labels[taken], ours[taken]) or 0) - (metrics.auc(labels[taken], theirs[taken]) or 0),
                metrics.logloss(labels[taken], ours[taken]),
            )
        )
    deviations = np.std(draws, axis=0)
    low, high = metrics.auc_difference(labels, ours, theirs, group)[1]
    assert (high - low) / (2 * metrics.Z95) == pytest.approx(deviations[0], rel=0.15)
    low, high = metrics.intervals("click", labels, ours, group)["logloss"]
    assert (high - low) / (2 * metrics.Z95) == pytest.approx(deviations[1], rel=0.15)
    alone = metrics.auc_difference(labels, ours, theirs)[1]
    assert (alone[1] - alone[0]) < 0.75 * np.subtract(*metrics.auc_difference(labels, ours, theirs, group)[1][::-1])


def test_rows_of_nobody_are_each_their_own() -> None:
    found = metrics.clusters(np.array([7, 7, 0, 9, 0]), alone=0)
    assert found[0] == found[1] and len(set(found.tolist())) == 4 and found.max() == 3
    assert metrics.clusters(np.array([7, 7, 0, 9, 0])).tolist() == [1, 1, 0, 2, 0]
    assert metrics.clusters(np.zeros(0, np.int64), alone=0).tolist() == []
