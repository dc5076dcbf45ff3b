"""Pieces of a page: text becomes markup only here, so a value of the logs can never be read as an element.

A cell is plain text, which is escaped, or ``Html``, which somebody here has written. Tables scroll inside their own
box where the screen is narrow; their first column names the row and stays in sight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from des_core.release.report.style import STYLE

MOST_ROWS = 200
"""A longer table is cut: the page stays small enough for a phone."""
LONGEST = 90
"""Characters of a value of the logs that are shown."""


class Html(str):
    """Text that is markup already."""


def markup(text: str) -> Html:
    """The text as markup."""
    return text if isinstance(text, Html) else Html(escape(text))


def page(title: str, body: Sequence[str]) -> str:
    """A whole document of sections; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def section(title: str, *inside: str) -> Html:
    """A section under its heading."""
    return Html(f"<section><h2>{escape(title)}</h2>{''.join(inside)}</section>")


def lead(text: str) -> Html:
    """The sentence that opens a section."""
    return Html(f'<p class="lead">{markup(text)}</p>')


def table(label: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], narrow: bool = False) -> Html:
    """A table of ``(heading, style)`` columns; the style "number" aligns right.

    Args:
        label: what a screen reader calls it.
        columns: heading and style of each.
        rows: cells of each row; the first one names it.
        narrow: as wide as it needs, not as the page.
    """
    styles = [f' class="{style}"' if style else "" for _, style in columns]
    head = "".join(
        f'<th scope="col"{style}>{markup(name)}</th>' for (name, _), style in zip(columns, styles, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row"{styles[0]}>{markup(row[0])}</th>'
        + "".join(f"<td{style}>{markup(cell)}</td>" for cell, style in zip(row[1:], styles[1:], strict=True))
        + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    rest = len(rows) - MOST_ROWS
    more = f'<p class="more">and {count(rest, "more row")}, in report.json and gate.json</p>' if rest > 0 else ""
    return Html(
        f'<div class="panel{" narrow" * narrow}" role="region" aria-label="{escape(label)}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def figure(title: str, subtitle: str, svg: str) -> Html:
    """A figure with its caption."""
    return Html(f"<figure><figcaption><b>{escape(title)}</b>{escape(subtitle)}</figcaption>{svg}</figure>")


def under(text: str, small: str) -> Html:
    """Text with a smaller line under it."""
    return Html(f'{markup(text)}<span class="under">{markup(small)}</span>') if small else markup(text)


def soft(text: str) -> Html:
    """Text in the second colour."""
    return Html(f'<span class="soft">{markup(text)}</span>')


def state(kept: bool) -> Html:
    """Whether a bound is kept, in a word and a colour."""
    return Html('<span class="kept">&#10003; kept</span>' if kept else '<span class="broken">&#10005; broken</span>')


def bar(share: float, style: str = "") -> Html:
    """A bar of a share of its column's width."""
    width = 100 * min(1.0, max(0.0, share))
    return Html(f'<i class="{" ".join(["bar", *style.split()])}" style="width:{width:.1f}%"></i>')


def share(value: float | None) -> Html:
    """A share of 1 as a short bar and per cent."""
    if value is None or not math.isfinite(value):
        return Html("&ndash;")
    return Html(f'<span class="share">{bar(value)}</span>{percent(value)}')


def percent(value: float | None) -> Html:
    """A share of 1 in per cent."""
    if value is None or not math.isfinite(value):
        return Html("&ndash;")
    text = f"{100 * value:.1f}" if value == 0 or abs(value) >= 0.001 else f"{100 * value:.2g}"
    return Html(f'<span class="together">{text}&thinsp;%</span>')


def number(value: float | None, digits: int = 4) -> str:
    """A metric, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def signed(value: float | None) -> str:
    """A difference with its sign, or a dash."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:+.4f}".replace("-", "\u2212")


def interval(ends: tuple[float, float] | None, sign: bool = False) -> Html:
    """The two ends of an interval, or nothing."""
    if ends is None:
        return Html("")
    write = signed if sign else number
    return Html(f'<span class="together">{write(ends[0])} to {write(ends[1])}</span>')


def amount(value: Any, rounded: bool = True) -> str:
    """A count, a metric or a word; ``rounded`` to what is worth reading."""
    if value is None or isinstance(value, str):
        return value or "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if abs(value) >= 1000 or isinstance(value, int):
        return f"{value:,.0f}".replace("-", "\u2212")
    return number(value) if rounded else f"{value:g}".replace("-", "\u2212")


def count(many: int, noun: str) -> str:
    """A number of things."""
    return f"{many:,} {noun}" + ("" if many == 1 else "s")


def cut(text: str, longest: int = LONGEST) -> str:
    """A text of the logs, no longer than is worth reading."""
    return text if len(text) <= longest else text[: longest - 1] + "\u2026"


def bytes_text(size: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit in ("B", "kB", "MB"):
        if abs(size) < 999.5:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
