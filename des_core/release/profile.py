"""Where a training step's time went: a page with a picture and a table, from ``training.json``."""

from __future__ import annotations

from html import escape
from typing import Any

from des_core import storage
from des_core.release.style import STYLE
from des_core.run import Run

ABOUT = {
    "read": "the next batch's columns from the feature store",
    "decode": "columns to lookups: hashes, weights, owners",
    "index": "unique ids, their slots, admission",
    "stall": "training waited for the next batch",
    "gather": "unique rows from the table",
    "partial": "partial results of what is owned here",
    "exchange": "inside collectives, both ways",
    "head": "totals to loss",
    "backward": "loss to gradients of rows",
    "update": "optimizer, rows and dense weights",
}
PREFETCH = ("read", "decode", "index")
"""Phases that run under the others, in the prefetch thread."""

WIDTH, LEFT, RIGHT, BAR, GAP = 640.0, 84.0, 70.0, 18.0, 9.0


def write(run: Run) -> tuple[dict[str, float], str]:
    """Milliseconds per step by phase on worker 0, and the address of the page that shows them."""
    training = storage.read_json(run.path("training.json"))
    phases = {phase: training["profile"][phase] for phase in ABOUT}
    storage.write_bytes(run.path("profile.html"), page(run.config.run.name, training).encode())
    return phases, run.path("profile.html")


def page(name: str, training: dict[str, Any]) -> str:
    """The page as HTML."""
    phases = {phase: training["profile"][phase] for phase in ABOUT}
    step_ms = sum(ms for phase, ms in phases.items() if phase not in PREFETCH)
    stall = phases["stall"] / step_ms if step_ms else 0.0
    lead = (
        f"Worker 0 of {training['workers']} on {training['device']}: {step_ms:.2f} ms per step, "
        f"{100 * stall:.1f} % of it waiting for input; {training['samples_per_s']:,.0f} samples/s over all workers."
    )
    rows = "".join(
        f"<tr><td>{phase}</td><td>{escape(ABOUT[phase])}</td>"
        f"<td>{'prefetch thread' if phase in PREFETCH else 'step'}</td><td class='number'>{ms:.3f}</td></tr>"
        for phase, ms in phases.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}: one step</title><style>{STYLE}</style></head><body><main>"
        f"<header><p>{lead}</p><h1>{escape(name)}: one training step</h1></header><figure><figcaption>"
        "<b>Milliseconds by phase</b>light bars run in the prefetch thread, under the others</figcaption>"
        f"{picture(phases)}</figure><h2>What the phases are</h2><div class='panel'><table><thead>"
        "<tr><th>phase</th><th>what</th><th>runs in</th>"
        f"<th class='number'>ms per step</th></tr></thead><tbody>{rows}</tbody></table></div></main></body></html>\n"
    )


def picture(phases: dict[str, float]) -> str:
    """A bar per phase, SVG."""
    most = max(phases.values()) or 1.0
    parts = []
    for number, (phase, ms) in enumerate(phases.items()):
        y, length = number * (BAR + GAP) + 4, (WIDTH - LEFT - RIGHT) * ms / most
        style = "two" if phase in PREFETCH else "one"
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{phase}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="var(--{style})"/>'
            f'<text class="note" x="{LEFT + length + 6:.1f}" y="{y + 13}">{ms:.2f}</text>'
        )
    height = len(phases) * (BAR + GAP)
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="milliseconds by phase">{"".join(parts)}</svg>'
    )
