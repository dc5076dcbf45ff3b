"""Writes ``report.html``: one file with the verdict first, then its reasons, then everything else.

Made from report.json, champion.json, gate.json, version.json and new_rows.json, as far as they are there, so it can be
written again after each step. No script, no request to anywhere; figures are inline SVG.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

from des_core import storage
from des_core.contracts import Dataset
from des_core.release.report import figures, profile, training_sections, verdict_sections
from des_core.release.report.markup import number, page, parts
from des_core.run import Day, Run

Document = dict[str, Any]


class RunResults(NamedTuple):
    """What a run has left so far; None where a step has not run, or the run is not a day's."""

    report: Document
    dataset: Dataset
    config: Document
    verdict: Document | None = None
    version: Document | None = None
    new_rows: Document | None = None
    day: Day | None = None
    scores: training_sections.Scores | None = None


def write(run: Run) -> str:
    """Write the run's page from whatever is there, and return its address."""
    report = storage.read_json(run.path("report.json")) | (_document(run, "measured.json") or {})
    found = RunResults(
        report,
        Dataset.load(run.dataset),
        run.config.recorded.model_dump(mode="json"),
        _document(run, "gate.json"),
        _document(run, "version.json"),
        _document(run, "new_rows.json"),
        run.day,
        training_sections.scores(report, _document(run, "champion.json")),
    )
    storage.write_bytes(run.path("report.html"), page_of(found).encode())
    return run.path("report.html")


def page_of(found: RunResults) -> str:
    """The page as HTML."""
    report, verdict, day = found.report, found.verdict, found.day
    rows_name = "tail" if day else "test"
    key = "rmse" if report.get("task") == "rating" else "auc"
    bounds = found.config.get("gate", {})
    bound = bounds.get("max_rmse_rise") if key == "rmse" else -bounds.get("max_auc_drop", 0.0)
    as_of = day.as_of if day else ""
    name = " ".join([report["run"]["name"], as_of]).strip()
    return page(
        f"{name}: {verdict_sections.title(verdict)}",
        (
            parts.heading(report, as_of),
            verdict_sections.decision(verdict, found.version, as_of),
            _tiles(report, verdict, rows_name),
            _day(day, report) if day else "",
            verdict_sections.checks(verdict),
            verdict_sections.metrics(report, verdict, rows_name),
            training_sections.curves(
                report, rows_name, found.scores, verdict_sections.differences(report, verdict, key, bound)
            ),
            verdict_sections.slices(verdict),
            verdict_sections.drift(verdict, found.new_rows, bounds.get("max_psi")),
            verdict_sections.progress(found.new_rows),
            training_sections.network(report),
            profile.steps(report),
            training_sections.workers(report),
            training_sections.tables(report),
            training_sections.data(report, found.dataset, tail=day is not None),
            parts.footer(
                json.dumps(found.config, indent=1, ensure_ascii=False),
                report["run"]["key"],
                report["dataset"].get("reference", ""),
                report["run"]["config_digest"],
            ),
        ),
    )


def _document(run: Run, name: str) -> Document | None:
    return storage.read_json(run.path(name)) if storage.exists(run.path(name)) else None


def _tiles(report: Document, verdict: Document | None, rows_name: str) -> Any:
    """The tiles with the most important numbers."""
    tiles: list[tuple[str, str, str]] = []
    for key, name, meaning in verdict_sections.METRICS:
        if report.get(key) is not None:
            shown = name if tiles else f"{rows_name} {name}"
            tiles.append((shown, number(report[key]), verdict_sections.beside(report, verdict, key) or meaning))
    peak = f"samples/s, {report['peak_rss_mb']:,.0f} MB at most"
    tiles.append(("speed", figures.short(report["samples_per_s"]), peak))
    return parts.tiles(tiles)


def _day(day: Day, report: Document) -> Any:
    """What a day's run went on from, and what it trained on."""
    window = sorted(day.days)
    facts: list[tuple[str, str]] = [
        ("as of", day.as_of),
        ("window", f"{window[0]} to {window[-1]}, {len(window):,} days" if window[1:] else "".join(window) or "no day"),
        ("parent", f"version {day.champion}" if day.champion else "none: there was no champion"),
    ]
    if day.trained_through:
        facts.append(("parent's cut", _moment(day.trained_through)))
    facts.append(("cut: trained through, tail from", _moment(day.cut)))
    facts.append(("left out", ", ".join(day.left_out) or "no day"))
    return parts.section("The day", parts.facts(facts, report.get("fresh") or ()))


def _moment(micros: int) -> str:
    """Event time in UTC, to the second."""
    return datetime.fromtimestamp(micros // 1_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
