"""When two systems may be compared, and what their blocks say.

Equal means: after the same steps on the same samples from the same weights, |a - b| <= 1e-4 (|b| + rms b) for all
logits b of the reference. A ratio is taken within a round, whose blocks ran one after another on the same machine in
the same minute, and the median of the rounds is told with the least and the greatest.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Ratio:
    """A median over rounds, and how far rounds differ."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def deviation(logits: Sequence[float], reference: Sequence[float]) -> float:
    """The largest |a - b| / (|b| + rms b); infinite where there is no number to compare."""
    if len(logits) != len(reference):
        return math.inf
    rms = math.sqrt(statistics.fmean(b * b for b in reference))
    pairs = zip(logits, reference, strict=True)
    worst = max(abs(a - b) / (abs(b) + rms) if math.isfinite(a) else math.inf for a, b in pairs)
    return worst if math.isfinite(worst) else math.inf


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours by theirs, round by round."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(statistics.median(rounds), min(rounds), max(rounds))


def comparable(deviations: Mapping[str, float]) -> list[str]:
    """The systems that passed the gate: none at all unless DES did."""
    passed = [name for name, worst in deviations.items() if worst <= TOLERANCE]
    return passed if "des" in passed else []


def crossover(places: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Where along an axis a ratio passes 1, by straight lines between logarithms; None if it does not."""
    for left, right in itertools.pairwise(range(len(places))):
        a, b = math.log(ratios[left]), math.log(ratios[right])
        if a == 0 or (a < 0) != (b < 0):
            share = a / (a - b) if a != b else 0.0
            return float(math.exp(math.log(places[left]) * (1 - share) + math.log(places[right]) * share))
    return None
