"""Candidate against champion on the same rows -> a verdict, with its reasons.

    accept  iff  every absolute bound holds  and  low(AUC(candidate) - AUC(champion)) > -max_auc_drop
                                        (rating:  high(RMSE(candidate) - RMSE(champion)) < max_rmse_rise)

low and high are the ends of the difference's 95 % interval (DeLong; by groups of rows where source.group names them;
metrics.py): a candidate is not taken because too few rows could not tell that it is worse. The same rule holds against
a reference, the champion of a week before or a version that gate.reference names, and with gate.slice_max_auc_drop
among the rows of single values.

Rows that cannot decide (fewer than min_samples, or hardly a second class) are inconclusive, and a champion that cannot
score them is not comparable: in both cases the champion stays. Without a champion the absolute bounds alone decide.
Where the day's fields drifted beyond bounds, or the champion itself fails on rows that nobody trained on, the reason
is the data: the candidate is rejected whatever it scores, and the verdict names the days.

Source: DeLong et al., "Comparing the areas under two or more correlated ROC curves", Biometrics 1988.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from des_core import metrics as measure
from des_core import storage
from des_core.config import GateConfig
from des_core.contracts import Dataset, Reference
from des_core.data.read.hashing import MISSING
from des_core.errors import StorageError
from des_core.release.judge import checks, slices
from des_core.release.judge.checks import Clusters, Floats
from des_core.run import Run
from des_core.verdict import Champion, Check, Drift, NewRows, Outcome, Slice, Verdict

Sliced = Mapping[str, tuple[pa.Table, Mapping[int, str]]]
"""Field -> its values in the test rows and their texts, see slices.py."""


@dataclass
class _Findings:
    """What was found so far."""

    champion: Champion
    metrics: dict[str, float]
    groups: pa.Table | None = None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    data: list[Check] = field(default_factory=list)
    """Checks of the day's data, which reject by ``faults``."""
    slices: list[Slice] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    """What an accepted candidate's reasons are."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Day -> what is wrong with its data."""
    doubts: list[tuple[Outcome, str]] = field(default_factory=list)

    def groups_of(self, rows: pa.Table) -> Clusters | None:
        """Numbers of the groups of rows with a column ``sample``; None where all rows are independent."""
        if self.groups is None:
            return None
        place = pc.index_in(rows["sample"], value_set=self.groups["sample"].combine_chunks())
        return measure.clusters(self.groups["group"].take(place).to_numpy(), MISSING)

    def verdict(self, outcome: Outcome, reasons: list[str]) -> Verdict:
        return Verdict(
            accepted=outcome == "accept",
            verdict=outcome,
            reasons=tuple(reasons),
            metrics=self.metrics,
            champion=self.champion.version,
            reference=self.champion.reference,
            data_at_fault=bool(self.faults),
            days_at_fault=tuple(sorted(self.faults)),
            intervals=self.intervals,
            checks=(*self.checks, *self.data),
            slices=tuple(self.slices),
            drift=tuple(self.drift),
        )


def same_rows(candidate: pa.Table, other: pa.Table) -> tuple[pa.Table, tuple[Floats, Floats, Floats]]:
    """The candidate's rows that both scored, in its order; their labels, its scores and the other's."""
    place = pc.index_in(candidate["sample"], value_set=other["sample"].combine_chunks())
    found = pc.is_valid(place)
    both = candidate.filter(found)
    theirs = other["probability"].take(place.filter(found))
    return both, (_floats(both["label"]), _floats(both["probability"]), _floats(theirs))


def judge(
    bounds: GateConfig,
    task: str,
    candidate: pa.Table,
    champion: Champion,
    scored: pa.Table | None = None,
    *,
    reference: pa.Table | None = None,
    new_rows: NewRows | None = None,
    table: Mapping[str, float] | None = None,
    sliced: Sliced | None = None,
    groups: pa.Table | None = None,
) -> Verdict:
    """The verdict on a candidate's predictions ``(sample, label, probability)``.

    Args:
        scored: the champion's ``(sample, probability)`` where its status is "scored".
        reference: those of gate.reference.
        table: the last line of the report's table statistics.
        sliced: of the fields in gate.slices.
        groups: ``(sample, group)``, the key of source.group; rows of a group are not independent.
    """
    labels, scores = _floats(candidate["label"]), _floats(candidate["probability"])
    found = _Findings(champion, {"samples": float(len(labels))}, groups)
    if new_rows is not None:
        _data(bounds, task, new_rows, found)
    broken = int((~np.isfinite(scores)).sum())
    undecided = _undecided(bounds, task, labels)
    if not broken and len(labels):
        own = measure.judge(task, labels, scores)
        found.metrics |= {name: float(own[name]) for name in checks.NAMES if own[name] is not None}
        found.intervals |= measure.intervals(task, labels, scores, found.groups_of(candidate))
    if not broken and not undecided:
        _own(bounds, task, table, found)
        _compared(bounds, task, candidate, scored, sliced or {}, found)
        _referred(bounds, task, candidate, reference, found)
    return _decided(broken, undecided, found)


def _decided(broken: int, undecided: str, found: _Findings) -> Verdict:
    """The first of: the data's fault, no numbers, too few rows, a bound broken, a doubt, accepted."""
    if found.faults:
        reasons = [f"the day's data: {reason}" for day in sorted(found.faults) for reason in found.faults[day]]
        return found.verdict("reject", reasons)
    if broken:
        return found.verdict("reject", [f"{broken:,} predictions are not finite numbers"])
    if undecided:
        return found.verdict("inconclusive", [undecided])
    beyond = [check.about for check in found.checks if not check.kept]
    if beyond:
        return found.verdict("reject", beyond)
    if found.doubts:
        return found.verdict(found.doubts[0][0], [reason for _, reason in found.doubts])
    return found.verdict("accept", found.told)


def decide(run: Run) -> Reference:
    """``gate.json`` of the run: kept where it is the verdict on these files by these bounds, written otherwise."""
    verdict = verdict_of(run)
    if storage.exists(run.path("gate.json")):
        kept = run.reference("gate.json")
        if same_verdict(kept, verdict):
            return kept
    return verdict.write(run.path("gate.json"))


def same_verdict(reference: Reference, verdict: Verdict) -> bool:
    """Whether gate.json holds this verdict; numbers may differ as far as another machine adds them up differently."""
    try:
        found = Verdict.load(reference)
    except StorageError:
        return False
    measured = {"metrics", "intervals", "checks", "slices", "drift", "reasons"}
    return found.model_dump(exclude=measured) == verdict.model_dump(exclude=measured)


def verdict_of(run: Run) -> Verdict:
    """The verdict that a run's files give by the bounds of its config.

    Raises:
        StorageError: a file is missing, or has other bytes than the one that was written after it says.
    """
    inputs = run.reference("champion.json")
    bounds, champion = run.config.gate, Champion.load(inputs)
    report = Reference.parse(champion.report).read()
    referred = bool(champion.reference) and not champion.reference_reason
    new_rows = run.reference("new_rows.json") if run.day is not None else None
    history = report.get("table") or [None]
    compared = champion.status == "scored"
    verdict = judge(
        bounds,
        run.config.source.task,
        read_table(run.path("predictions.parquet"), report["predictions_sha256"]),
        champion,
        read_table(run.path("champion.parquet"), champion.scores_sha256) if compared else None,
        reference=read_table(run.path("reference.parquet"), champion.reference_sha256) if referred else None,
        new_rows=None if new_rows is None else NewRows.load(new_rows),
        table=history[-1],
        sliced={name: slices.of(run.dataset, name) for name in bounds.slices} if compared else {},
        groups=slices.groups_of(run.dataset) if Dataset.load(run.dataset).has_group else None,
    )
    made_of = {"inputs": str(inputs), "new_rows": str(new_rows or ""), "bounds": run.config.verdict_digest}
    return verdict.model_copy(update=made_of)


def read_table(uri: str, sha256: str) -> pa.Table:
    """A Parquet file.

    Raises:
        StorageError: it is missing, or has other bytes than ``sha256``.
    """
    return pq.read_table(pa.BufferReader(storage.read_bytes(uri, sha256)))


def _data(bounds: GateConfig, task: str, new_rows: NewRows, found: _Findings) -> None:
    """The day's drift, and the champion's own score on the new rows of each day."""
    drifted, found.drift = checks.drift(bounds, new_rows.drift)
    found.data += drifted
    wrong = [check.about for check in drifted if not check.kept]
    if wrong and new_rows.as_of not in new_rows.accepted:
        found.faults[new_rows.as_of] = wrong
    # The rest of a day, which an earlier run judged on, is too few rows to accuse it.
    least = max(bounds.min_samples, new_rows.days.get(new_rows.as_of, {}).get("samples", 0) / 2)
    for day, metrics in sorted(new_rows.days.items()):
        if metrics["samples"] < least:
            continue
        whose = f"on the new rows of {day} version {new_rows.version}'s "
        for check in checks.absolute(bounds, task, metrics, whose):
            found.data.append(check.model_copy(update={"name": f"{check.name} {day}"}))
            if not check.kept and day not in new_rows.accepted:
                found.faults.setdefault(day, []).append(check.about)


def _own(bounds: GateConfig, task: str, table: Mapping[str, float] | None, found: _Findings) -> None:
    """The bounds on the candidate alone."""
    alone = checks.absolute(bounds, task, found.metrics)
    found.checks += [*alone, *checks.health(bounds, table)]
    found.told += [check.about for check in alone[:1]]


def _compared(
    bounds: GateConfig, task: str, candidate: pa.Table, scored: pa.Table | None, sliced: Sliced, found: _Findings
) -> None:
    """The bounds on the differences to the champion, over all rows and by slices."""
    champion = found.champion
    if champion.status == "none":
        found.told.append("there is no champion to compare with")
        return
    if champion.status == "not_comparable" or scored is None:
        _without(bounds, f"version {champion.version} cannot be compared: {champion.reason}", found)
        return
    rows = _against(bounds, task, "champion", candidate, scored, found)
    if rows is None:
        return
    both, columns = rows
    groups = found.groups_of(both)
    for name, (values, texts) in sliced.items():
        found.slices += slices.compare(bounds, both["sample"], columns, name, values, texts, groups)
    found.checks += slices.check(bounds, found.slices)


def _referred(bounds: GateConfig, task: str, candidate: pa.Table, reference: pa.Table | None, found: _Findings) -> None:
    """The bound on the difference to gate.reference."""
    champion = found.champion
    if champion.reference_reason:
        reason = f"the reference version {champion.reference} cannot be compared: {champion.reference_reason}"
        if champion.reference_given:
            _without(bounds, reason, found)
        else:
            found.told.append(reason)
    elif reference is not None:
        _against(bounds, task, "reference", candidate, reference, found)


def _against(
    bounds: GateConfig, task: str, role: str, candidate: pa.Table, scored: pa.Table, found: _Findings
) -> tuple[pa.Table, tuple[Floats, Floats, Floats]] | None:
    """The rows that were compared with another version; None where they cannot decide."""
    version = getattr(found.champion, "version" if role == "champion" else "reference")
    both, columns = same_rows(candidate, scored)
    few = _undecided(bounds, task, columns[0])
    broken = int((~np.isfinite(columns[2])).sum())
    if few:
        found.doubts.append(("inconclusive", f"of the rows that version {version} could score: {few}"))
        return None
    if broken:
        _without(bounds, f"version {version} cannot be compared: {broken:,} of its scores are not finite", found)
        return None
    check, metrics, intervals = checks.against(bounds, task, role, version, columns, found.groups_of(both))
    found.checks.append(check)
    found.metrics |= metrics
    found.intervals |= intervals
    found.told.append(check.about)
    return both, columns


def _without(bounds: GateConfig, reason: str, found: _Findings) -> None:
    """A comparison that cannot be made keeps the champion, or leaves it to the other bounds."""
    if bounds.on_schema_change == "keep":
        found.doubts.append(("not_comparable", reason))
    else:
        found.told.append(f"{reason}; by gate.on_schema_change = absolute the other bounds decide")


def _undecided(bounds: GateConfig, task: str, labels: Floats) -> str:
    """Why these rows cannot decide anything; empty if they can."""
    if len(labels) < bounds.min_samples:
        return f"{len(labels):,} test samples are fewer than gate.min_samples = {bounds.min_samples:,}"
    if task == "click" and len(np.unique(labels)) < 2:
        return f"all {len(labels):,} test labels are {labels[0]:g}, and AUC needs both classes"
    clicks = int((labels > 0.5).sum())
    if task == "click" and min(clicks, len(labels) - clicks) < 2:
        return f"{clicks:,} of {len(labels):,} test labels are 1: AUC has an interval from two of each class on"
    return ""


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(column.to_numpy(), dtype=np.float64)
