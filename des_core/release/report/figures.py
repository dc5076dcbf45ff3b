"""Figures of the report: SVG text whose colours are the page's variables, so they follow dark and light.

A figure is drawn for 380 x 230 units, about a phone's width, and grows with its column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 380.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 14.0, 36.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis: its range, its name, and how its numbers are written."""

    low: float
    high: float
    name: str
    write: Callable[[float], str]

    def place(self, value: float, start: float, stop: float) -> float:
        """The position of a value between two positions on the page."""
        span = self.high - self.low
        return start + (value - self.low) / span * (stop - start) if span else (start + stop) / 2

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers inside the range, at steps of 1, 2 or 5 times a power of ten."""
        span = self.high - self.low
        if span <= 0:
            return [self.low]
        rough = span / most
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def axis(values: Sequence[float], name: str, write: Callable[[float], str], room: float = 0.08) -> Axis:
    """An axis around values, with some room above and below."""
    low, high = min(values), max(values)
    margin = (high - low) * room or abs(high) * 0.01 or 1.0
    return Axis(low - margin, high + margin, name, write)


class Canvas:
    """A plot being drawn: axes first, then marks."""

    def __init__(self, x: Axis, y: Axis, label: str) -> None:
        self.x, self.y, self._label = x, y, label
        self._parts: list[str] = []
        self._draw_axes()

    def at(self, point: Point) -> Point:
        """Place of a point on the page."""
        return self.x.place(point[0], LEFT, WIDTH - RIGHT), self.y.place(point[1], HEIGHT - BOTTOM, TOP)

    def line(self, points: Sequence[Point], style: str) -> None:
        """A line through points."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
        self._parts.append(f'<polyline class="{style}" points="{places}"/>')

    def area(self, points: Sequence[Point], style: str) -> None:
        """The area between a line and the lowest value."""
        floor = [(points[-1][0], self.y.low), (points[0][0], self.y.low)]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, [*points, *floor]))
        self._parts.append(f'<polygon class="{style}" points="{places}"/>')

    def dot(self, point: Point, style: str, hint: str, radius: float = 3.5) -> None:
        """A dot that explains itself under the pointer."""
        x, y = self.at(point)
        self._parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escape(hint)}</title></circle>'
        )

    def note(self, point: Point, text: str, above: float = 8.0, style: str = "note") -> None:
        """Text beside a point, kept inside the plot."""
        x, y = self.at(point)
        anchor = "end" if x > WIDTH * 0.6 else "start"
        y = y - above if y - above > TOP + 6 else y + 16
        self._parts.append(
            f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def key(self, line: int, style: str, name: str) -> None:
        """What a line's colour means, in the upper right corner."""
        x, y = WIDTH - RIGHT - 70, TOP + 6 + 16 * line
        self._parts.append(
            f'<polyline class="{style}" points="{x},{y} {x + 16},{y}"/>'
            f'<text class="aside" x="{x + 21}" y="{y + 4}">{escape(name)}</text>'
        )

    def upright(self, value: float, style: str, text: str, side: str) -> None:
        """A named vertical line; its name is on the ``side`` "start" (right of it) or "end"."""
        x = self.at((value, 0.0))[0]
        self._parts.append(f'<line class="{style}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        self._text(x + (4 if side == "start" else -4), TOP + 8, text, side)

    def interval(self, y: float, value: float, low: float, high: float, name: str, text: str) -> None:
        """A value on its interval along x, at a height on the page; its name and text above."""
        left, middle, right = (self.at((place, 0.0))[0] for place in (low, value, high))
        self._parts.append(
            f'<text class="note" x="{LEFT - 30}" y="{y - 13:.1f}">{escape(name)}</text>'
            f'<text class="note" x="{WIDTH - RIGHT}" y="{y - 13:.1f}" text-anchor="end">{escape(text)}</text>'
            f'<polyline class="one" points="{left:.1f},{y:.1f} {right:.1f},{y:.1f}"/>'
            f'<circle class="one-dot" cx="{middle:.1f}" cy="{y:.1f}" r="5"/>'
        )

    def svg(self) -> Markup:
        """The whole figure."""
        inside = "".join(self._parts)
        label = escape(self._label)
        return Markup(f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}">{inside}</svg>')

    def _draw_axes(self) -> None:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for tick in self.y.ticks(5) if self.y.low < self.y.high else ():
            y = self.at((self.x.low, tick))[1]
            self._parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self._text(LEFT - 6, y + 3.5, self.y.write(tick), "end")
        for tick in self.x.ticks(5):
            x = self.at((tick, self.y.low))[0]
            self._text(x, bottom + 14, self.x.write(tick), "middle")
        self._parts.append(f'<line class="base" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        self._text((LEFT + right) / 2, HEIGHT - 5, self.x.name, "middle")

    def _text(self, x: float, y: float, text: str, anchor: str) -> None:
        self._parts.append(f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')


def _steps(points: Sequence[Point]) -> Axis:
    """An axis over steps; a run that continues from another one starts at that one's last step."""
    first, last = points[0][0], points[-1][0]
    return Axis(0.0 if first <= last / 5 else first, last, "step", short)


def loss_curve(history: Sequence[dict[str, float]]) -> Markup:
    """Mean training loss over steps."""
    points = [(point["step"], point["loss"]) for point in history]
    steps = _steps(points)
    canvas = Canvas(steps, axis([y for _, y in points], "", decimals), "training loss over steps")
    canvas.area(points, "wash")
    canvas.line(points, "one")
    canvas.dot(points[-1], "one-dot", f"step {points[-1][0]:,.0f}: loss {points[-1][1]:.4f}")
    canvas.note(points[-1], f"{points[-1][1]:.4f}", 9)
    return canvas.svg()


def epoch_curve(epochs: Sequence[dict[str, float]], key: str, name: str) -> Markup:
    """The valid metric at each epoch's end, the best one marked."""
    points = [(float(epoch["epoch"]), float(epoch[key])) for epoch in epochs]
    best = max(points, key=lambda point: point[1] if key == "auc" else -point[1])
    whole = Axis(min(0.5, points[0][0] - 0.5), points[-1][0] + 0.5, "epoch", lambda value: f"{value:g}")
    canvas = Canvas(whole, axis([y for _, y in points], "", decimals, 0.25), f"valid {name} by epoch")
    canvas.line(points, "one")
    for point in points:
        canvas.dot(point, "one-dot", f"epoch {point[0]:g}: {name} {point[1]:.4f}", 5 if point == best else 3)
    canvas.note(best, f"{best[1]:.4f}" + (" best" if len(points) > 1 else ""), 10)
    return canvas.svg()


def roc_curve(
    points: Sequence[Sequence[float]], auc: float, champion: Sequence[Sequence[float]] = (), champion_auc: float = 0.0
) -> Markup:
    """True against false positive rate, with the diagonal of chance and the champion's curve on the same rows."""
    share = Axis(0.0, 1.0, "false positive rate", lambda value: f"{value:g}")
    label = f"ROC curve, AUC {auc:.4f}" + (f", champion {champion_auc:.4f}" if champion else "")
    canvas = Canvas(share, Axis(0.0, 1.0, "", lambda value: f"{value:g}"), label)
    curve = [(point[0], point[1]) for point in points]
    canvas.area(curve, "wash")
    canvas.line([(0, 0), (1, 1)], "dashed")
    if champion:
        canvas.line([(point[0], point[1]) for point in champion], "other")
        canvas.note((0.97, 0.06), f"champion {champion_auc:.4f}", 4, "aside")
    canvas.line(curve, "one")
    canvas.note((0.97, 0.15 if champion else 0.06), f"AUC {auc:.4f}", 4)
    return canvas.svg()


def calibration_plot(bins: Sequence[dict[str, float]], name: str, champion: Sequence[dict[str, float]] = ()) -> Markup:
    """Mean label against mean prediction of each bin, with the diagonal of a perfect fit and the champion's line."""
    values = [bin_[key] for bin_ in (*bins, *champion) for key in ("predicted", "observed")]
    low, high = min(0.0, *values), max(values) * 1.06 or 1.0
    canvas = Canvas(
        Axis(low, high, f"predicted {name}", decimals), Axis(low, high, "", decimals), f"calibration of {name}"
    )
    canvas.line([(low, low), (high, high)], "dashed")
    if champion:
        canvas.line([(bin_["predicted"], bin_["observed"]) for bin_ in champion], "other")
        canvas.note((low + 0.97 * (high - low), low + 0.06 * (high - low)), "grey: champion", 4, "aside")
    canvas.line([(bin_["predicted"], bin_["observed"]) for bin_ in bins], "faint")
    for bin_ in bins:
        hint = f"{bin_['samples']:,.0f} samples: predicted {bin_['predicted']:.4f}, observed {bin_['observed']:.4f}"
        canvas.dot((bin_["predicted"], bin_["observed"]), "one-dot", hint)
    return canvas.svg()


def day_curve(days: Sequence[tuple[str, float]], name: str) -> Markup:
    """A metric by day, the last one named."""
    points = [(float(number), value) for number, (_, value) in enumerate(days)]

    def day(place: float) -> str:
        return days[round(place)][0][5:] if place == round(place) and 0 <= place < len(days) else ""

    canvas = Canvas(
        Axis(-0.4, len(days) - 0.6, "day", day), axis([y for _, y in points], "", decimals, 0.25), f"{name} by day"
    )
    canvas.line(points, "one")
    for (_, value), point in zip(days, points, strict=True):
        canvas.dot(point, "one-dot", f"{day(point[0])}: {name} {value:.4f}")
    falls = len(points) > 1 and points[-1][1] < points[-2][1]
    canvas.note(points[-1], f"{points[-1][1]:.4f}", -18 if falls else 10)
    return canvas.svg()


def differences(lines: Sequence[tuple[str, float, float, float]], bound: float | None, name: str) -> Markup:
    """Intervals of differences to other versions ``(name, difference, low, high)``, with zero and the bound."""
    marks = [0.0, *(value for line in lines for value in line[1:])] + ([] if bound is None else [bound])
    across = axis(marks, f"difference of {name}", lambda value: _signed(value, "+g"), 0.12)
    spoken = "; ".join(f"{other} {value:+.4f}, {low:+.4f} to {high:+.4f}" for other, value, low, high in lines)
    canvas = Canvas(across, Axis(0.0, 0.0, "", lambda _: ""), f"difference of {name}: {spoken}")
    canvas.upright(0.0, "base", "same", "start")
    if bound is not None:
        canvas.upright(bound, "limit", "bound", "start" if bound > 0 else "end")
    height = (HEIGHT - BOTTOM - TOP - 20) / len(lines)
    for number, (other, value, low, high) in enumerate(lines):
        y = TOP + 20 + height * (number + 0.65)
        canvas.interval(y, value, low, high, f"to {other}", _signed(value, "+.4f"))
    return canvas.svg()


def _signed(value: float, form: str) -> str:
    return format(value, form).replace("-", "\u2212") if abs(value) > 1e-12 else "0"


def difference_bar(difference: float | None, low: float | None, reach: float) -> Markup:
    """A small line from the lower bound of a difference to the difference, about zero in the middle."""
    if difference is None:
        return Markup()
    value, least = (60 + 55 * number / reach for number in (difference, difference if low is None else low))
    style = "one" if difference >= 0 else "bad"
    return Markup(
        '<svg class="small" viewBox="0 0 120 14" aria-hidden="true"><line class="base" x1="60" x2="60" y1="0" y2="14"/>'
        f'<polyline class="{style}" points="{least:.1f},7 {value:.1f},7"/>'
        f'<circle class="{style}-dot" cx="{value:.1f}" cy="7" r="3.5"/></svg>'
    )


def score_curves(clicks: Sequence[float], others: Sequence[float], high: float) -> Markup:
    """Share of the clicked and of the other samples by predicted probability, in bins of one width up to ``high``."""
    top = max(*clicks, *others) * 1.15 or 1.0
    percent = Axis(0.0, top, "", lambda value: f"{100 * value:.0f} %")
    canvas = Canvas(Axis(0.0, high, "predicted click rate", decimals), percent, "scores of clicked and other samples")
    for line, (shares, style, name) in enumerate(((others, "two", "no click"), (clicks, "one", "click"))):
        width = high / len(shares)
        steps = [(edge * width, share) for number, share in enumerate(shares) for edge in (number, number + 1)]
        canvas.line(steps, style)
        canvas.key(line, style, name)
    return canvas.svg()


def table_curve(table: Sequence[dict[str, float]]) -> Markup:
    """Rows of all workers' tables over steps."""
    points = [(point["step"], point["rows"]) for point in table]
    steps = _steps(points)
    rows = Axis(0.0, max(y for _, y in points) * 1.12 or 1.0, "", short)
    canvas = Canvas(steps, rows, "table rows over steps")
    canvas.area(points, "wash")
    canvas.line(points, "one")
    canvas.dot(points[-1], "one-dot", f"step {points[-1][0]:,.0f}: {points[-1][1]:,.0f} rows")
    canvas.note(points[-1], f"{points[-1][1]:,.0f} rows", 9)
    return canvas.svg()


def short(value: float) -> str:
    """A number in few characters: 1.2k, 30M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def decimals(value: float) -> str:
    """A metric on an axis."""
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) < 10 else short(value)
