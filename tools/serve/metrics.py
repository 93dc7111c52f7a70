"""Counters of a server's requests, and their Prometheus metrics with those of the model's tiers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moetier.runtime.daemon.metrics import tier_metrics
from moetier.tiers.stats import TierStats

OUTCOMES = ("answered", "cancelled", "failed")
# count: (kind of metric, its name, its meaning)
METRICS: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str]] = {
    "under_way": (GaugeMetricFamily, "requests_under_way", "Requests that are computed, or wait for their turn."),
    "prompt_tokens": (CounterMetricFamily, "prompt_tokens", "Tokens of prompts."),
    "kept_tokens": (
        CounterMetricFamily,
        "kept_tokens",
        "Tokens of prompts that an earlier request had computed.",
    ),
    "new_tokens": (CounterMetricFamily, "new_tokens", "Tokens that were generated."),
}


class Tally:
    """Counts of requests and tokens since the server's start, without refused requests. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys((*OUTCOMES, *METRICS), 0)

    def add(self, **more: int) -> None:
        """Add to counts by name: those of METRICS, and for requests that ended those of OUTCOMES."""
        with self._lock:
            for name, count in more.items():
                self._counts[name] += count

    def counts(self) -> dict[str, int]:
        """Return all counts as of one moment."""
        with self._lock:
            return dict(self._counts)


class ServeCollector(Collector):
    """Metrics of the tiers of ``model`` (the store's name for it, as a daemon has it), of requests and of tokens."""

    def __init__(self, model: str, stats: Callable[[], list[TierStats]], tally: Tally) -> None:
        self._model = model
        self._stats = stats
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from tier_metrics([(self._model, tier) for tier in self._stats()])
        counts = self._tally.counts()
        requests = CounterMetricFamily(
            "moetier_serve_requests", "Requests for an answer that are over.", labels=["model", "outcome"]
        )
        for outcome in OUTCOMES:
            requests.add_metric([self._model, outcome], counts[outcome])
        yield requests
        for count, (family, name, meaning) in METRICS.items():
            metric = family(f"moetier_serve_{name}", meaning, labels=["model"])
            metric.add_metric([self._model], counts[count])
            yield metric
