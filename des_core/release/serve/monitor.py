"""What a server counts, as Prometheus metrics.

What belongs to a version carries its number as a label and leaves with it, so a page never grows. Counters are
increased by many threads under one lock.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from des_core.release.serve.limits import Load
from des_core.release.serve.serving import Scored, Scorer

CONTENT_TYPE = CONTENT_TYPE_LATEST

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

    def family(self, name: str, about: str, **labels: str) -> Metric:
        """The counts as a metric: for every edge, how many values were at most that large."""
        with LOCK:
            below, total = np.cumsum(self._counts).tolist(), self._sum
        edges = [*map(floatToGoString, self._edges.tolist()), "+Inf"]
        family = HistogramMetricFamily(name, about, labels=list(labels))
        family.add_metric(list(labels.values()), buckets=list(zip(edges, below, strict=True)), sum_value=total)
        return family


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


class Page(Collector):
    """All metrics of a replica, read when somebody asks.

    Args:
        model: its name.
        current: the version that answers and what it has answered; without scores no model is loaded.
    """

    def __init__(self, server: Server, model: str, version: str, scores: Scores | None) -> None:
        self._server, self._model, self._version, self._scores = server, model, version, scores

    def collect(self) -> Iterable[Metric]:
        """The process's metrics, then those of the version that answers."""
        server = self._server
        yield GaugeMetricFamily("des_ready", "1 while a model is loaded and warm", int(self._scores is not None))
        yield GaugeMetricFamily("des_registry_up", "1 if the last poll was answered", int(server.registry_up))
        yield CounterMetricFamily("des_version_swaps", "versions taken into service", server.swaps)
        yield CounterMetricFamily("des_version_failures", "tries to load a version that failed", server.failures)
        failed = [((server.failed,), 1)] if server.failed else []
        about = "a version that should serve and cannot be loaded"
        yield _labelled(GaugeMetricFamily("des_version_failed", about, labels=["version"]), failed)
        requests = [((str(code),), count) for code, count in sorted(server.requests.items())]
        yield _labelled(CounterMetricFamily("des_requests", "invocations by status", labels=["code"]), requests)
        yield server.seconds.family("des_request_seconds", "time of an invocation")
        if server.load is not None:
            refused = server.load.refused_connections
            yield GaugeMetricFamily(
                "des_requests_in_flight", "invocations that wait or are scored", server.load.requests
            )
            yield GaugeMetricFamily("des_body_bytes", "bodies in memory, bytes", server.load.bytes)
            yield CounterMetricFamily("des_connections_refused", "connections beyond the limit", refused)
        if self._scores is not None:
            yield from self._of_version(self._scores)

    def _of_version(self, scores: Scores) -> Iterable[Metric]:
        version = self._version
        info = GaugeMetricFamily("des_model_info", "the version that answers", labels=["model", "version"])
        yield _labelled(info, [((self._model, version), 1)])
        for name, about, counts_O in (
            ("des_values", "values looked up", scores.values_O),
            ("des_unknown_values", "values looked up that the model has no row for", scores.unknown_O),
        ):
            family = CounterMetricFamily(name, about, labels=["field", "version"])
            yield _labelled(
                family, [((field, version), n) for field, n in zip(scores.fields, counts_O.tolist(), strict=True)]
            )
        yield scores.scores.family("des_score", "scores answered", version=version)


def _labelled(family: Any, samples: Iterable[tuple[Sequence[str], float]]) -> Metric:
    for labels, value in samples:
        family.add_metric(labels, value)
    metric: Metric = family
    return metric


def page(server: Server, model: str, version: str, scores: Scores | None) -> bytes:
    """All metrics as text; without ``scores`` no model is loaded."""
    registry = CollectorRegistry()
    registry.register(Page(server, model, version, scores))
    return generate_latest(registry)
