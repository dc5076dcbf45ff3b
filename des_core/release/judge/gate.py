"""Candidate against champion on the same rows -> a verdict, with its reasons.

    accept  iff  every absolute bound holds  and  low(AUC(candidate) - AUC(champion)) > -max_auc_drop
                                        (rating:  high(RMSE(candidate) - RMSE(champion)) < max_rmse_rise)

low and high are the ends of the difference's 95 % interval (DeLong; by groups of rows where source.group names them): a
candidate is not taken because too few rows could not tell that it is worse. The same rule holds against a reference,
the champion of a week before or a version that gate.reference names, and with gate.slice_max_auc_drop among the rows of
single values. What the gate reads are records of what the workers measured (engine/judging): no row comes here.

Rows that cannot decide (fewer than min_samples, or hardly a second class) are inconclusive, and a champion that cannot
score them is not comparable: in both cases the champion stays. Without a champion the absolute bounds alone decide.
Where the day's fields drifted beyond bounds, or the champion itself fails on rows that nobody trained on, the reason
is the data: the candidate is rejected whatever it scores, and the verdict names the days.

Source: DeLong et al., "Comparing the areas under two or more correlated ROC curves", Biometrics 1988.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from des_core import storage
from des_core.config import GateConfig
from des_core.contracts import Reference
from des_core.errors import StorageError, UserError
from des_core.release.judge import checks, slices
from des_core.run import Run
from des_core.verdict import Champion, Check, Comparison, Drift, Measured, NewRows, Outcome, Slice, Verdict


@dataclass
class _Findings:
    """What was found so far."""

    champion: Champion
    metrics: dict[str, float]
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


def judge(
    bounds: GateConfig,
    task: str,
    candidate: Measured,
    champion: Champion,
    *,
    new_rows: NewRows | None = None,
    table: Mapping[str, float] | None = None,
) -> Verdict:
    """The verdict on a candidate, by what was measured of it and of the versions beside it.

    Args:
        table: the last line of the report's table statistics.
    """
    found = _Findings(champion, {"samples": float(candidate.samples)} | candidate.metrics)
    found.intervals |= candidate.intervals
    if new_rows is not None:
        _data(bounds, task, new_rows, found)
    undecided = _undecided(bounds, task, candidate)
    if not candidate.broken and not undecided:
        _own(bounds, task, table, found)
        _compared(bounds, task, found)
        _referred(bounds, task, found)
    return _decided(candidate.broken, undecided, found)


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
        UserError: gate.slices names a field by which the champion was not compared.
    """
    inputs = run.reference("champion.json")
    bounds, champion = run.config.gate, Champion.load(inputs)
    report = Reference.parse(champion.report).read()
    new_rows = run.reference("new_rows.json") if run.day is not None else None
    history = report.get("table") or [None]
    unknown = sorted(set(bounds.slices) - set(champion.slices))
    if champion.status == "scored" and unknown:
        raise UserError(f"{inputs.uri}: the champion was not compared by {unknown[0]}; run des evaluate first")
    verdict = judge(
        bounds,
        run.config.source.task,
        Measured.model_validate(report["measured"]),
        champion,
        new_rows=None if new_rows is None else NewRows.load(new_rows),
        table=history[-1],
    )
    made_of = {"inputs": str(inputs), "new_rows": str(new_rows or ""), "bounds": run.config.verdict_digest}
    return verdict.model_copy(update=made_of)


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


def _compared(bounds: GateConfig, task: str, found: _Findings) -> None:
    """The bounds on the differences to the champion, over all rows and by slices."""
    champion = found.champion
    if champion.status == "none":
        found.told.append("there is no champion to compare with")
        return
    if champion.status == "not_comparable" or champion.comparison is None:
        _without(bounds, f"version {champion.version} cannot be compared: {champion.reason}", found)
        return
    if _against(bounds, task, "champion", champion.comparison, found):
        found.slices += slices.kept(bounds, champion.comparison)
        found.checks += slices.check(bounds, found.slices)


def _referred(bounds: GateConfig, task: str, found: _Findings) -> None:
    """The bound on the difference to gate.reference."""
    champion = found.champion
    if champion.reference_reason:
        reason = f"the reference version {champion.reference} cannot be compared: {champion.reference_reason}"
        if champion.reference_given:
            _without(bounds, reason, found)
        else:
            found.told.append(reason)
    elif champion.reference_comparison is not None:
        _against(bounds, task, "reference", champion.reference_comparison, found)


def _against(bounds: GateConfig, task: str, role: str, comparison: Comparison, found: _Findings) -> bool:
    """Whether the rows that another version scored too can decide; what they decide is a finding."""
    version = getattr(found.champion, "version" if role == "champion" else "reference")
    few = _undecided(bounds, task, comparison.theirs)
    if few:
        found.doubts.append(("inconclusive", f"of the rows that version {version} could score: {few}"))
        return False
    broken = comparison.theirs.broken
    if broken:
        _without(bounds, f"version {version} cannot be compared: {broken:,} of its scores are not finite", found)
        return False
    check, metrics, intervals = checks.against(bounds, task, role, version, comparison)
    found.checks.append(check)
    found.metrics |= metrics
    found.intervals |= intervals
    found.told.append(check.about)
    return True


def _without(bounds: GateConfig, reason: str, found: _Findings) -> None:
    """A comparison that cannot be made keeps the champion, or leaves it to the other bounds."""
    if bounds.on_schema_change == "keep":
        found.doubts.append(("not_comparable", reason))
    else:
        found.told.append(f"{reason}; by gate.on_schema_change = absolute the other bounds decide")


def _undecided(bounds: GateConfig, task: str, rows: Measured) -> str:
    """Why these rows cannot decide anything; empty if they can."""
    if rows.samples < bounds.min_samples:
        return f"{rows.samples:,} test samples are fewer than gate.min_samples = {bounds.min_samples:,}"
    if task == "click" and rows.labels is not None and rows.labels[0] == rows.labels[1]:
        return f"all {rows.samples:,} test labels are {rows.labels[0]:g}, and AUC needs both classes"
    if task == "click" and min(rows.positives, rows.samples - rows.positives) < 2:
        many = f"{rows.positives:,} of {rows.samples:,}"
        return f"{many} test labels are 1: AUC has an interval from two of each class on"
    return ""
