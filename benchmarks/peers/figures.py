"""The pictures of a results file: speed against the link, bytes against the number of workers, wins and losses.

Dims: N workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.peers import formulas
from benchmarks.peers.case import Case
from benchmarks.peers.driver import summary
from benchmarks.peers.links import RATES
from benchmarks.peers.systems import SYSTEMS

COLOURS = {
    "des": "#2463c9",
    "table_wise": "#c2571a",
    "row_wise": "#8a5300",
    "server": "#12714a",
    "server_async": "#7fb79d",
    "sparse": "#8b5bb5",
    "tbe": "#5a6472",
    "embedding": "#a8b0bb",
}
MARKS = dict(zip(COLOURS, "osD^vPXd", strict=True))
WORKERS = (2, 3, 4, 6, 8, 12, 16)


def draw(results: Sequence[Any], out: Path) -> list[Path]:
    """The pictures that the results allow, as SVG and PNG."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid.axis": "y"}):
        made = [_speed_by_link(results), _bytes_by_workers(results), _wins(results)]
    paths = []
    for name, figure in zip(("speed-by-link", "bytes-by-workers", "wins-and-losses"), made, strict=True):
        if figure is not None:
            for ending in ("svg", "png"):
                figure.savefig(out / f"{name}.{ending}", dpi=130, bbox_inches="tight")
            paths.append(out / f"{name}.png")
            plt.close(figure)
    return paths


def _speed_by_link(results: Sequence[Any]) -> Any:
    """Samples per second of each system over links, a panel for each case that ran over several."""
    panels: dict[str, list[Any]] = {}
    for result in results:
        panels.setdefault(_subject(result, "link"), []).append(result)
    panels = {name: found for name, found in panels.items() if len(found) > 1}
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    for axis, (name, found) in zip(axes, panels.items(), strict=False):
        links = [link for link in reversed(RATES) if any(result["case"]["link"] == link for result in found)]
        lines: dict[str, dict[int, float]] = {}
        for result in found:
            for line in summary(result):
                if not SYSTEMS[line["system"]].single:
                    at = links.index(result["case"]["link"])
                    lines.setdefault(line["system"], {})[at] = line["samples_per_s"]
        for system, points in lines.items():
            _line(axis, system, sorted(points), [points[at] for at in sorted(points)])
        axis.set(yscale="log", title=name, ylabel="samples/s")
        axis.set_xticks(range(len(links)), [_shown(link) for link in links])
    _legend(figure, axes[0])
    return figure


def _bytes_by_workers(results: Sequence[Any]) -> Any:
    """Computed bytes over N at a fixed home slice, and what interfaces counted."""
    panels: dict[str, list[Any]] = {}
    for result in results:
        panels.setdefault(_subject(result, "workers", "link", "batch"), []).append(result)
    if not results:
        return None
    figure, axes = _panels(len(panels))
    for axis, (name, found) in zip(axes, panels.items(), strict=False):
        _computed_lines(axis, found[0])
        for result in found:
            for line in summary(result):
                if line["interface_bytes"] is not None and not SYSTEMS[line["system"]].single:
                    size = result["case"]["workers"]
                    axis.plot(size, line["interface_bytes"] / 1e6, MARKS[line["system"]], color=COLOURS[line["system"]])
        axis.set(xscale="log", yscale="log", title=name, xlabel="workers", ylabel="MB per worker and step")
        axis.set_xticks(WORKERS, [str(size) for size in WORKERS])
        axis.minorticks_off()
    _legend(figure, axes[0], "lines computed, marks counted")
    return figure


def _computed_lines(axis: Axes, result: Any) -> None:
    """Formulas at the case's home slice; DES by the exchanges that its plan may choose from."""
    case = Case(**result["case"] | {"hidden": tuple(result["case"]["hidden"])})
    home, weights = case.home, result["dense_weights"]
    curves: dict[str, list[float]] = {}
    for size in WORKERS:
        grown = Case(**result["case"] | {"hidden": case.hidden, "workers": size, "batch": home * size})
        for system in result["systems"]:
            if SYSTEMS[system].synchronous and not SYSTEMS[system].single and system != "des":
                curves.setdefault(system, []).append(formulas.computed(system, grown, result["unique"], weights))
        curves.setdefault("des", []).append(formulas.des(grown, result["unique"], weights))
    for system, counts in curves.items():
        axis.plot(WORKERS, [count / 1e6 for count in counts], color=COLOURS[system], label=SYSTEMS[system].says, lw=1.5)


def _wins(results: Sequence[Any]) -> Any:
    """DES's speed by each peer's, a row per case: right of 1 DES is faster."""
    rows = [(_subject(result), line) for result in results for line in summary(result) if line["des_samples_per_s"]]
    if not rows:
        return None
    cases = list(dict.fromkeys(name for name, _ in rows))
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.42 * len(cases)))
    for name, line in rows:
        system, found = line["system"], line["des_samples_per_s"]
        order = list(COLOURS).index(system)
        height = len(cases) - cases.index(name) + 0.3 - 0.08 * order
        axis.plot([found["low"], found["high"]], [height, height], color=COLOURS[system], lw=1)
        axis.plot(found["median"], height, MARKS[system], color=COLOURS[system], ms=5)
    for system in dict.fromkeys(line["system"] for _, line in rows):
        axis.plot([], [], MARKS[system], color=COLOURS[system], label=SYSTEMS[system].says)
    axis.axvline(1, color="#14181f", lw=0.8)
    axis.set(xscale="log", xlabel="DES's samples/s by theirs: median of the rounds, least to greatest")
    axis.set_yticks(range(len(cases), 0, -1), cases)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _line(axis: Axes, system: str, places: Sequence[float], heights: Sequence[float]) -> None:
    dashed = "-" if SYSTEMS[system].synchronous else ":"
    label = SYSTEMS[system].says + ("" if SYSTEMS[system].synchronous else " (not equivalent)")
    axis.plot(places, heights, MARKS[system] + dashed, color=COLOURS[system], label=label, ms=5, lw=1.5)


def _legend(figure: Any, axis: Axes, title: str = "") -> None:
    """Below all panels, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8, title=title or None)


def _shown(link: str) -> str:
    """A link's rate as people write it."""
    return link.replace("gbit", " Gb/s").replace("mbit", " Mb/s")


def _panels(count: int) -> tuple[Any, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.3 * rows), squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes


def _subject(result: Any, *hidden: str) -> str:
    """A case in a few words, less those that an axis tells."""
    case = Case(**result["case"] | {"hidden": tuple(result["case"]["hidden"])})
    words = {
        "model": case.name,
        "workers": f"N={case.workers}",
        "link": case.link,
        "batch": f"G={case.batch}",
        "factors": f"k={case.factors}",
        "fields": f"F={case.fields}",
        "bag": f"bag {case.bag}" if case.bag > 1 else "",
        "zipf": f"zipf {case.zipf}" if case.zipf != Case.zipf else "",
        "rule": case.rule if case.rule != Case.rule else "",
        "fill": "all rows live" if case.fill else "",
    }
    return ", ".join(word for key, word in words.items() if word and key not in hidden)
