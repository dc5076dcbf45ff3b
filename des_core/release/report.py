"""``report.html``: one file that says first what was decided, then why, then everything else.

Made from report.json, gate.json and version.json, as far as they are there, so it can be written again
after each step. No script, no request to anywhere; figures are inline SVG.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from des_core import storage
from des_core.contracts import Dataset
from des_core.release import figures
from des_core.release.gate import Verdict
from des_core.release.style import STYLE
from des_core.run import Run

TOP_VALUES = 3
SCORE_BINS = 24

METRICS = (
    ("auc", "AUC", "area under the ROC curve"),
    ("gauc", "GAUC", "mean AUC of the groups"),
    ("logloss", "log loss", "nats per sample"),
    ("ne", "norm. entropy", "log loss / that of the mean rate"),
    ("calibration", "calibration", "predicted / observed"),
    ("rmse", "RMSE", "root mean squared error"),
    ("mae", "MAE", "mean absolute error"),
)


def write(run: Run) -> str:
    """Write the run's page from whatever is there, and return its address."""
    report = storage.read_json(run.path("report.json"))
    judged = Verdict.load(run.reference("gate.json")) if storage.exists(run.path("gate.json")) else None
    version = storage.read_json(run.path("version.json")) if storage.exists(run.path("version.json")) else None
    config = run.config.model_dump(mode="json")
    report["scores"] = _scores(run) if report.get("roc") else None
    text = page(report, Dataset.load(run.dataset), config, judged, version)
    storage.write_bytes(run.path("report.html"), text.encode())
    return run.path("report.html")


def page(
    report: dict[str, Any],
    dataset: Dataset,
    config: dict[str, Any],
    verdict: Verdict | None = None,
    version: dict[str, Any] | None = None,
) -> str:
    """The page as HTML."""
    name = report["run"]["name"]
    sections = (
        _heading(report),
        _verdict(verdict, version),
        _tiles(report, verdict),
        _metrics(report),
        _figures(report),
        _network(report),
        _workers(report),
        _tables(report),
        _data(report, dataset),
        _footer(report, config),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: {escape(_title(verdict))}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(section for section in sections if section)}</main></body></html>\n"
    )


def _scores(run: Run) -> tuple[list[float], list[float], float] | None:
    """Shares of the clicked and the other test samples in each bin of the prediction, and the last bin's end."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(run.path("predictions.parquet"))))
    clicked, scores = table["label"].to_numpy() > 0.5, table["probability"].to_numpy()
    if not len(scores) or not np.isfinite(scores).all() or clicked.all() or not clicked.any():
        return None
    high = float(np.quantile(scores, 0.999)) or 1.0
    counts = [np.histogram(scores[part], SCORE_BINS, (0.0, high))[0] / part.sum() for part in (clicked, ~clicked)]
    return counts[0].tolist(), counts[1].tolist(), high


def _title(verdict: Verdict | None) -> str:
    return verdict.verdict.replace("_", " ") if verdict else "not judged yet"


def _heading(report: dict[str, Any]) -> str:
    model = report["model"]["name"]
    workers = _count(report["workers"], "worker")
    what = f"{model} &middot; {workers} &middot; {_count(report['steps'], 'step')} &middot; "
    what += f"{report['trained_samples']:,} samples trained &middot; run {report['run']['key'][:12]}"
    return f"<header><p>{what}</p><h1>{escape(report['run']['name'])}</h1></header>"


def _verdict(verdict: Verdict | None, version: dict[str, Any] | None) -> str:
    """What was decided, in a sentence, and the reasons."""
    if verdict is None:
        return '<section class="verdict waiting"><b>Not judged yet</b>The gate has not run.</section>'
    stays = f"version {verdict.champion} stays champion" if verdict.champion else "there is still no champion"
    ours = f"version {version['version']}" if version else "this model"
    sentence = {
        "accept": f"&#10003; Accepted: {ours} is {'' if version else 'to be '}champion",
        "reject": f"&#10005; Rejected: {stays}",
        "inconclusive": f"? Inconclusive: {stays}",
        "not_comparable": f"? Not comparable: {stays}",
    }[verdict.verdict]
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    return f'<section class="verdict {verdict.verdict}"><b>{sentence}</b><ul>{reasons}</ul></section>'


def _tiles(report: dict[str, Any], verdict: Verdict | None) -> str:
    """The numbers that people look for first."""
    tiles: list[str] = []
    for key, name, meaning in METRICS:
        if report.get(key) is None:
            continue
        beside = _beside(report, verdict, key) or meaning
        tiles.append(_tile(name if tiles else f"test {name}", f"{report[key]:.4f}", beside))
    beside = f"samples/s, {report['peak_rss_mb']:,.0f} MB at most"
    tiles.append(_tile("speed", figures.short(report["samples_per_s"]), beside))
    return f'<section class="tiles">{"".join(tiles)}</section>'


def _beside(report: dict[str, Any], verdict: Verdict | None, key: str) -> str:
    """The champion's value of a metric on the same rows, else the valid part's."""
    if verdict and f"champion_{key}" in verdict.metrics:
        difference = verdict.metrics[f"{key}_difference"]
        return f"champion {verdict.metrics[f'champion_{key}']:.4f} ({difference:+.4f})"
    valid = (report.get("valid") or {}).get(key)
    return "" if valid is None else f"valid {valid:.4f}"


def _tile(name: str, value: str, beside: str) -> str:
    return f'<div class="tile"><span>{name}</span><strong>{value}</strong><small>{escape(beside)}</small></div>'


def _metrics(report: dict[str, Any]) -> str:
    """Test beside valid, every metric."""
    valid = report.get("valid") or {}
    rows = [["samples", f"{report['samples']:,}", f"{valid.get('samples', 0):,}", "rows scored"]]
    for key, name, meaning in METRICS:
        if report.get(key) is not None or valid.get(key) is not None:
            rows.append([name, _number(report.get(key)), _number(valid.get(key)), meaning])
    table = _table(["", "test", "valid", "meaning"], rows, numbers=(1, 2), wide=(3,), styles={3: "soft"})
    return _section("Metrics", f'<div class="narrow">{table}</div>')


def _figures(report: dict[str, Any]) -> str:
    """How it learned, how it ranks, how honest its probabilities are, how the table grew."""
    rating = report.get("task") == "rating"
    key, name = ("rmse", "RMSE") if rating else ("auc", "AUC")
    epochs = [epoch for epoch in report.get("epochs") or [] if epoch.get(key) is not None]
    drawn = []
    if report.get("history"):
        rule = "mean squared error" if rating else "mean log loss"
        drawn.append(
            _figure(
                "Training loss", f"{rule} of the samples since the last point", figures.loss_curve(report["history"])
            )
        )
    if epochs:
        drawn.append(_figure(f"Valid {name}", "at the end of each epoch", figures.epoch_curve(epochs, key, name)))
    if report.get("roc"):
        drawn.append(
            _figure(
                "ROC, test", "true positives found, by false positives", figures.roc_curve(report["roc"], report["auc"])
            )
        )
    if report.get("calibration_bins"):
        what = "label" if rating else "click rate"
        drawn.append(
            _figure(
                "Calibration, test",
                f"observed {what} of equally large bins; dashed: perfect",
                figures.calibration_plot(report["calibration_bins"], what),
            )
        )
    if report.get("scores"):
        drawn.append(
            _figure("Scores, test", "share of clicked and of other samples", figures.score_curves(*report["scores"]))
        )
    if report.get("table"):
        drawn.append(_figure("Table", "rows born so far, all workers", figures.table_curve(report["table"])))
    return _section("Figures", f'<div class="figures">{"".join(drawn)}</div>') if drawn else ""


def _figure(title: str, subtitle: str, svg: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(subtitle)}</figcaption>{svg}</figure>"


def _network(report: dict[str, Any]) -> str:
    """Bytes of each line of the ledger: what the plan predicted and what was counted."""
    ledger = report.get("exchange") or {}
    most = max(
        (line[f"{kind}_bytes_per_step"] for line in ledger.values() for kind in ("predicted", "counted")), default=0
    )
    if not ledger:
        return ""
    if not most:
        lead = "One worker sends nothing to others." if report["workers"] == 1 else "Nothing was sent."
        return _section("Network", f'<p class="lead">{lead}</p>')
    rows = []
    for name, line in sorted(ledger.items(), key=lambda item: -item[1]["predicted_bytes_per_step"]):
        predicted, counted = line["predicted_bytes_per_step"], line["counted_bytes_per_step"]
        bars = f'<i class="bar predicted" style="width:{100 * predicted / most:.1f}%"></i>'
        bars += f'<i class="bar" style="width:{100 * counted / most:.1f}%"></i>'
        ratio = f"{counted / predicted:.3f}" if predicted else "&ndash;"
        ways = [
            bytes_text(line[way]["counted_bytes_per_step"]) if way in line else "" for way in ("forward", "backward")
        ]
        cells = [bytes_text(predicted), bytes_text(counted), ratio, *ways, f"{line.get('ms_per_step', 0):.2f}"]
        rows.append([f"{escape(name)}<br><span class='soft'>{escape(line['kind'])}</span>", bars, *cells])
    lead = (
        "Sent by each worker to others per step, both ways, mean over steps and workers. "
        '<span class="together"><i class="key predicted"></i>predicted</span> '
        '<span class="together"><i class="key counted"></i>counted</span>'
    )
    heads = ["exchange", "", "predicted", "counted", "ratio", "forward", "backward", "ms"]
    table = _table(heads, rows, numbers=(2, 3, 4, 5, 6, 7), raw=True, wide=(5, 6, 7), styles={1: "bars"})
    return _section("Network", f'<p class="lead">{lead}</p>{table}')


def _workers(report: dict[str, Any]) -> str:
    """Who owns which fields, and both balances as the plan expected them."""
    plan = report["plan"]
    rows = [
        [
            str(row["worker"]),
            escape(", ".join(row["fields"])) or "none",
            _share(row["lookups_share"]),
            _share(row["bytes_share"]),
            f"{row['rows']:,}",
        ]
        for row in plan["placement"]
    ]
    heads = ["worker", "fields", "lookups", "bytes", "rows"]
    table = _table(heads, rows, numbers=(4,), raw=True, styles={0: "tight"})
    choice = ", ".join(f"{name} by {kind}" for name, kind in plan["choice"].items())
    upper = ", upper part on every worker" if plan.get("upper") == "replicated" else ""
    lead = f'<p class="lead">Exchange: {escape(choice)}{upper}.</p>' if choice and report["workers"] > 1 else ""
    return _section("Workers", lead + table)


def _tables(report: dict[str, Any]) -> str:
    """What became of the values that training met."""
    if not report.get("table"):
        return ""
    last = report["table"][-1]
    cells = [f"{last[key]:,.0f}" for key in ("rows", "candidates", "admitted", "evicted")]
    cells += [bytes_text(last["bytes"]), f"{last['bytes_per_row']:.0f}", f"{last['load']:.2f}"]
    heads = [
        "rows",
        "waiting for admission",
        "admitted so far",
        "evicted so far",
        "memory",
        "bytes per row",
        "load factor",
    ]
    return _section("Tables", _table(heads, [cells], numbers=tuple(range(len(heads)))))


def _data(report: dict[str, Any], dataset: Dataset) -> str:
    """Rows of each part, and what the fields hold."""
    total = sum(dataset.rows(split) for split in dataset.splits) or 1
    rows = [
        [split, f"{dataset.rows(split):,}", _share(dataset.rows(split) / total)] for split in ("train", "valid", "test")
    ]
    bad = sum(part.bad_rows for part in dataset.parts.values())
    lead = f"{_count(len(dataset.files), 'raw file')}, {_count(len(dataset.parts), 'part')}"
    lead += f", {_count(bad, 'bad row')} in quarantine." if bad else ", no bad rows."
    splits = _table(["part", "rows", "share"], rows, numbers=(1,), raw=True)
    fields = []
    for field in dataset.fields:
        stats = dataset.stats.get(field.name)
        if stats is None:
            continue
        top = ", ".join(f"{text} ({count:,})" for _, count, text in stats.top[:TOP_VALUES])
        kind = field.kind + (f", {field.derive.partition(':')[0]}" if field.derive else "")
        fields.append(
            [
                f"{escape(field.name)}<br><span class='soft'>{escape(kind)}</span>",
                f"{stats.cardinality:,}",
                f"{stats.lookups_per_sample:.2f}",
                _share(stats.missing_share),
                f"<span class='soft'>{escape(top)}</span>",
            ]
        )
    heads = ["field", "values", "per sample", "missing", "most frequent"]
    table = _table(heads, fields, numbers=(1, 2), raw=True, wide=(4,))
    return _section("Data", f'<p class="lead">{escape(lead)}</p><div class="narrow">{splits}</div>{table}')


def _footer(report: dict[str, Any], config: dict[str, Any]) -> str:
    text = escape(json.dumps(config, indent=1, ensure_ascii=False))
    return (
        f"<details><summary>Config of this run</summary><pre>{text}</pre></details>"
        f"<footer>run {report['run']['key']}<br>data {escape(str(report['dataset'].get('reference', '')))}<br>"
        f"config {report['run']['config_digest']}</footer>"
    )


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: tuple[int, ...] = (),
    raw: bool = False,
    wide: tuple[int, ...] = (),
    styles: dict[int, str] | None = None,
) -> str:
    """A table; columns in ``numbers`` are aligned right, those in ``wide`` are left out on a phone."""

    def style(column: int) -> str:
        names = ["number"] * (column in numbers) + ["wide"] * (column in wide)
        names += [styles[column]] if styles and column in styles else []
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f"<th{style(column)}>{escape(text)}</th>" for column, text in enumerate(heads))
    body = "".join(
        "<tr>"
        + "".join(f"<td{style(column)}>{cell if raw else escape(cell)}</td>" for column, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="panel"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _share(share: float) -> str:
    width = min(100.0, max(0.0, 100 * share))
    bar = f'<span class="share"><i style="width:{width:.1f}%"></i></span>'
    return f'<span class="together">{bar}{100 * share:.1f}&thinsp;%</span>'


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.4f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def bytes_text(count: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
