"""When two systems may be compared, and what their blocks say.

Equal means: after the same steps on the same samples from the same weights, the logits a are the reference's b up to
|a - b| <= 1e-4 |b|, in the 2-norm over all samples. Not logit by logit: of some 10^8 inputs of a ReLU a few lie within
rounding of zero and let a gradient through in one system but not in the next, which the rows of that sample keep.
A ratio is taken within a round, whose blocks ran one after another on the same machine in the same minute, and the
median of the rounds is told with the least and the greatest.
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
    """|a - b| / |b| in the 2-norm; infinite where there is no number to compare."""
    if len(logits) != len(reference) or not all(map(math.isfinite, logits)):
        return math.inf
    return math.dist(logits, reference) / math.hypot(*reference)


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
