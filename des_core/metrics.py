"""Exact metrics of predictions, over all samples at once.

Dims: B samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

EPS = 1e-15


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
    p = np.clip(probabilities_B.astype(np.float64), EPS, 1 - EPS)
    return float(-np.mean(labels_B * np.log(p) + (1 - labels_B) * np.log1p(-p)))


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
    groups, labels, scores = groups_B[order], labels_B[order], scores_B[order]
    edges = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1], True])
    total = weight = 0.0
    for start, stop in zip(edges, edges[1:], strict=False):
        value = auc(labels[start:stop], scores[start:stop])
        if value is not None:
            total += value * (stop - start)
            weight += stop - start
    return total / weight if weight else None


def judge(task: str, labels_B: Array, predictions_B: Array, groups_B: Array | None = None) -> dict[str, Any]:
    """All metrics of a task, by the names that reports use; those of the other task are None."""
    error_B = predictions_B.astype(np.float64) - labels_B
    click = task == "click"
    return {
        "samples": len(labels_B),
        "auc": auc(labels_B, predictions_B) if click else None,
        "logloss": logloss(labels_B, predictions_B) if click else None,
        "ne": normalised_entropy(labels_B, predictions_B) if click else None,
        "calibration": calibration(labels_B, predictions_B) if click else None,
        "gauc": gauc(labels_B, predictions_B, groups_B) if click and groups_B is not None else None,
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
