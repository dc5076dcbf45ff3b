"""Metrics of one model's scores, and the difference of two, with the intervals that chance alone explains.

The AUC is a mean over pairs of a positive i and a negative j, so its variance is that of two means (DeLong):

    V_i = share of negatives scored below positive i        W_j = share of positives scored above negative j
    var = sum_i (V_i - AUC)^2 / (P (P - 1)) + sum_j (W_j - AUC)^2 / (N (N - 1))

Of two models that score the same rows, V and W are differences row by row: only what differs is noise.
Rows of one user are alike, and count for less than as many rows of different users. Where rows have groups, what each
row adds to a number's error is summed within its group first, and groups take the place of rows:

    var = G / (G - 1) sum over groups g of (sum over rows b of g of u_b)^2
    u = (V - AUC) / P of a positive, (W - AUC) / N of a negative; (x - mean) / B of a mean

Every number is a sum over workers; means are known before squares are summed.

Sources: DeLong et al., "Comparing the areas under two or more correlated ROC curves", Biometrics 1988; Sun and Xu,
"Fast implementation of DeLong's algorithm", IEEE Signal Processing Letters 2014; Obuchowski, "Nonparametric analysis of
clustered ROC curve data", Biometrics 1997; He et al., "Practical lessons from predicting clicks on ads at Facebook",
ADKDD 2014 (normalised entropy).
Dims: B rows here, K numbers, b rows of a piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from des_core.engine.exchange.collectives import Collectives
from des_core.engine.judging import clusters, quantiles, ranks
from des_core.engine.judging.ranks import Wins
from des_core.engine.judging.swap import pieces, told, total
from des_core.verdict import Comparison, Interval, Measured

Array = np.ndarray[Any, np.dtype[Any]]

EPS = 1e-15
Z95 = 1.959963984540054
"""A normal variable lies within so many deviations of its mean 95 % of the time."""


@dataclass(frozen=True)
class Rows:
    """This worker's rows, in stored order."""

    labels: Array
    positions: Array
    """Places in the stored order of all rows, ascending."""
    groups: Array | None = None
    """Ids (clusters.py); None: all rows are independent."""

    def where(self, here: Array) -> Rows:
        """Those at places, or under a mask."""
        groups = None if self.groups is None else self.groups[here]
        return replace(self, labels=self.labels[here], positions=self.positions[here], groups=groups)


class Sums(NamedTuple):
    """Over all workers' rows."""

    samples: int
    positives: int
    labels: float
    predicted: float
    loss: float
    """Log loss, in nats."""
    squared: float
    absolute: float
    """Errors of ratings."""


@dataclass(frozen=True)
class Model:
    """One model on this worker's rows, and what all workers know of it."""

    scores: Array
    sums: Sums
    wins: Wins | None
    """None of ratings."""

    @property
    def rmse(self) -> float:
        """Of ratings."""
        return math.sqrt(self.sums.squared / self.sums.samples)


class Judge:
    """What one worker asks of all to judge scores.

    Args:
        task: "click" or "rating".
    """

    def __init__(self, peers: Collectives, task: str) -> None:
        self.peers, self.task = peers, task

    def model(self, rows: Rows, scores_B: Array, points: int = 0) -> Model:
        """A model's sums and ranks on these rows; ``points`` of its ROC curve."""
        floats, counts = np.zeros(5), np.array([len(scores_B), int((rows.labels > 0.5).sum())], np.int64)
        for at in pieces(len(scores_B)):
            labels, scores = rows.labels[at].astype(np.float64), scores_B[at]
            error = scores - labels
            loss = _losses(labels, scores).sum() if self.task == "click" else 0.0
            floats += [labels.sum(), scores.sum(), loss, (error**2).sum(), np.abs(error).sum()]
        samples, positives = total(self.peers, counts).tolist()
        sums = Sums(samples, positives, *total(self.peers, floats).tolist())
        wins = ranks.wins(self.peers, scores_B, rows.labels > 0.5, points) if self.task == "click" else None
        return Model(scores_B, sums, wins)

    def metrics(self, rows: Rows, model: Model, grouped: bool = False) -> dict[str, Any]:
        """All metrics of the task, by the names that reports use; those of the other task are None.

        Args:
            grouped: GAUC too. Rows of nobody are of many groups, nobody knows which: GAUC leaves them out, and
                ``without_group`` counts them.
        """
        sums, click, without, gauc = model.sums, self.task == "click", None, None
        if grouped and click and rows.groups is not None:
            known = rows.groups != clusters.NOBODY
            without = int(total(self.peers, [int((~known).sum())])[0])
            gauc = ranks.gauc(self.peers, model.scores[known], rows.labels[known] > 0.5, rows.groups[known])
        mean, samples = sums.labels / sums.samples, sums.samples
        known_mean = click and 0 < mean < 1
        entropy = -(mean * math.log(mean) + (1 - mean) * math.log1p(-mean)) if known_mean else 0.0
        return {
            "samples": samples,
            "auc": None if model.wins is None else model.wins.auc,
            "logloss": sums.loss / samples if click else None,
            "ne": sums.loss / samples / entropy if known_mean else None,
            "calibration": sums.predicted / sums.labels if click and sums.labels else None,
            "gauc": gauc,
            "without_group": without,
            "rmse": None if click else model.rmse,
            "mae": None if click else sums.absolute / samples,
        }

    def intervals(self, rows: Rows, model: Model) -> dict[str, Interval]:
        """The 95 % intervals of the task's metrics, by name, as far as the rows show them."""
        sums, scores_B = model.sums, model.scores
        if self.task == "rating":
            (variance,), _ = self._means(rows, lambda at: [(scores_B[at] - rows.labels[at]) ** 2], [sums.squared])
            return {"rmse": around(model.rmse, math.sqrt(variance) / (2 * max(model.rmse, EPS)))}
        ratio, scale = (sums.predicted / sums.labels, sums.samples / sums.labels) if sums.labels else (0.0, 0.0)

        def terms(at: Any) -> list[Array]:
            labels, scores = rows.labels[at].astype(np.float64), scores_B[at]
            # Of a ratio of sums: how far each sample pulls it.
            return [_losses(labels, scores), (scores - ratio * labels) * scale]

        (loss, calibrated), _ = self._means(rows, terms, [sums.loss, 0.0])
        found = {"logloss": around(sums.loss / sums.samples, math.sqrt(loss))}
        if sums.labels:
            found["calibration"] = around(ratio, math.sqrt(calibrated))
        if model.wins is not None and min(model.wins.positives, model.wins.negatives) >= 2:
            auc = model.wins.auc or 0.0
            low, high = around(auc, math.sqrt(self._auc_variance(rows, model.wins)[0]))
            found["auc"] = max(low, 0.0), min(high, 1.0)
        return found

    def measured(self, rows: Rows, model: Model) -> Measured:
        """What the gate reads of one model."""
        metrics = self.metrics(rows, model)
        return Measured(
            samples=model.sums.samples,
            positives=model.sums.positives,
            labels=self._labels(rows),
            metrics={name: float(metrics[name]) for name in NAMES if metrics[name] is not None},
            intervals=self.intervals(rows, model),
        )

    def compared(self, rows: Rows, ours_B: Array, theirs_B: Array, points: int = 0) -> Comparison:
        """Ours beside theirs on the same rows, as far as the rows can decide.

        Args:
            points: of theirs on the ROC curve.
        """
        broken = int(total(self.peers, [int((~np.isfinite(theirs_B)).sum())])[0])
        facts = total(self.peers, [len(theirs_B), int((rows.labels > 0.5).sum())]).tolist()
        known = Measured(samples=facts[0], positives=facts[1], labels=self._labels(rows), broken=broken)
        two_of_each = min(facts[1], facts[0] - facts[1]) >= 2
        if broken or not facts[0] or (self.task == "click" and not two_of_each):
            return Comparison(theirs=known)
        theirs = self.model(rows, theirs_B, points)
        difference, spread, alone, groups = self._difference(rows, self.model(rows, ours_B), theirs)
        return Comparison(
            theirs=self.measured(rows, theirs),
            difference=difference,
            interval=around(difference, spread),
            by_rows=None if groups is None else around(difference, alone),
            groups=groups,
            roc=theirs.wins.roc if theirs.wins else [],
            calibration_bins=self.calibration_bins(rows, theirs) if points else [],
        )

    def difference(self, rows: Rows, ours_B: Array, theirs_B: Array) -> tuple[Model, float, Interval]:
        """Theirs, and AUC (rating: RMSE) of ours - that of theirs with its 95 % interval."""
        theirs = self.model(rows, theirs_B)
        difference, spread, _, _ = self._difference(rows, self.model(rows, ours_B), theirs)
        return theirs, difference, around(difference, spread)

    def calibration_bins(self, rows: Rows, model: Model) -> list[dict[str, float]]:
        """Mean prediction and mean label in bins of equally many samples."""
        order = np.argsort(model.scores, kind="stable") if model.wins is None else model.wins.order_B
        return quantiles.calibration_bins(self.peers, rows.labels, model.scores, order, rows.positions)

    def _difference(self, rows: Rows, ours: Model, theirs: Model) -> tuple[float, float, float, int | None]:
        """The difference, its deviation by groups where there are any, that by rows, and how many groups there are."""
        kinds = [rows] if rows.groups is None else [rows, replace(rows, groups=None)]
        if ours.wins is not None and theirs.wins is not None:
            difference = (ours.wins.auc or 0.0) - (theirs.wins.auc or 0.0)
            found = [self._auc_variance(each, ours.wins, theirs.wins) for each in kinds]
        else:
            difference = ours.rmse - theirs.rmse
            pulls = [1 / (2 * max(each.rmse, EPS)) for each in (ours, theirs)]
            summed = ours.sums.squared * pulls[0] - theirs.sums.squared * pulls[1]

            def terms(at: Any) -> list[Array]:
                squares = [(each.scores[at] - rows.labels[at]) ** 2 for each in (ours, theirs)]
                return [squares[0] * pulls[0] - squares[1] * pulls[1]]

            found = [(variance, many) for each in kinds for (variance,), many in [self._means(each, terms, [summed])]]
        (first, groups), (last, _) = found[0], found[-1]
        return difference, math.sqrt(first), math.sqrt(last), None if rows.groups is None else groups

    def _means(self, rows: Rows, terms: Any, sums: list[float]) -> tuple[list[float], int]:
        """Variances of means of terms, whose sums over all rows are known, and how many groups there are."""
        samples = int(total(self.peers, [len(rows.labels)])[0])
        means = np.array(sums)[:, None] / samples

        def pulls(at: Any) -> Array:
            return (np.stack(terms(at)) - means) / samples

        many, squares_K = self._squares(rows, pulls, len(sums))
        if rows.groups is None:
            return (squares_K.sum(axis=0) * (samples / (samples - 1) if samples > 1 else 0.0)).tolist(), 0
        return (squares_K * _spread(many)).tolist(), many

    def _auc_variance(self, rows: Rows, ours: Wins, theirs: Wins | None = None) -> tuple[float, int]:
        """Of one model's AUC, or of the difference of two, and how many groups there are."""
        positives, negatives = ours.positives, ours.negatives
        auc = (ours.auc or 0.0) - (0.0 if theirs is None else theirs.auc or 0.0)

        def pulls(at: Any) -> Array:
            won = ours.won_B[at] if theirs is None else ours.won_B[at] - theirs.won_B[at]
            positive = rows.labels[at] > 0.5
            share = won / np.where(positive, 2 * negatives, 2 * positives)
            pulled: Array = ((share - auc) / np.where(positive, positives, negatives))[None]
            return pulled

        many, squares_K = self._squares(rows, pulls, 1)
        if rows.groups is None:
            of_positives, of_negatives = squares_K[:, 0].tolist()
            return of_positives * positives / (positives - 1) + of_negatives * negatives / (negatives - 1), 0
        return float(squares_K[0]) * _spread(many), many

    def _squares(self, rows: Rows, pulls: clusters.Pulls, numbers: int) -> tuple[int, Array]:
        """How many groups, and squares of their sums [K]; without groups 0, and those of both classes [2, K]."""
        if rows.groups is not None:
            return clusters.squares(self.peers, rows.groups, pulls, numbers)
        mine = np.zeros((2, numbers))
        for at in pieces(len(rows.labels)):
            squares, positive = pulls(at) ** 2, rows.labels[at] > 0.5
            mine += [squares[:, positive].sum(axis=1), squares[:, ~positive].sum(axis=1)]
        return 0, total(self.peers, mine)

    def _labels(self, rows: Rows) -> Interval | None:
        """The least and the greatest label; None without rows."""
        mine = [rows.labels.min(), rows.labels.max()] if len(rows.labels) else [np.inf, -np.inf]
        ends = told(self.peers, np.array(mine, np.float64))
        low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
        return (low, high) if low <= high else None


NAMES = ("auc", "logloss", "ne", "calibration", "rmse")
"""Metrics that bounds are on."""


def around(value: float, deviation: float) -> Interval:
    """The 95 % interval of a normal variable."""
    return value - Z95 * deviation, value + Z95 * deviation


def _losses(labels: Array, scores: Array) -> Array:
    p = np.clip(scores.astype(np.float64), EPS, 1 - EPS)
    losses: Array = -(labels * np.log(p) + (1 - labels) * np.log1p(-p))
    return losses


def _spread(groups: int) -> float:
    """What corrects a variance over groups for their mean, which was taken from them."""
    return groups / (groups - 1) if groups > 1 else 1.0
