"""Pages as a person sees them, in headless Chromium: on a phone, in the dark, without JavaScript, read by a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from des_core import storage
from des_core.release.report import profile, report
from tests.browser import Browser, chromium
from tests.finished import finished_run
from tests.release.examples import HOSTILE, days_run
from tests.release.test_report import Page

TITLES = (
    "Accepted: version 13 is champion",
    "The day",
    "Checks",
    "Metrics",
    "Figures",
    "Slices",
    "Drift of the day",
    "Progressive validation",
    "Network",
    "One step",
    "Workers",
    "Tables",
    "Data",
)

CONTRAST = """(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, style = getComputedStyle(node);
    if (!walker.currentNode.data.trim() || node.closest('title, details')) continue;
    const [a, b] = [rgb(node.closest('svg') ? style.fill : style.color), behind(node)].map(light);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push(walker.currentNode.data.trim() + ' ' + ratio.toFixed(2));
  }
  return low;
})()"""
"""Texts whose colour stands out from what lies behind them less than WCAG AA asks."""

CUT_OFF = """[...document.querySelectorAll('svg[role=img] text')].filter(text => {
  const a = text.getBoundingClientRect(), b = text.closest('svg').getBoundingClientRect();
  return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(text => text.textContent)"""
"""Texts of figures that reach out of their figure."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as started:
        yield started


class Pages(NamedTuple):
    """One page of each kind."""

    day: Path
    bad_day: Path
    whole: Path
    rating: Path
    step: Path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    folders = [tmp_path_factory.mktemp(name) for name in ("day", "bad", "whole", "rating")]
    day, bad = days_run(folders[0]), days_run(folders[1], "reject", at_fault=True)
    whole, rating = finished_run(folders[2]), finished_run(folders[3], "source.task=rating")
    training = storage.read_json(day.path("training.json")) | {"device": "cpu"}
    training["profile"] = storage.read_json(day.path("report.json"))["profile"]
    storage.write_json(day.path("training.json"), training)
    return Pages(*(Path(report.write(run)) for run in (day, bad, whole, rating)), Path(profile.write(day)[1]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", Pages._fields)
def test_it_fits_and_can_be_read(browser: Browser, pages: Pages, name: str, width: int, scheme: str) -> None:
    """No scrolling sideways, enough contrast, nothing cut off a figure, no complaint and no request but the page's."""
    page: Path = getattr(pages, name)
    browser.open(page, width, scheme)
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    assert browser.ask(CONTRAST) == []
    assert browser.ask(CUT_OFF) == []
    assert len(browser.picture()) > 20_000
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_dark_is_dark_and_paper_is_white(browser: Browser, pages: Pages) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        browser.open(pages.day, 1200, scheme)
        seen[scheme] = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert seen == {"light": "rgb(245, 246, 248)", "dark": "rgb(14, 17, 22)"}
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.send("Emulation.setEmulatedMedia", media="print", features=dark)
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.ask("getComputedStyle(document.body).color") == "rgb(20, 24, 31)"
    browser.send("Emulation.setEmulatedMedia", media="")


def test_without_scripts_every_section_is_there(browser: Browser, pages: Pages) -> None:
    browser.open(pages.day, 360, "light", scripts=False)
    assert tuple(browser.ask("[...document.querySelectorAll('h2')].map(h => h.textContent)")) == TITLES
    assert browser.ask("[...document.querySelectorAll('section')].every(s => s.getBoundingClientRect().height > 60)")
    assert browser.ask("document.querySelectorAll('svg[role=img]').length") == 8


def test_the_verdict_is_seen_first(browser: Browser, pages: Pages) -> None:
    """On a phone the verdict's sentence and the first reason are on the first screen, in the page's largest type."""
    for page in (pages.day, pages.bad_day):
        browser.open(page, 360, "light")
        assert browser.ask("document.querySelector('.verdict li').getBoundingClientRect().bottom") < 640
        sizes = "[...document.querySelectorAll('h1, h2')].map(h => parseFloat(getComputedStyle(h).fontSize))"
        browser.open(page, 1200, "light")
        assert max(browser.ask(sizes)) == browser.ask(sizes)[1]


def test_tables_scroll_inside_their_own_box(browser: Browser, pages: Pages) -> None:
    browser.open(pages.day, 360, "light")
    boxes = "[...document.querySelectorAll('.panel')].filter(b => b.scrollWidth > b.clientWidth)"
    assert browser.ask(f"{boxes}.length") > 3
    assert browser.ask(f"{boxes}.every(b => b.tabIndex === 0 && b.getAttribute('aria-label'))")
    last = f"{boxes}[1].querySelector('td:last-child').getBoundingClientRect().right"
    assert browser.ask(last) > 360
    browser.ask(f"{boxes}[1].scrollLeft = 10000")
    assert browser.ask(last) <= 360


@pytest.mark.parametrize("name", Pages._fields)
def test_the_browser_reads_what_was_written(browser: Browser, pages: Pages, name: str) -> None:
    """Its tree has the elements of the file in the file's order: nothing was misplaced and had to be put right."""
    page: Path = getattr(pages, name)
    browser.open(page, 1200, "light")
    assert browser.ask("document.compatMode") == "CSS1Compat"
    assert browser.ask("[...document.querySelectorAll('*')].map(e => e.localName)") == Page(page.read_text()).order


@pytest.mark.parametrize("name", Pages._fields)
def test_it_can_be_listened_to(browser: Browser, pages: Pages, name: str) -> None:
    """One h1, every section under a heading, every header cell says its scope, every figure its name."""
    browser.open(getattr(pages, name), 1200, "light")
    assert browser.ask("document.querySelectorAll('h1').length") == 1
    assert browser.ask("[...document.querySelectorAll('section')].every(s => s.querySelector('h2'))")
    assert browser.ask("[...document.querySelectorAll('th')].every(t => ['row', 'col'].includes(t.scope))")
    assert browser.ask("[...document.querySelectorAll('tbody tr')].every(r => r.querySelector('th[scope=row]'))")
    assert browser.ask("[...document.querySelectorAll('svg')].every(s => s.ariaLabel || s.ariaHidden === 'true')")
    assert browser.ask("document.documentElement.lang") == "en"
    assert browser.ask("[...document.querySelectorAll('[id]')].length") == 0


def test_a_value_of_the_logs_never_becomes_an_element(browser: Browser, pages: Pages) -> None:
    browser.open(pages.bad_day, 1200, "light")
    assert browser.ask("document.title") == "shop 2026-01-31: reject"
    assert browser.ask("document.scripts.length") == 0
    assert browser.ask("document.body.innerText").count(HOSTILE) == 5


def test_a_profile_of_a_device_tells_of_launches_and_bytes() -> None:
    told = {"launches": 44.0, "synchronisations": 0.0, "least_bytes": 3e8, "copy_bytes_per_s": 3e12}
    text = profile.on_device({"device_profile": told}, {"gather": 0.1, "update": 0.1})
    assert "44 launches and 0.0 synchronisations" in text
    assert "300.0 MB per step" in text and "1,500 GB/s, 50 % of what a copy reaches" in text
    assert profile.on_device({"device_profile": None}, {}) == ""
