"""The report: one file that needs nothing else, says the verdict first, and never trusts a value with its markup."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from des_core import storage
from des_core.release.judge.gate import decide
from des_core.release.report import report
from des_core.release.report.figures import Axis
from des_core.run import Day
from des_core.verdict import Verdict
from tests.finished import finished_run, write_champion
from tests.release.examples import HOSTILE, days_run

VOID = {"meta", "br", "line", "circle", "polyline", "polygon", "i"}


class Page(HTMLParser):
    """Text, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.order: list[str] = []
        """Names of the elements as they open."""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.order.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.order.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page_of(folder: Path, *overrides: str) -> Page:
    run = finished_run(folder, *overrides)
    page = Page(Path(report.write(run)).read_text())
    assert page.open == []
    return page


def test_everything_to_look_at_is_there_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    for title in ("Training loss", "Valid AUC", "ROC, test", "Calibration, test", "Scores, test", "Table"):
        assert title in page.text
    for word in ("Network", "dense gradients", "279 kB", "Workers", "tags, price", "Data", "41,207", "31.0", "32,000"):
        assert word in page.text
    assert not set(page.order) & {"script", "link", "img", "iframe", "object"}
    assert not [value for name, value in page.attributes if name in ("src", "href") or "url(" in (value or "")]


def test_values_of_the_logs_are_text_not_markup(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "<b>bob</b> (640)" in page.text


def test_before_the_gate_it_says_so_and_afterwards_the_verdict_comes_first(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    assert "Not judged yet" in Path(report.write(run)).read_text()
    write_champion(run)
    decide(run)
    text = Path(report.write(run)).read_text()
    assert text.index("Accepted: this model is to be champion") < text.index("test AUC")
    storage.write_json(run.path("version.json"), {"version": "3"})
    assert "Accepted: version 3 is champion" in Path(report.write(run)).read_text()


@pytest.mark.parametrize(
    ("outcome", "champion", "sentence"),
    [
        ("reject", "2", "Rejected: version 2 stays champion"),
        ("inconclusive", "", "Inconclusive: there is still no champion"),
        ("not_comparable", "2", "Not comparable: version 2 stays champion"),
    ],
)
def test_each_verdict_has_its_sentence_and_reason(tmp_path: Path, outcome: str, champion: str, sentence: str) -> None:
    run = finished_run(tmp_path)
    verdict = {"accepted": False, "verdict": outcome, "reasons": ["1 < 2 & more"], "metrics": {}, "champion": champion}
    Verdict.model_validate(verdict).write(run.path("gate.json"))
    text = Path(report.write(run)).read_text()
    assert sentence in text
    assert "1 &lt; 2 &amp; more" in text


def test_the_champion_stands_beside_the_metric_that_was_compared(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    metrics = {"champion_auc": 0.7, "auc_difference": 0.0123}
    verdict = Verdict(accepted=True, verdict="accept", reasons=("good",), metrics=metrics, champion="2")
    verdict.write(run.path("gate.json"))
    assert "champion 0.7000 (+0.0123)" in Path(report.write(run)).read_text()


def test_a_rating_run_has_a_page_too(tmp_path: Path) -> None:
    page = page_of(tmp_path, "source.task=rating")
    assert "test RMSE" in page.text
    assert "ROC" not in page.text


def test_one_worker_sends_nothing(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    document = storage.read_json(run.path("report.json"))
    document["workers"] = 1
    for line in document["exchange"].values():
        line["predicted_bytes_per_step"] = line["counted_bytes_per_step"] = 0.0
    storage.write_json(run.path("report.json"), document)
    assert "One worker sends nothing to others" in Path(report.write(run)).read_text()


def test_a_run_of_one_step_and_no_epoch_has_a_page(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    document = storage.read_json(run.path("report.json"))
    document |= {
        "history": document["history"][:1],
        "table": document["table"][:1],
        "epochs": [],
        "roc": [],
        "auc": None,
    }
    document["valid"] = {"samples": 0}
    storage.write_json(run.path("report.json"), document)
    text = Path(report.write(run)).read_text()
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


def test_a_plan_with_balances_shows_them(tmp_path: Path) -> None:
    page = Page(Path(report.write(finished_run(tmp_path))).read_text())
    assert "1,234" in page.text and "75.0" in page.text


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    first = Path(report.write(run)).read_bytes()
    assert Path(report.write(run)).read_bytes() == first


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.0, 96.0, [0.0, 20.0, 40.0, 60.0, 80.0]), (3.0, 3.0, [3.0])],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(low, high, "", str).ticks() == pytest.approx(ticks)


def cells(page: Page) -> str:
    """The page's text without spaces between its pieces."""
    return re.sub(r"\s+", " ", page.text)


def test_a_days_page_says_what_it_went_on_from_and_what_was_left_out(tmp_path: Path) -> None:
    text = cells(Page(Path(report.write(days_run(tmp_path))).read_text()))
    assert "window 2026-01-28 to 2026-01-31, 3 days parent version 12 parent's cut 2026-01-27 22:00:00 UTC" in text
    assert "tail from 2026-01-31 22:00:00 UTC left out 2026-01-29 starts fresh" in text
    assert "price: new field" in text and "tail AUC" in text and "Valid" not in text
    assert "all 60,392 0.7376" in text


def test_metrics_stand_beside_both_other_versions_with_their_intervals(tmp_path: Path) -> None:
    text = cells(Page(Path(report.write(days_run(tmp_path))).read_text()))
    assert "tail champion 12 difference reference 7 difference meaning" in text
    assert "+0.0031 \u22120.0005 to +0.0067" in text
    ours = storage.read_json(str(next(tmp_path.rglob("runs/*/report.json"))))["logloss"]
    assert f"log loss {ours:.4f} {ours + 0.0041:.4f} \u22120.0041 {ours + 0.0092:.4f} nats" in text, (
        "a difference on other rows than ours is none"
    )


def test_what_is_broken_comes_first(tmp_path: Path) -> None:
    run = days_run(tmp_path, "reject", at_fault=True)
    text = cells(Page(Path(report.write(run)).read_text()))
    assert "7 bounds, 1 broken. check value bound max_auc_drop AUC differs by -0.0112" in text
    assert "1 worse than its bound" in text and text.index("640 rows \u2715 broken") < text.index("3,204 rows")
    assert f"before {HOSTILE} \u2715 broken 0.4120" in text
    assert "2026-01-31 is in quarantine, and windows leave it out until des day accept 2026-01-31" in text


def test_an_accepted_version_that_came_too_late_is_not_called_champion(tmp_path: Path) -> None:
    run = days_run(tmp_path)
    storage.write_json(run.path("version.json"), {"version": "13", "aliases": []})
    assert "Accepted: version 13 is not champion, another one came first" in Path(report.write(run)).read_text()


def test_a_day_without_parent_or_new_rows_has_a_page(tmp_path: Path) -> None:
    run = days_run(tmp_path)
    for name in ("new_rows.json", "champion.json", "gate.json"):
        storage.delete(run.path(name))
    run = replace(run, day=Day(as_of="2026-01-31", days={}, cut=0))
    text = cells(Page(Path(report.write(run)).read_text()))
    assert "window no day parent none: there was no champion cut" in text
    assert not [title for title in ("Slices", "Drift", "Progressive", "Checks", "beside") if title in text]


def test_drift_is_shown_before_it_is_judged(tmp_path: Path) -> None:
    run = days_run(tmp_path)
    storage.delete(run.path("gate.json"))
    text = cells(Page(Path(report.write(run)).read_text()))
    assert f"missing before {HOSTILE} 0.0110 0.04 % 31.0 % 30.2 %" in text


def test_many_fields_slices_and_reasons_stay_small(tmp_path: Path) -> None:
    run = days_run(tmp_path)
    document = storage.read_json(run.path("gate.json"))
    for name in ("checks", "slices", "drift"):
        line = document[name][0]
        long = {key: "<&>" * 2_000 for key in ("name", "about", "field", "value") if isinstance(line.get(key), str)}
        document[name] = [line | long] * 3_000
    document["reasons"] = [f"reason {number}" for number in range(3_000)]
    storage.write_json(run.path("gate.json"), document)
    written = Path(report.write(run)).read_bytes()
    assert len(written) < 1_000_000
    assert b"and 2,800 more rows" in written and b"reason 4</li></ul><details><summary>" in written
