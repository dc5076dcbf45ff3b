"""The plain reference of judging: exact metrics over whole columns, and how far chance alone may move them.

Here are the formulas as they are written down; what the workers find must be the same (engine/test_judging.py).

The AUC is a mean over pairs of a positive i and a negative j, so its variance is that of two means (DeLong):

    V_i = share of negatives scored below positive i        W_j = share of positives scored above negative j
    cov(AUC_m, AUC_n) = cov(V_m, V_n) / positives + cov(W_m, W_n) / negatives

V and W follow from midranks, in O(B log B). Of models that score the same rows only the part that differs is noise,
so the interval of a difference is far narrower than those of the two AUCs.

Rows of one user are alike, and count for less than as many rows of different users. Where groups are given, what each
row adds to a number's error is summed within its group first, and groups take the place of rows:

    var = G / (G - 1) sum over groups g of (sum over rows b of g of u_b)^2
    u = (V - AUC) / positives of a positive, (W - AUC) / negatives of a negative

Sources: DeLong et al., "Comparing the areas under two or more correlated ROC curves", Biometrics 1988; Sun and Xu,
"Fast implementation of DeLong's algorithm", IEEE Signal Processing Letters 2014; Obuchowski, "Nonparametric analysis of
clustered ROC curve data", Biometrics 1997.
Dims: B samples, M models, P positives, N negatives, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from des_core.verdict import Comparison, Interval, Measured, SliceDifference

Array = np.ndarray[Any, np.dtype[Any]]

EPS = 1e-15

Z95 = 1.959963984540054
"""A normal variable lies within so many deviations of its mean 95 % of the time."""

NAMES = ("auc", "logloss", "ne", "calibration", "rmse")


def auc(labels_B: Array, scores_B: Array) -> float | None:
    """Area under the ROC curve, ties counted half; None if one class is absent.

    Source: Mann and Whitney, 1947: the mean rank of the positives.
    """
    positive_B = labels_B > 0.5
    positives, negatives = int(positive_B.sum()), int((~positive_B).sum())
    if not positives or not negatives:
        return None
    ranks_B = _ranks(scores_B)
    return float((ranks_B[positive_B].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def delong(labels_B: Array, scores_MB: Array, groups_B: Array | None = None) -> tuple[Array, Array]:
    """AUCs [M] of models that scored the same rows, and their covariance [M, M].

    Args:
        groups_B: rows of the same number are not independent; None: all are.

    Raises:
        ValueError: a class has fewer than two samples, which show no variance.
    """
    positive_B = labels_B > 0.5
    positives, negatives = int(positive_B.sum()), int((~positive_B).sum())
    if min(positives, negatives) < 2:
        raise ValueError(f"{positives} positives and {negatives} negatives: the variance of AUC needs two of each")
    ranks_MB = np.stack([_ranks(scores_B) for scores_B in scores_MB])
    within_MP = np.stack([_ranks(scores_B[positive_B]) for scores_B in scores_MB])
    within_MN = np.stack([_ranks(scores_B[~positive_B]) for scores_B in scores_MB])
    wins_MP = (ranks_MB[:, positive_B] - within_MP) / negatives
    wins_MN = 1 - (ranks_MB[:, ~positive_B] - within_MN) / positives
    if groups_B is not None:
        aucs_M = wins_MP.mean(axis=1)
        pulls_MB = np.empty(scores_MB.shape)
        pulls_MB[:, positive_B] = (wins_MP - aucs_M[:, None]) / positives
        pulls_MB[:, ~positive_B] = (wins_MN - aucs_M[:, None]) / negatives
        sums_MG = np.stack([_by_group(np.asarray(pulls_B), groups_B) for pulls_B in pulls_MB])
        return aucs_M, _spread(sums_MG.shape[1]) * sums_MG @ sums_MG.T
    covariance_MM = np.atleast_2d(np.cov(wins_MP)) / positives + np.atleast_2d(np.cov(wins_MN)) / negatives
    return wins_MP.mean(axis=1), covariance_MM


def clusters(groups_B: Array, alone: int | None = None) -> Array:
    """Numbers from 0 of the groups of rows; each row whose group is ``alone`` (missing) is a group by itself."""
    groups = np.unique(groups_B, return_inverse=True)[1]
    if alone is not None:
        apart_B = groups_B == alone
        groups[apart_B] = groups.max(initial=0) + 1 + np.arange(int(apart_B.sum()))
    return np.asarray(np.unique(groups, return_inverse=True)[1])


def _by_group(values_B: Array, groups_B: Array) -> Array:
    return np.asarray(np.bincount(groups_B, values_B))


def _spread(groups: int) -> float:
    """What corrects a variance over groups for their mean, which was taken from them."""
    return groups / (groups - 1) if groups > 1 else 1.0


def auc_interval(labels_B: Array, scores_B: Array, groups_B: Array | None = None) -> Interval:
    """The 95 % interval of an AUC; raises as ``delong``."""
    (value,), ((variance,),) = delong(labels_B, scores_B[None], groups_B)
    low, high = around(float(value), float(variance) ** 0.5)
    return max(low, 0.0), min(high, 1.0)


def auc_difference(
    labels_B: Array, ours_B: Array, theirs_B: Array, groups_B: Array | None = None
) -> tuple[float, Interval]:
    """AUC of ours - AUC of theirs on the same rows, and its 95 % interval; raises as ``delong``."""
    (ours, theirs), ((own, both), (_, other)) = delong(labels_B, np.stack([ours_B, theirs_B]), groups_B)
    # Of equal scores nothing is left but rounding.
    difference, variance = float(ours - theirs), max(float(own + other - 2 * both), 0.0)
    return difference, around(difference, variance**0.5)


def rmse_difference(
    labels_B: Array, ours_B: Array, theirs_B: Array, groups_B: Array | None = None
) -> tuple[float, Interval]:
    """RMSE of ours - RMSE of theirs on the same rows, and its 95 % interval by the delta method."""
    squares_MB = (np.stack([ours_B, theirs_B]).astype(np.float64) - labels_B) ** 2
    ours, theirs = np.sqrt(squares_MB.mean(axis=1))
    pulls_B = squares_MB[0] / (2 * max(ours, EPS)) - squares_MB[1] / (2 * max(theirs, EPS))
    return float(ours - theirs), around(float(ours - theirs), _error_of_mean(pulls_B, groups_B))


def around(value: float, deviation: float) -> Interval:
    """The 95 % interval of a normal variable."""
    return value - Z95 * deviation, value + Z95 * deviation


def _error_of_mean(values_B: Array, groups_B: Array | None = None) -> float:
    if groups_B is not None and len(values_B):
        sums_G = _by_group(np.asarray(values_B - values_B.mean()), groups_B) / len(values_B)
        return float((_spread(len(sums_G)) * (sums_G**2).sum()) ** 0.5)
    return float(values_B.std(ddof=1) / len(values_B) ** 0.5) if len(values_B) > 1 else 0.0


def intervals(task: str, labels_B: Array, predictions_B: Array, groups_B: Array | None = None) -> dict[str, Interval]:
    """The 95 % intervals of a task's metrics, by name, as far as the rows show them."""
    if task == "rating":
        squares_B = (predictions_B.astype(np.float64) - labels_B) ** 2
        rmse = float(squares_B.mean()) ** 0.5
        return {"rmse": around(rmse, _error_of_mean(squares_B, groups_B) / (2 * max(rmse, EPS)))}
    losses_B = _losses(labels_B, predictions_B)
    found = {"logloss": around(float(losses_B.mean()), _error_of_mean(losses_B, groups_B))}
    observed, predicted = float(labels_B.sum()), float(predictions_B.sum(dtype=np.float64))
    if observed:
        # Of a ratio of sums: how far each sample pulls it.
        pulls_B = (predictions_B - predicted / observed * labels_B) * len(labels_B) / observed
        found["calibration"] = around(predicted / observed, _error_of_mean(pulls_B, groups_B))
    if 2 <= observed <= len(labels_B) - 2:
        found["auc"] = auc_interval(labels_B, predictions_B, groups_B)
    return found


def _ranks(scores_B: Array) -> Array:
    """Ranks from 1, equal scores sharing their mean rank."""
    order = np.argsort(scores_B, kind="stable")
    ordered = scores_B[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    stops = np.r_[starts[1:], len(ordered)]
    ranks = np.empty(len(ordered))
    ranks[order] = np.repeat((starts + 1 + stops) / 2, stops - starts)
    return ranks


def logloss(labels_B: Array, probabilities_B: Array) -> float:
    """Mean negative log likelihood, in nats."""
    return float(np.mean(_losses(labels_B, probabilities_B)))


def _losses(labels_B: Array, probabilities_B: Array) -> Array:
    p = np.clip(probabilities_B.astype(np.float64), EPS, 1 - EPS)
    losses_B: Array = -(labels_B * np.log(p) + (1 - labels_B) * np.log1p(-p))
    return losses_B


def normalised_entropy(labels_B: Array, probabilities_B: Array) -> float | None:
    """Log loss divided by that of always predicting the mean label; None if one class is absent.

    Source: He et al., "Practical lessons from predicting clicks on ads at Facebook", ADKDD 2014.
    """
    mean = float(labels_B.mean())
    if mean <= 0 or mean >= 1:
        return None
    return logloss(labels_B, probabilities_B) / logloss(labels_B, np.full(len(labels_B), mean))


def calibration(labels_B: Array, probabilities_B: Array) -> float | None:
    """Predicted clicks / observed clicks; None without clicks."""
    observed = float(labels_B.sum())
    return float(probabilities_B.sum(dtype=np.float64)) / observed if observed else None


def gauc(labels_B: Array, scores_B: Array, groups_B: Array) -> float | None:
    """Mean of the groups' AUCs weighted by their samples; groups of one class are left out.

    Source: Zhou et al., "Deep interest network for click-through rate prediction", KDD 2018.
    """
    order = np.lexsort((scores_B, groups_B))
    groups, positive, scores = groups_B[order], labels_B[order] > 0.5, scores_B[order]
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    starts = np.flatnonzero(new_group)
    if not len(groups):
        return None
    sizes = np.diff(np.r_[starts, len(groups)])
    # Ranks from 1 within the group, equal scores sharing their mean rank.
    ties = np.flatnonzero(new_group | np.r_[True, scores[1:] != scores[:-1]])
    stops = np.r_[ties[1:], len(groups)]
    ranks = np.repeat((ties + 1 + stops) / 2, stops - ties) - np.repeat(starts, sizes)
    positives = np.add.reduceat(positive.astype(np.float64), starts)
    pairs = positives * (sizes - positives)
    wins = np.add.reduceat(np.where(positive, ranks, 0.0), starts) - positives * (positives + 1) / 2
    both = pairs > 0
    return float(np.sum(wins[both] / pairs[both] * sizes[both]) / np.sum(sizes[both])) if both.any() else None


def _gauc_of(known_B: Array, labels_B: Array, scores_B: Array, groups_B: Array | None) -> float | None:
    return None if groups_B is None else gauc(labels_B[known_B], scores_B[known_B], groups_B[known_B])


def judge(
    task: str, labels_B: Array, predictions_B: Array, groups_B: Array | None = None, no_group: int | None = None
) -> dict[str, Any]:
    """All metrics of a task, by the names that reports use; those of the other task are None.

    Args:
        no_group: the key of a missing group. Such samples are of many groups, nobody knows which: GAUC leaves them
            out, and ``without_group`` counts them.
    """
    error_B = predictions_B.astype(np.float64) - labels_B
    click = task == "click"
    known_B = np.ones(len(labels_B), np.bool_) if groups_B is None or no_group is None else groups_B != no_group
    return {
        "samples": len(labels_B),
        "auc": auc(labels_B, predictions_B) if click else None,
        "logloss": logloss(labels_B, predictions_B) if click else None,
        "ne": normalised_entropy(labels_B, predictions_B) if click else None,
        "calibration": calibration(labels_B, predictions_B) if click else None,
        "gauc": _gauc_of(known_B, labels_B, predictions_B, groups_B) if click else None,
        "without_group": int((~known_B).sum()) if click and groups_B is not None else None,
        "rmse": None if click else float(np.sqrt(np.mean(error_B**2))),
        "mae": None if click else float(np.mean(np.abs(error_B))),
    }


def roc(labels_B: Array, scores_B: Array, points: int = 200) -> list[list[float]]:
    """The ROC curve as [false positive rate, true positive rate], at most ``points`` of them."""
    positive_B = labels_B > 0.5
    if positive_B.all() or not positive_B.any():
        return []
    order = np.argsort(-scores_B, kind="stable")
    ordered, positive = scores_B[order], positive_B[order]
    last = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    true, false = np.cumsum(positive)[last], np.cumsum(~positive)[last]
    keep = np.unique(np.linspace(0, len(last) - 1, min(points - 1, len(last))).astype(np.int64))
    curve = [[0.0, 0.0]]
    curve += [[float(false[i] / false[-1]), float(true[i] / true[-1])] for i in keep]
    return curve


def calibration_bins(labels_B: Array, probabilities_B: Array, bins: int = 20) -> list[dict[str, float]]:
    """Mean prediction and mean label in bins of equally many samples."""
    order = np.argsort(probabilities_B, kind="stable")
    return [
        {
            "predicted": float(probabilities_B[part].mean(dtype=np.float64)),
            "observed": float(labels_B[part].mean(dtype=np.float64)),
            "samples": len(part),
        }
        for part in np.array_split(order, min(bins, len(order)))
        if len(part)
    ]


def histogram(labels_B: Array, scores_B: Array, bins: int = 24) -> dict[str, Any] | None:
    """Shares of clicks and of the others by bin of the score; None without both."""
    positive_B = labels_B > 0.5
    if positive_B.all() or not positive_B.any():
        return None
    high = float(np.quantile(scores_B, 0.999)) or 1.0
    counts = [np.histogram(scores_B[part], bins, (0.0, high))[0] / part.sum() for part in (positive_B, ~positive_B)]
    return {"clicked": counts[0].tolist(), "others": counts[1].tolist(), "high": high}


def measured(task: str, labels_B: Array, scores_B: Array, groups_B: Array | None = None) -> Measured:
    """What the workers record of one model."""
    labels_B, scores_B = labels_B.astype(np.float64), scores_B.astype(np.float64)
    found = Measured(
        samples=len(labels_B),
        positives=int((labels_B > 0.5).sum()),
        labels=(float(labels_B.min()), float(labels_B.max())) if len(labels_B) else None,
        broken=int((~np.isfinite(scores_B)).sum()),
    )
    if found.broken or not found.samples:
        return found
    known = judge(task, labels_B, scores_B)
    metrics = {name: float(known[name]) for name in NAMES if known[name] is not None}
    return found.model_copy(update={"metrics": metrics, "intervals": intervals(task, labels_B, scores_B, groups_B)})


def comparison(
    task: str, labels_B: Array, ours_B: Array, theirs_B: Array, groups_B: Array | None = None, **more: Any
) -> Comparison:
    """What the workers record of two models on the same rows."""
    theirs = measured(task, labels_B, theirs_B, groups_B)
    two_of_each = min(theirs.positives, theirs.samples - theirs.positives) >= 2
    if not theirs.metrics or (task == "click" and not two_of_each):
        return Comparison(theirs=theirs)
    rule = auc_difference if task == "click" else rmse_difference
    difference, interval = rule(labels_B, ours_B, theirs_B, groups_B)
    return Comparison(
        theirs=theirs,
        difference=difference,
        interval=interval,
        by_rows=None if groups_B is None else rule(labels_B, ours_B, theirs_B)[1],
        groups=None if groups_B is None else int(groups_B.max()) + 1,
        roc=roc(labels_B, theirs_B) if task == "click" else [],
        calibration_bins=calibration_bins(labels_B, theirs_B),
        **more,
    )


def slice_of(field: str, value: str, labels_B: Array, ours_B: Array, theirs_B: Array) -> SliceDifference:
    """What the workers record of the rows of one value."""
    difference, (low, _) = auc_difference(labels_B, ours_B, theirs_B)
    theirs = auc(labels_B, theirs_B) or 0.0
    numbers = {"auc": theirs + difference, "champion_auc": theirs, "difference": difference, "low": low}
    return SliceDifference(field=field, value=value, samples=len(labels_B), **numbers)
