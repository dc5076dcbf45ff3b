"""What a server counts, as Prometheus text.

A histogram has a count for every edge: how many values were at most that large. What belongs to a version carries its
number as a label and leaves with it, so a page never grows. Counters are bumped by many threads under one lock.

Source: Prometheus, "Exposition formats", text format 0.0.4.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from des_core.release.serve.limits import Load
from des_core.release.serve.serving import Scored, Scorer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PROBABILITIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
RATINGS = tuple(half / 2 for half in range(1, 21))

LOCK = threading.Lock()


class Histogram:
    """Counts of values by size."""

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = np.array(edges)
        self._counts = np.zeros(len(edges) + 1, np.int64)
        self._sum = 0.0

    def add(self, values: Any) -> None:
        """Count values."""
        places = np.searchsorted(self._edges, values)
        with LOCK:
            self._counts += np.bincount(np.atleast_1d(places), minlength=len(self._counts))
            self._sum += float(np.sum(values))

    def lines(self, name: str, **labels: str) -> Iterable[str]:
        """One line for each edge, the sum and the count."""
        with LOCK:
            below, total = np.cumsum(self._counts), self._sum
        for edge, count in zip([*map(str, self._edges.tolist()), "+Inf"], below.tolist(), strict=True):
            yield line(f"{name}_bucket", count, **labels, le=edge)
        yield line(f"{name}_sum", total, **labels)
        yield line(f"{name}_count", int(below[-1]), **labels)


class Scores:
    """What one version has answered."""

    def __init__(self, scorer: Scorer) -> None:
        self.fields = scorer.names
        self.values_O = np.zeros(len(self.fields), np.int64)
        self.unknown_O = np.zeros(len(self.fields), np.int64)
        self.scores = Histogram(PROBABILITIES if scorer.description.task == "click" else RATINGS)

    def add(self, scored: Scored) -> None:
        """Count the scores of a request and the values that had no row."""
        self.scores.add(scored.scores_B)
        with LOCK:
            self.values_O += scored.values_O
            self.unknown_O += scored.unknown_O


class Server:
    """What the process has done, whichever version answered."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.seconds = Histogram(SECONDS)
        self.swaps = 0
        self.failures = 0
        self.failed = ""
        """The version that could not be loaded, if it is still the one to serve."""
        self.registry_up = True
        self.load: Load | None = None
        """What it has in hand, once it listens."""

    def count(self, code: int, seconds: float) -> None:
        """Count a request."""
        self.seconds.add(seconds)
        with LOCK:
            self.requests[code] += 1


def page(server: Server, model: str, version: str, scores: Scores | None) -> str:
    """All metrics; without ``scores`` no model is loaded."""
    lines = [
        *_family("des_ready", "gauge", "1 while a model is loaded and warm"),
        line("des_ready", int(scores is not None)),
        *_family("des_registry_up", "gauge", "1 if the last poll was answered"),
        line("des_registry_up", int(server.registry_up)),
        *_family("des_version_swaps_total", "counter", "versions taken into service"),
        line("des_version_swaps_total", server.swaps),
        *_family("des_version_failures_total", "counter", "tries to load a version that failed"),
        line("des_version_failures_total", server.failures),
        *_family("des_version_failed", "gauge", "a version that should serve and cannot be loaded"),
        *([line("des_version_failed", 1, version=server.failed)] if server.failed else []),
        *_family("des_requests_total", "counter", "invocations by status"),
        *(line("des_requests_total", count, code=str(code)) for code, count in sorted(server.requests.items())),
        *_family("des_request_seconds", "histogram", "time of an invocation"),
        *server.seconds.lines("des_request_seconds"),
    ]
    if server.load is not None:
        lines += [
            *_family("des_requests_in_flight", "gauge", "invocations that wait or are scored"),
            line("des_requests_in_flight", server.load.requests),
            *_family("des_body_bytes", "gauge", "bodies in memory, bytes"),
            line("des_body_bytes", server.load.bytes),
            *_family("des_connections_refused_total", "counter", "connections beyond the limit"),
            line("des_connections_refused_total", server.load.refused_connections),
        ]
    if scores is not None:
        fields = list(zip(scores.fields, scores.values_O.tolist(), scores.unknown_O.tolist(), strict=True))
        lines += [
            *_family("des_model_info", "gauge", "the version that answers"),
            line("des_model_info", 1, model=model, version=version),
            *_family("des_values_total", "counter", "values looked up"),
            *(line("des_values_total", values, field=field, version=version) for field, values, _ in fields),
            *_family("des_unknown_values_total", "counter", "values looked up that the model has no row for"),
            *(line("des_unknown_values_total", new, field=field, version=version) for field, _, new in fields),
            *_family("des_score", "histogram", "scores answered"),
            *scores.scores.lines("des_score", version=version),
        ]
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, about: str) -> tuple[str, str]:
    return f"# HELP {name} {about}", f"# TYPE {name} {kind}"


def line(name: str, value: float, **labels: str) -> str:
    """One sample."""
    escaped = {key: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for key, text in labels.items()}
    inside = ",".join(f'{key}="{text}"' for key, text in escaped.items())
    return f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"
