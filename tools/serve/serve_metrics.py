"""What Prometheus reads of a server: the tiers of its model, and what it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from moetier.runtime.daemon.metrics import tier_metrics
from moetier.tiers.stats import TierStats

from .serve_tally import Tally

TOKENS = {
    "prompt_tokens": "Tokens of prompts.",
    "kept_tokens": "Tokens of prompts that an earlier request had computed.",
    "new_tokens": "Tokens that were generated.",
}


class ServeCollector(Collector):
    """``stats`` is of the tiers of ``model``, as its store names it: as a daemon does that serves the same."""

    def __init__(self, model: str, stats: Callable[[], list[TierStats]], tally: Tally) -> None:
        self._model = model
        self._stats = stats
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the tiers, of requests and of tokens."""
        yield from tier_metrics([(self._model, tier) for tier in self._stats()])
        tallied = self._tally.tallied()
        requests = CounterMetricFamily(
            "moetier_serve_requests", "Requests for an answer that are over.", labels=["model", "outcome"]
        )
        for outcome, count in tallied.requests.items():
            requests.add_metric([self._model, outcome], count)
        yield requests
        under_way = GaugeMetricFamily(
            "moetier_serve_requests_under_way",
            "Requests that are computed, or wait for their turn.",
            labels=["model"],
        )
        under_way.add_metric([self._model], tallied.under_way)
        yield under_way
        for metric, meaning in TOKENS.items():
            tokens = CounterMetricFamily(f"moetier_serve_{metric}", meaning, labels=["model"])
            tokens.add_metric([self._model], getattr(tallied, metric))
            yield tokens


def exposition(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """In the form that a request's Accept header asks for; and its type."""
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type
