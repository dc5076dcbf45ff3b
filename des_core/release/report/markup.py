"""A page's building blocks, the macros of templates/parts.html, and how numbers are written.

Templates escape whatever they are given; what is markup already is ``Markup``. Tables scroll inside their own
box where the screen is narrow; their first column names the row and stays in sight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MOST_ROWS = 200
"""A longer table is cut: the page stays small enough for a phone."""
LONGEST = 90
"""Characters of a value of the logs that are shown."""


def page(title: str, body: Sequence[str]) -> str:
    """A whole document of sections; empty ones are left out."""
    style = resources.files(__package__).joinpath("templates", "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(title=title, style=Markup(style), body=body)


def percent(value: float) -> str:
    """A share of 1 in per cent, without the sign."""
    return f"{100 * value:.1f}" if value == 0 or abs(value) >= 0.001 else f"{100 * value:.2g}"


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


def amount(value: Any, rounded: bool = True) -> str:
    """A count, a metric or a word; ``rounded`` to significant digits."""
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


environment = Environment(loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined)
environment.filters |= {"number": number, "signed": signed, "percent": percent, "count": count, "finite": math.isfinite}
environment.globals["most_rows"] = MOST_ROWS


class _Parts:
    """The macros of templates/parts.html as functions that return markup."""

    _module: Any = environment.get_template("parts.html").module

    def __getattr__(self, name: str) -> Callable[..., Markup]:
        macro: Callable[..., Markup] = getattr(self._module, name)
        return macro


parts = _Parts()
