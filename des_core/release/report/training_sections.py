"""Sections of the page about training: curves, bytes on the wire, workers, tables, data."""

from __future__ import annotations

from typing import Any, NamedTuple

from markupsafe import Markup

from des_core.contracts import Dataset
from des_core.log import byte_text
from des_core.release.report import figures
from des_core.release.report.markup import count, cut, parts

TOP_VALUES = 3

Document = dict[str, Any]


class Scores(NamedTuple):
    """What the page draws of the scores themselves."""

    clicked: list[float]
    """Share of the clicked samples in each bin of the prediction."""
    others: list[float]
    high: float
    """The last bin's end."""
    champion_auc: float = 0.0
    champion_roc: tuple[list[float], ...] = ()
    """The champion on the same rows; empty without one."""
    champion_bins: tuple[dict[str, float], ...] = ()


def scores(report: Document, champion: Document | None) -> Scores | None:
    """Shares by bin of the prediction, and the champion's curves; None where the predictions cannot be drawn.

    Args:
        report: report.json.
        champion: champion.json.
    """
    drawn = report.get("scores")
    if not drawn:
        return None
    found = Scores(drawn["clicked"], drawn["others"], drawn["high"])
    theirs = (champion or {}).get("comparison") or {}
    if not theirs.get("roc"):
        return found
    return found._replace(
        champion_auc=theirs["theirs"]["metrics"]["auc"],
        champion_roc=tuple(theirs["roc"]),
        champion_bins=tuple(theirs["calibration_bins"]),
    )


def curves(report: Document, rows_name: str, drawn: Scores | None, first: Markup) -> Markup:
    """How it learned, how it ranks, how honest its probabilities are, how the table grew.

    Args:
        report: report.json.
        rows_name: what the rows that judge are called.
        drawn: what is drawn of the scores.
        first: the figure of differences to other versions, or empty.
    """
    rating = report.get("task") == "rating"
    key, name = ("rmse", "RMSE") if rating else ("auc", "AUC")
    loss, what = ("mean squared error", "label") if rating else ("mean log loss", "click rate")
    epochs = [epoch for epoch in report.get("epochs") or [] if epoch.get(key) is not None]
    champion = drawn is not None and bool(drawn.champion_roc)
    drawings: list[Markup] = []
    if first:
        drawings.append(
            parts.figure(f"{name} beside other versions", "difference on the same rows, 95 % interval", first)
        )
    if report.get("roc"):
        lines = figures.roc_curve(
            report["roc"], report["auc"], *((drawn.champion_roc, drawn.champion_auc) if drawn and champion else ())
        )
        drawings.append(parts.figure(f"ROC, {rows_name}", "true positives found, by false positives", lines))
    if report.get("calibration_bins"):
        under_it = f"observed {what} of equally large bins; dashed: perfect"
        lines = figures.calibration_plot(report["calibration_bins"], what, drawn.champion_bins if drawn else ())
        drawings.append(parts.figure(f"Calibration, {rows_name}", under_it, lines))
    if drawn:
        lines = figures.score_curves(drawn.clicked, drawn.others, drawn.high)
        drawings.append(parts.figure(f"Scores, {rows_name}", "share of clicked and of other samples", lines))
    if report.get("history"):
        lines = figures.loss_curve(report["history"])
        drawings.append(parts.figure("Training loss", f"{loss} of the samples since the last point", lines))
    if epochs:
        drawings.append(
            parts.figure(f"Valid {name}", "at the end of each epoch", figures.epoch_curve(epochs, key, name))
        )
    if report.get("table"):
        drawings.append(parts.figure("Table", "rows over all workers", figures.table_curve(report["table"])))
    return parts.section("Figures", parts.figures(drawings)) if drawings else Markup()


def network(report: Document) -> Markup:
    """Bytes of each line of the ledger: what the plan predicted and what was counted."""
    ledger = report.get("exchange") or {}
    if not ledger:
        return Markup()
    most = max(line[f"{kind}_bytes_per_step"] for line in ledger.values() for kind in ("predicted", "counted"))
    if not most:
        told = "One worker sends nothing to others." if report["workers"] == 1 else "Nothing was sent."
        return parts.section("Network", parts.lead(told))
    rows = []
    for name, line in sorted(ledger.items(), key=lambda item: -item[1]["predicted_bytes_per_step"]):
        predicted, counted = line["predicted_bytes_per_step"], line["counted_bytes_per_step"]
        bars = parts.bar(predicted / most, "predicted") + parts.bar(counted / most)
        ratio = f"{counted / predicted:.3f}" if predicted else "\u2013"
        ways = [
            byte_text(line[way]["counted_bytes_per_step"]) if way in line else "" for way in ("forward", "backward")
        ]
        cells = [byte_text(predicted), byte_text(counted), ratio, *ways, f"{line.get('ms_per_step', 0):.2f}"]
        rows.append([parts.under(name, line["kind"]), bars, *cells])
    names = ("predicted", "counted", "ratio", "forward", "backward", "ms")
    columns = [("exchange", "words"), ("", "bars"), *((name, "number") for name in names)]
    return parts.section(
        "Network", parts.lead(parts.predicted_and_counted()), parts.table("Bytes by exchange", columns, rows)
    )


def workers(report: Document) -> Markup:
    """Who owns which fields, both balances as the plan expected them, and the memory that each role took."""
    plan = report["plan"]
    memory = {
        role: report[key] for role, key in (("train", "memory"), ("evaluate", "evaluate_memory")) if key in report
    }
    rows = [
        [
            str(row["worker"]),
            ", ".join(row["fields"]) or "none",
            parts.share(row["lookups_share"]),
            parts.share(row["bytes_share"]),
            f"{row['rows']:,}",
            *(
                f"{byte_text(mb[number] * 2**20)}"
                for told in memory.values()
                for mb in (told["predicted_mb"], told["measured_mb"])
            ),
        ]
        for number, row in enumerate(plan["placement"])
    ]
    columns = [("worker", ""), ("fields", "about"), ("lookups", "number"), ("bytes", "number"), ("rows", "number")]
    columns += [(f"{role}, {what}", "number") for role in memory for what in ("predicted", "measured")]
    choice = ", ".join(f"{name} by {kind}" for name, kind in plan["choice"].items())
    upper = ", upper part on every worker" if plan.get("upper") == "replicated" else ""
    told = parts.lead(f"Exchange: {choice}{upper}.") if choice and report["workers"] > 1 else ""
    return parts.section("Workers", told, parts.table("Workers", columns, rows))


def tables(report: Document) -> Markup:
    """The section about rows: admitted, evicted and held."""
    if not report.get("table"):
        return Markup()
    last = report["table"][-1]
    cells = [f"{last[key]:,.0f}" for key in ("rows", "candidates", "admitted", "evicted")]
    cells += [byte_text(last["bytes"]), f"{last['bytes_per_row']:.0f}", f"{last['load']:.2f}"]
    names = (
        "rows",
        "waiting for admission",
        "admitted so far",
        "evicted so far",
        "memory",
        "bytes per row",
        "load factor",
    )
    facts = list(zip(names, cells, strict=True))
    saved = report.get("checkpoints")
    if saved:
        facts += [
            ("checkpoints written", f"{saved['saves']:,.0f}"),
            ("bytes written to checkpoints", byte_text(saved["written_bytes"])),
            ("bytes read from a checkpoint", byte_text(saved["read_bytes"])),
            ("training paused to write them", f"{saved['pause_s']:.2f} s of {saved['write_s']:.2f}"),
        ]
    return parts.section("Tables", parts.facts(facts))


def data(report: Document, dataset: Dataset, tail: bool) -> Markup:
    """Rows of each part, and what the fields hold.

    Args:
        report: report.json.
        dataset: the data manifest.
        tail: the test part is the tail of a day.
    """
    total = sum(dataset.rows(split) for split in dataset.splits) or 1
    named = {"train": "train", "valid": "valid", "test": "tail" if tail else "test"}
    rows = [
        [name, f"{dataset.rows(split):,}", parts.share(dataset.rows(split) / total)]
        for split, name in named.items()
        if dataset.rows(split) or not tail
    ]
    bad = sum(part.bad_rows for part in dataset.parts.values())
    told = f"{count(len(dataset.files), 'raw file')}, {count(len(dataset.parts), 'part')}"
    told += f", {count(bad, 'bad row')} in quarantine." if bad else ", no bad rows."
    splits = parts.table("Parts", [("part", ""), ("rows", "number"), ("share", "number")], rows, narrow=True)
    fields = []
    for field in dataset.fields:
        stats = dataset.stats.get(field.name)
        if stats is None:
            continue
        top = ", ".join(f"{cut(text)} ({many:,})" for _, many, text in stats.top[:TOP_VALUES])
        kind = field.kind + (f", {field.derive.partition(':')[0]}" if field.derive else "")
        fields.append(
            [
                parts.under(cut(field.name), kind),
                f"{stats.cardinality:,}",
                f"{stats.lookups_per_sample:.2f}",
                parts.share(stats.missing_share),
                parts.soft(top),
            ]
        )
    columns = [("field", "words"), ("values", "number"), ("per sample", "number"), ("missing", "number")]
    columns.append(("most frequent", "about"))
    return parts.section("Data", parts.lead(told), splits, parts.table("Fields", columns, fields))
