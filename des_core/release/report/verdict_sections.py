"""Sections of the page about the verdict: its reasons and checks, the champion, slices, drift.

Read from gate.json, version.json and new_rows.json as plain documents, so that a page can be made of an older run too.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from des_core.release.report import figures
from des_core.release.report.markup import MOST_ROWS, amount, count, cut, number, parts, signed

METRICS = (
    ("auc", "AUC", "area under the ROC curve"),
    ("gauc", "GAUC", "mean AUC of the groups"),
    ("logloss", "log loss", "nats per sample"),
    ("ne", "norm. entropy", "log loss / that of the mean rate"),
    ("calibration", "calibration", "predicted / observed"),
    ("rmse", "RMSE", "root mean squared error"),
    ("mae", "MAE", "mean absolute error"),
)
ICONS = {"accept": "\u2713", "reject": "\u2715", "inconclusive": "?", "not_comparable": "?"}
FIRST_REASONS = 5
"""More are folded: the first one decided, and the checks have them all."""
LONGEST_LINE = 400
"""Characters of a reason or of what a check is about: both may quote a value of the logs."""
LARGE_SHIFT = 0.25
"""A PSI above it is usually called a large shift."""

Document = dict[str, Any]


def title(verdict: Document | None) -> str:
    """The verdict in one or two words."""
    return str(verdict["verdict"]).replace("_", " ") if verdict else "not judged yet"


def decision(verdict: Document | None, version: Document | None, day: str) -> Markup:
    """What was decided, in a sentence, and the reasons."""
    if verdict is None:
        return parts.waiting()
    champion = verdict.get("champion")
    stays = f"version {champion} stays champion" if champion else "there is still no champion"
    ours = f"version {version['version']}" if version else "this model"
    passed_over = version is not None and "champion" not in version.get("aliases", ("champion",))
    becomes = (
        "is not champion, another one came first" if passed_over else "is champion" if version else "is to be champion"
    )
    outcome = str(verdict["verdict"])
    sentence = {
        "accept": f"Accepted: {ours} {becomes}",
        "reject": f"Rejected: {stays}",
        "inconclusive": f"Inconclusive: {stays}",
        "not_comparable": f"Not comparable: {stays}",
    }[outcome]
    style = "inconclusive" if outcome == "accept" and passed_over else outcome
    reasons = [cut(line, LONGEST_LINE) for line in verdict.get("reasons", ())]
    more = reasons[FIRST_REASONS:]
    folded = count(len(more), "more reason") if more else ""
    fault = bool(verdict.get("data_at_fault"))
    return parts.decision(
        style, ICONS[outcome], sentence, fault, day, reasons[:FIRST_REASONS], more[: MOST_ROWS - FIRST_REASONS], folded
    )


def beside(report: Document, verdict: Document | None, key: str) -> str:
    """The champion's value of a metric on the same rows, else the valid part's; empty if there is neither."""
    other, difference, _ = _compared("champion", key, report, verdict or {})
    if other is not None:
        return f"champion {number(other)}" + ("" if difference is None else f" ({signed(difference)})")
    valid = (report.get("valid") or {}).get(key)
    return "" if valid is None else f"valid {number(valid)}"


def metrics(report: Document, verdict: Document | None, rows_name: str) -> Markup:
    """Every metric with its interval, beside the champion, the reference version and the valid part."""
    valid = report.get("valid") or {}
    judged = verdict or {}
    values, intervals = judged.get("metrics", {}), judged.get("intervals") or {}
    columns = [("", ""), (rows_name, "number")]
    others = [
        (prefix, str(judged.get(prefix)))
        for prefix in ("champion", "reference")
        if judged.get(prefix) and any(name.startswith(f"{prefix}_") for name in values)
    ]
    for prefix, version in others:
        columns += [(f"{prefix} {version}", "number"), ("difference", "number")]
    if valid.get("samples"):
        columns.append(("valid", "number"))
    columns.append(("meaning", "about"))
    rows = []
    for key, name, meaning in METRICS:
        if report.get(key) is None and valid.get(key) is None:
            continue
        row: list[str] = [name, _with_interval(number(report.get(key)), _ends(intervals, key))]
        for prefix, _ in others:
            value, difference, apart = _compared(prefix, key, report, judged)
            row += [_with_interval(number(value), _ends(intervals, f"{prefix}_{key}")) if value is not None else ""]
            row += [_with_interval(signed(difference), apart, sign=True) if difference is not None else ""]
        if valid.get("samples"):
            row.append(number(valid.get(key)))
        if key == "gauc" and report.get("without_group"):
            meaning += f"; {report['without_group']:,} rows without a group are left out"
        rows.append([*row, parts.soft(meaning)])
    samples = f"{report['samples']:,} {rows_name} rows"
    samples += f", {valid['samples']:,} valid rows" if valid.get("samples") else ""
    told = f"{samples}. Small numbers are 95 % intervals." if intervals else f"{samples}."
    return parts.section("Metrics", parts.lead(told), parts.table("Metrics", columns, rows))


def _with_interval(text: str, ends: tuple[float, float] | None, sign: bool = False) -> Markup:
    return parts.under(text, parts.interval(ends, sign))


def _compared(
    prefix: str, key: str, report: Document, verdict: Document
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """The other version's value of a metric, the difference to it and its interval, as far as they are known."""
    values, apart = verdict.get("metrics", {}), "" if prefix == "champion" else f"{prefix}_"
    other, difference = values.get(f"{prefix}_{key}"), values.get(f"{apart}{key}_difference")
    # The gate compares one metric; another one's difference is as good if both were measured on all the rows.
    if difference is None and other is not None and report.get(key) is not None:
        same = values.get(f"{apart}compared_samples") == report["samples"]
        difference = report[key] - other if same else None
    return other, difference, _ends(verdict.get("intervals") or {}, f"{apart}{key}_difference")


def _ends(intervals: Document, name: str) -> tuple[float, float] | None:
    """An interval that has both ends."""
    ends = intervals.get(name)
    return (ends[0], ends[1]) if ends and None not in ends else None


def differences(report: Document, verdict: Document | None, key: str, bound: float | None) -> Markup:
    """Figure of the candidate's difference to the champion and the reference; empty without an interval."""
    lines = []
    for prefix in ("champion", "reference"):
        _, difference, ends = _compared(prefix, key, report, verdict or {})
        if difference is not None and ends:
            lines.append((f"{prefix} {(verdict or {}).get(prefix)}", difference, *ends))
    return figures.differences(lines, bound, key.upper()) if lines else Markup()


def checks(verdict: Document | None) -> Markup:
    """One line per bound of the gate, broken ones first."""
    lines = sorted((verdict or {}).get("checks") or (), key=lambda line: bool(line["kept"]))
    if not lines:
        return Markup()
    rows = [
        [
            parts.under(cut(str(line["name"])), cut(str(line.get("about") or ""), LONGEST_LINE)),
            parts.state(line["kept"]),
            amount(line.get("value")),
            amount(line.get("bound"), rounded=False),
        ]
        for line in lines
    ]
    broken = sum(not line["kept"] for line in lines)
    told = f"{count(len(lines), 'bound')}, " + (f"{broken:,} broken." if broken else "all kept.")
    columns = [("check", "words long"), ("", ""), ("value", "number"), ("bound", "number")]
    return parts.section("Checks", parts.lead(told), parts.table("Checks", columns, rows, narrow=True))


def slices(verdict: Document | None) -> Markup:
    """Candidate against champion on parts of the rows, the worst first."""
    lines = list((verdict or {}).get("slices") or ())
    if not lines:
        return Markup()
    lines.sort(key=lambda line: (line["kept"], line["difference"] if line.get("difference") is not None else 0.0))
    reach = max([abs(line[end]) for line in lines for end in ("difference", "low") if line.get(end) is not None] or [0])
    rows = []
    for line in lines:
        drawn = figures.difference_bar(line.get("difference"), line.get("low"), reach or 1.0)
        rows.append(
            [
                parts.under(f"{cut(str(line['field']))} = {cut(str(line['value']))}", f"{line['samples']:,} rows"),
                parts.state(line["kept"]),
                number(line.get("auc")),
                number(line.get("champion_auc")),
                signed(line.get("difference")),
                signed(line.get("low")),
                drawn,
            ]
        )
    columns = [("slice", "words"), ("", ""), ("AUC", "number"), ("champion", "number")]
    columns += [("difference", "number"), ("95 % at least", "number"), ("worse | better", "drawing")]
    broken = sum(not line["kept"] for line in lines)
    told = f"{count(len(lines), 'part')} of the rows with support enough, "
    told += f"{broken:,} worse than its bound." if broken else "none worse than its bound."
    return parts.section("Slices", parts.lead(told), parts.table("Slices", columns, rows))


def drift(verdict: Document | None, new_rows: Document | None, bound: float | None) -> Markup:
    """How far each field's values are from those of the days before; fields beyond a bound first.

    Args:
        verdict: gate.json.
        new_rows: new_rows.json.
        bound: the PSI at which a bar is full.
    """
    lines = list((verdict or {}).get("drift") or ())
    if not lines and new_rows:
        lines = [{"field": field, **line} for field, line in (new_rows.get("drift") or {}).items()]
    if not lines:
        return Markup()
    lines.sort(key=lambda line: (line.get("kept", True), -(line.get("psi") or 0.0)))
    judged = any("kept" in line for line in lines)
    columns = [("field", "words")] + [("", "")] * judged
    columns += [("PSI", "number"), ("", "bars"), ("new values", "number"), ("missing", "number"), ("before", "number")]
    rows = []
    for line in lines:
        psi = line.get("psi")
        style = "bad" if not line.get("kept", True) else ""
        rows.append(
            [
                cut(str(line["field"])),
                *([parts.state(line.get("kept", True))] * judged),
                number(psi),
                "" if psi is None else parts.bar(psi / (bound or LARGE_SHIFT), style),
                parts.percent(line.get("new_share")),
                parts.percent(line.get("missing_share")),
                parts.percent(line.get("missing_before")),
            ]
        )
    told = f"The new rows beside the days before. PSI: 0 is the same distribution, above {LARGE_SHIFT:g} a large shift"
    told += f"; a full bar is gate.max_psi = {bound:g}." if bound else "."
    return parts.section("Drift of the day", parts.lead(told), parts.table("Drift", columns, rows))


def progress(new_rows: Document | None) -> Markup:
    """The champion's own score on the new rows, by day: nothing of them had been trained on."""
    if not new_rows:
        return Markup()
    days, whole = new_rows.get("days") or {}, new_rows.get("metrics") or {}
    kinds = [
        (key, name) for key, name, _ in METRICS if any(line.get(key) is not None for line in [whole, *days.values()])
    ]
    if not kinds:
        return Markup()
    columns = [("day", ""), ("rows", "number"), *((name, "number") for _, name in kinds)]
    rows = [
        [day, amount(line.get("samples")), *(number(line.get(key)) for key, _ in kinds)]
        for day, line in sorted(days.items())
    ]
    if len(days) != 1:
        rows.append(["all", amount(new_rows.get("samples")), *(number(whole.get(key)) for key, _ in kinds)])
    told = f"Version {new_rows.get('version')}, the champion, scored the new rows before anything was trained on them."
    inside = parts.table("Progressive validation", columns, rows)
    key, name = kinds[0]
    points = [(day, line[key]) for day, line in sorted(days.items()) if line.get(key) is not None]
    if len(points) > 1:
        drawn = parts.figure(f"The champion's {name}", "on each new day", figures.day_curve(points, name))
        inside = parts.pair(drawn, inside)
    return parts.section("Progressive validation", parts.lead(told), inside)
