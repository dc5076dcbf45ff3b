"""Where a training step's time went: a page with a picture and a table, from ``training.json``."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from des_core import storage
from des_core.contracts import PHASES, PREFETCH
from des_core.release.report.markup import page, parts
from des_core.run import Run

WIDTH, LEFT, RIGHT, BAR, GAP = 380.0, 62.0, 52.0, 14.0, 7.0


def write(run: Run) -> tuple[dict[str, float], str]:
    """Milliseconds per step by phase on worker 0, and the address of the page that shows them."""
    training = storage.read_json(run.path("training.json"))
    phases = {phase: training["profile"][phase] for phase in PHASES}
    name = run.config.run.name
    text = page(f"{name}: one step", (parts.title(f"{name}: one training step"), steps(training)))
    storage.write_bytes(run.path("profile.html"), text.encode())
    return phases, run.path("profile.html")


def steps(training: dict[str, Any]) -> Markup:
    """The section about a step's phases; empty where none were measured."""
    measured = training.get("profile") or {}
    phases = {phase: float(measured[phase]) for phase in PHASES if phase in measured}
    if not any(phases.values()):
        return Markup()
    step_ms = sum(ms for phase, ms in phases.items() if phase not in PREFETCH)
    stall = phases.get("stall", 0.0) / step_ms if step_ms else 0.0
    told = (
        f"Worker 0 of {training['workers']} on {training['device']}: {step_ms:.2f} ms per step, "
        f"{100 * stall:.1f} % of it waiting for input; {training['samples_per_s']:,.0f} samples/s over all workers."
    )
    rows = [
        [phase, parts.soft(PHASES[phase]), "prefetch thread" if phase in PREFETCH else "step", f"{ms:.3f}"]
        for phase, ms in phases.items()
    ]
    columns = [("phase", ""), ("what", "about"), ("runs in", "together"), ("ms per step", "number")]
    drawn = parts.figure(
        "Milliseconds by phase", "light bars run in the prefetch thread, under the others", picture(phases)
    )
    inside = parts.pair(drawn, parts.table("Phases of a step", columns, rows))
    return parts.section("One step", parts.lead(told + on_device(training, phases)), inside)


def on_device(training: dict[str, Any], phases: dict[str, float]) -> str:
    """What the device tells beside its phases; empty where it was not asked."""
    told = training.get("device_profile")
    if not told:
        return ""
    text = ""
    if told["launches"] is not None:
        text += f" {told['launches']:.0f} launches and {told['synchronisations']:.1f} synchronisations per step."
    moving_ms = phases.get("gather", 0.0) + phases.get("update", 0.0)
    if told["least_bytes"] and moving_ms:
        speed = 1000 * told["least_bytes"] / moving_ms
        text += (
            f" Rows and their sums move at least {told['least_bytes'] / 1e6:,.1f} MB per step, in gather and update at "
            f"{speed / 1e9:,.0f} GB/s, {100 * speed / told['copy_bytes_per_s']:.0f} % of what a copy reaches."
        )
    return text


def picture(phases: dict[str, float]) -> Markup:
    """A bar per phase, SVG."""
    most = max(phases.values()) or 1.0
    drawn = []
    for number, (phase, ms) in enumerate(phases.items()):
        y, length = number * (BAR + GAP) + 4, (WIDTH - LEFT - RIGHT) * ms / most
        style = "two" if phase in PREFETCH else "one"
        drawn.append(
            f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{phase}</text>'
            f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" fill="var(--{style})"/>'
            f'<text class="note" x="{LEFT + length + 6:.1f}" y="{y + 11}">{ms:.2f}</text>'
        )
    height = len(phases) * (BAR + GAP) + 4
    spoken = "milliseconds by phase: " + ", ".join(f"{phase} {ms:.2f}" for phase, ms in phases.items())
    return Markup(f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{spoken}">{"".join(drawn)}</svg>')
