"""Counters of a server's requests and tokens, and the Prometheus metrics of these and of the model's tiers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moetier.runtime.daemon.metrics import tier_metrics
from moetier.tiers.stats import TierStats

OUTCOMES = ("answered", "cancelled", "failed")
# name of a count -> (kind of metric, name of the metric without its prefix, help text)
METRICS: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str]] = {
    "under_way": (GaugeMetricFamily, "requests_under_way", "Requests that are being computed or wait for their turn."),
    "prompt_tokens": (CounterMetricFamily, "prompt_tokens", "Tokens of prompts."),
    "kept_tokens": (
        CounterMetricFamily,
        "kept_tokens",
        "Tokens of prompts that were cached from an earlier request.",
    ),
    "new_tokens": (CounterMetricFamily, "new_tokens", "Tokens that were generated."),
}
LEFT = (  # names and help texts of the metrics of what is left to compute
    ("prompt_tokens_left", "Tokens of prompts under way that are not computed yet."),
    ("prompt_seconds_left", "Seconds until the prompts that have begun are computed, at their speeds so far."),
)


class Tally:
    """Counts of requests and tokens since the server started. Refused requests are not counted. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards ``_counts``
        self._counts = dict.fromkeys((*OUTCOMES, *METRICS), 0)

    def add(self, **more: int) -> None:
        """Increase each of the named counts, which are the keys of METRICS and the names in OUTCOMES."""
        with self._lock:
            for name, count in more.items():
                self._counts[name] += count

    def counts(self) -> dict[str, int]:
        """Return a dictionary from the name of each count to its value, all read at one moment."""
        with self._lock:
            return dict(self._counts)


class ServeCollector(Collector):
    """Prometheus collector for a model's tiers, and for requests and tokens.

    ``model`` is the name that requests use. (A daemon labels its metrics with the name in the store's manifest.)
    """

    def __init__(
        self,
        model: str,
        stats: Callable[[], list[TierStats]],
        tally: Tally,
        left: Callable[[], tuple[int, float]] = lambda: (0, 0.0),
    ) -> None:
        """``left`` returns how many prompt tokens are not computed yet, and the seconds until they are."""
        self._model = model
        self._stats = stats
        self._tally = tally
        self._left = left

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from tier_metrics([(self._model, tier) for tier in self._stats()])
        counts = self._tally.counts()
        requests = CounterMetricFamily(
            "moetier_serve_requests", "Requests for an answer that have ended.", labels=["model", "outcome"]
        )
        for outcome in OUTCOMES:
            requests.add_metric([self._model, outcome], counts[outcome])
        yield requests
        for count, (family, name, meaning) in METRICS.items():
            metric = family(f"moetier_serve_{name}", meaning, labels=["model"])
            metric.add_metric([self._model], counts[count])
            yield metric
        for (name, meaning), value in zip(LEFT, self._left(), strict=True):
            gauge = GaugeMetricFamily(f"moetier_serve_{name}", meaning, labels=["model"])
            gauge.add_metric([self._model], value)
            yield gauge
