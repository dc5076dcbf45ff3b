"""Candidate against champion on the same rows -> a verdict, with its reasons.

    accept  iff  every absolute bound holds  and  AUC(candidate) - AUC(champion) >= -max_auc_drop
                                        (rating:  RMSE(candidate) - RMSE(champion) <= max_rmse_rise)

Rows that cannot decide (fewer than min_samples, or one class only) are inconclusive, and a champion that cannot
score them is not comparable: in both cases the champion stays. Without a champion the absolute bounds alone decide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from des_core import metrics as measure
from des_core import storage
from des_core.config import GateConfig
from des_core.contracts import Record, Reference
from des_core.run import Run

ROUNDING = 1e-12
"""A difference of two metrics is equal to its bound up to this: 0.8 - 0.802 is not exactly -0.002."""


Floats = npt.NDArray[np.float64]
Outcome = Literal["accept", "reject", "inconclusive", "not_comparable"]


class Champion(Record):
    """``champion.json``: the champion's scores of the candidate's test rows are in ``champion.parquet``."""

    status: Literal["none", "scored", "not_comparable"]
    version: str = ""
    """Version in the registry, empty where there is no champion."""
    reason: str = ""
    """Why it is not comparable."""
    report: str
    """Reference of the report whose rows were scored."""


class Verdict(Record):
    """``gate.json``: what the gate decided, and why."""

    accepted: bool
    verdict: Outcome
    reasons: tuple[str, ...]
    """One line each; the first one decided."""
    metrics: dict[str, float]
    champion: str = ""
    """Version of the champion that was compared, or empty."""
    inputs: str = ""
    """Reference of the champion's record, which names the report: a verdict on other files is made again."""


@dataclass(frozen=True)
class Check:
    """One bound, and whether it is kept."""

    kept: bool
    reason: str


def same_rows(candidate: pa.Table, champion: pa.Table) -> tuple[Floats, Floats, Floats]:
    """Labels, candidate's scores and champion's scores of the samples that both have, in the candidate's order."""
    place = pc.index_in(candidate["sample"], value_set=champion["sample"].combine_chunks())
    found = pc.is_valid(place)
    both = candidate.filter(found)
    theirs = champion["probability"].take(place.filter(found))
    return _floats(both["label"]), _floats(both["probability"]), _floats(theirs)


def judge(
    bounds: GateConfig, task: str, candidate: pa.Table, champion: Champion, scored: pa.Table | None = None
) -> Verdict:
    """The verdict on a candidate's predictions ``(sample, label, probability)``.

    ``scored`` holds the champion's ``(sample, probability)`` where its status is "scored".
    """
    labels, scores = _floats(candidate["label"]), _floats(candidate["probability"])
    metrics = {"samples": float(len(labels))}
    broken = int((~np.isfinite(scores)).sum())
    if broken:
        return _verdict("reject", [f"{broken:,} predictions are not finite numbers"], metrics, champion)
    undecided = _undecided(bounds, task, labels)
    if undecided:
        return _verdict("inconclusive", [undecided], metrics, champion)
    checks = [_absolute(bounds, task, labels, scores, metrics)]
    doubt: tuple[Outcome, str] | None = None
    if champion.status == "not_comparable":
        doubt = "not_comparable", f"version {champion.version} cannot be compared: {champion.reason}"
    elif champion.status == "scored" and scored is not None:
        rows = same_rows(candidate, scored)
        few = _undecided(bounds, task, rows[0])
        if few:
            doubt = "inconclusive", f"of the rows that version {champion.version} could score: {few}"
        else:
            checks.append(_against(bounds, task, champion.version, rows, metrics))
    else:
        checks.append(Check(True, "there is no champion to compare with"))
    if not all(check.kept for check in checks):
        return _verdict("reject", [check.reason for check in checks if not check.kept], metrics, champion)
    if doubt:
        return _verdict(doubt[0], [doubt[1]], metrics, champion)
    return _verdict("accept", [check.reason for check in checks], metrics, champion)


def decide(run: Run) -> Reference:
    """``gate.json`` of the run: kept where it judged these very files, made otherwise."""
    inputs = str(run.reference("champion.json"))
    if storage.exists(run.path("gate.json")):
        kept = run.reference("gate.json")
        if Verdict.load(kept).inputs == inputs:
            return kept
    champion = Champion.load(Reference.parse(inputs))
    scored = _table(run.path("champion.parquet")) if champion.status == "scored" else None
    task = run.config.source.task
    verdict = judge(run.config.gate, task, _table(run.path("predictions.parquet")), champion, scored)
    return verdict.model_copy(update={"inputs": inputs}).write(run.path("gate.json"))


def _verdict(outcome: Outcome, reasons: list[str], metrics: dict[str, float], champion: Champion) -> Verdict:
    return Verdict(
        accepted=outcome == "accept",
        verdict=outcome,
        reasons=tuple(reasons),
        metrics=metrics,
        champion=champion.version,
    )


def _undecided(bounds: GateConfig, task: str, labels: Floats) -> str:
    """Why these rows cannot decide anything; empty if they can."""
    if len(labels) < bounds.min_samples:
        return f"{len(labels):,} test samples are fewer than gate.min_samples = {bounds.min_samples:,}"
    if task == "click" and len(np.unique(labels)) < 2:
        return f"all {len(labels):,} test labels are {labels[0]:g}, and AUC needs both classes"
    return ""


def _absolute(bounds: GateConfig, task: str, labels: Floats, scores: Floats, metrics: dict[str, float]) -> Check:
    """The bound on the candidate alone; its metric is added to ``metrics``."""
    if task == "rating":
        metrics["rmse"] = value = _rmse(labels, scores)
        kept = value <= bounds.max_rmse
        return Check(kept, f"RMSE {value:.4f} is {'at most' if kept else 'above'} gate.max_rmse = {bounds.max_rmse:g}")
    metrics["auc"] = value = measure.auc(labels, scores) or 0.0
    kept = value >= bounds.min_auc
    return Check(kept, f"AUC {value:.4f} is {'at least' if kept else 'below'} gate.min_auc = {bounds.min_auc:g}")


def _against(
    bounds: GateConfig, task: str, version: str, rows: tuple[Floats, Floats, Floats], metrics: dict[str, float]
) -> Check:
    """The bound on the difference to the champion; both numbers are added to ``metrics``."""
    labels, ours, theirs = rows
    metrics["compared_samples"] = float(len(labels))
    if task == "rating":
        metrics["champion_rmse"] = _rmse(labels, theirs)
        metrics["rmse_difference"] = difference = _rmse(labels, ours) - metrics["champion_rmse"]
        kept = difference <= bounds.max_rmse_rise + ROUNDING
        name, bound = "RMSE", f"gate.max_rmse_rise = {bounds.max_rmse_rise:g}"
    else:
        metrics["champion_auc"] = measure.auc(labels, theirs) or 0.0
        metrics["auc_difference"] = difference = (measure.auc(labels, ours) or 0.0) - metrics["champion_auc"]
        kept = difference >= -bounds.max_auc_drop - ROUNDING
        name, bound = "AUC", f"gate.max_auc_drop = {bounds.max_auc_drop:g}"
    apart = f"{name} differs by {difference:+.4f} from version {version}'s on the same {len(labels):,} rows"
    return Check(kept, f"{apart}, {'within' if kept else 'beyond'} {bound}")


def _table(uri: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri)))


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _rmse(labels: Floats, scores: Floats) -> float:
    return float(measure.judge("rating", labels, scores)["rmse"])
