"""The gate's bounds, one line each: what was measured, what is allowed, and whether it is kept."""

from __future__ import annotations

from collections.abc import Mapping

from des_core.config import GateConfig
from des_core.verdict import Check, Comparison, Drift, Interval

UNBOUNDED = 1e9
"""A bound from here on is none."""

NAMES = {"auc": "AUC", "logloss": "log loss", "ne": "normalised entropy", "calibration": "calibration", "rmse": "RMSE"}


def absolute(bounds: GateConfig, task: str, metrics: Mapping[str, float], whose: str = "") -> list[Check]:
    """The bounds on one model's metrics; ``whose`` names the model and rows if they are not the candidate's."""
    if task == "rating":
        wanted = [("max_rmse", "rmse", 1)]
    else:
        wanted = [("min_auc", "auc", -1), ("max_logloss", "logloss", 1), ("max_ne", "ne", 1)]
        wanted += [("min_calibration", "calibration", -1), ("max_calibration", "calibration", 1)]
    checks: list[Check] = []
    for key, metric, side in wanted:
        bound, value = getattr(bounds, key), metrics.get(metric)
        # Of what is not bounded a line would say nothing, but for the first, which names the metric judged by.
        if value is not None and (not checks or (bound < UNBOUNDED if side > 0 else bound > 0)):
            checks.append(_check(key, f"{whose}{NAMES[metric]} {value:.4f}", value, bound, side))
    return checks


def health(bounds: GateConfig, table: Mapping[str, float] | None) -> list[Check]:
    """The bounds on the candidate's rows, from the last line of the report's table."""
    if not table:
        return []
    checks: list[Check] = []
    if bounds.max_load < 1:
        checks.append(_check("max_load", f"load {table['load']:.2f} of the index", table["load"], bounds.max_load, 1))
    if bounds.max_rows:
        checks.append(_check("max_rows", f"{table['rows']:,.0f} rows", table["rows"], bounds.max_rows, 1))
    if bounds.max_evicted_share < 1:
        share = table["evicted"] / max(table["admitted"], 1)
        what = f"{share:.1%} of the rows admitted were evicted, which"
        checks.append(_check("max_evicted_share", what, share, bounds.max_evicted_share, 1))
    return checks


def drift(bounds: GateConfig, fields: Mapping[str, Mapping[str, float]]) -> tuple[list[Check], list[Drift]]:
    """The bounds on each field's drift: one line for each bound, of the field closest to it, or of all beyond it."""
    lines, checks, broken = [], [], set()
    for key, what in (
        ("max_psi", "population stability index {value:.3f}"),
        ("max_new_share", "{value:.1%} of the values are new, which"),
        ("max_missing_share", "{value:+.1%} rows without a value, which"),
    ):
        bound = getattr(bounds, key)
        values = {name: _drifted(key, field) for name, field in fields.items()}
        beyond = [name for name, value in values.items() if value > bound]
        broken.update(beyond)
        for name in beyond or sorted(values, key=lambda name: -values[name])[:1]:
            about = f"field {name}: {what.format(value=values[name])}"
            checks.append(_check(f"{key} {name}", about, values[name], bound, 1))
    for name, field in fields.items():
        lines.append(Drift(field=name, kept=name not in broken, **field))
    return checks, lines


def _drifted(key: str, field: Mapping[str, float]) -> float:
    if key == "max_missing_share":
        return field["missing_share"] - field["missing_before"]
    return field[key.removeprefix("max_")]


def _check(key: str, what: str, value: float, bound: float, side: int) -> Check:
    """``side`` is 1 for an upper bound, -1 for a lower one."""
    kept = value <= bound if side > 0 else value >= bound
    words = ("is at most" if kept else "is above") if side > 0 else ("is at least" if kept else "is below")
    about = f"{what} {words} gate.{key.partition(' ')[0]} = {bound:g}"
    return Check(name=key, value=value, bound=bound, kept=kept, about=about)


def against(
    bounds: GateConfig, task: str, role: str, version: str, found: Comparison
) -> tuple[Check, dict[str, float], dict[str, Interval]]:
    """The bound on the difference to another version: check, metrics and intervals, named by its role.

    Where rows have groups the bound is held by groups; the interval of independent rows is kept beside it, as
    ``..._by_rows``.

    Args:
        role: champion or reference.
    """
    apart = "" if role == "champion" else f"{role}_"
    difference, interval, theirs = found.difference, found.interval, found.theirs
    if task == "rating":
        kind, bound, key = "rmse", bounds.max_rmse_rise, "max_rmse_rise"
        kept, worst, allowed = interval[1] < bound, interval[1], bound
    else:
        kind, bound, key = "auc", bounds.max_auc_drop, "max_auc_drop"
        kept, worst, allowed = interval[0] > -bound, interval[0], -bound
    who = f"{'' if role == 'champion' else f'the {role} '}version {version}'s"
    many = f"{theirs.samples:,} rows" + ("" if found.groups is None else f" of {found.groups:,} groups")
    about = f"{NAMES[kind]} differs by {difference:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f}) from {who} "
    about += f"on the same {many}, {'within' if kept else 'beyond'} gate.{key} = {bound:g}"
    half = (interval[1] - interval[0]) / 2
    if not kept and half >= bound:
        about += f"; so few rows tell no difference below {half:.4f}: judge on more (eval.tail), or allow more"
    numbers = {f"{role}_{name}": value for name, value in theirs.metrics.items()}
    numbers |= {f"{apart}{kind}_difference": difference, f"{apart}compared_samples": float(theirs.samples)}
    spans = {f"{role}_{name}": span for name, span in theirs.intervals.items()}
    if found.by_rows is not None:
        spans[f"{apart}{kind}_difference_by_rows"] = found.by_rows
    check = Check(name=f"{key}{f' {role}' if apart else ''}", value=worst, bound=allowed, kept=kept, about=about)
    return check, numbers, spans | {f"{apart}{kind}_difference": interval}
