"""Counts of requests and tokens by API key, and the Prometheus metrics of these and of the tiers of models."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from itertools import accumulate
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from moetier.runtime.daemon.metrics import tier_metrics

OUTCOMES = ("answered", "cancelled", "failed")
# name of a count -> (kind of metric, name of the metric without its prefix, help text)
METRICS: dict[str, tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str]] = {
    "under_way": (GaugeMetricFamily, "requests_under_way", "Requests that are being computed or wait."),
    "prompt_tokens": (CounterMetricFamily, "prompt_tokens", "Tokens of prompts."),
    "cached_tokens": (
        CounterMetricFamily,
        "kept_tokens",
        "Tokens of prompts that were cached from an earlier request.",
    ),
    "new_tokens": (CounterMetricFamily, "new_tokens", "Tokens that were generated."),
}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0)
SIZES = (*(4.0**power for power in range(1, 10)),)  # tokens: 4 to 262,144
# name of a histogram -> (name of the metric without its prefix, upper bounds of its buckets, help text)
HISTOGRAMS: dict[str, tuple[str, Sequence[float], str]] = {
    "queue": ("queue_seconds", SECONDS, "Time from a request's arrival until its prompt began to be computed."),
    "first_token": ("first_token_seconds", SECONDS, "Time from a request's arrival until its first new token."),
    "per_token": ("token_seconds", SECONDS, "Mean time of an answer's new tokens after the first one."),
    "prompt": ("request_prompt_tokens", SIZES, "Tokens of a request's prompt."),
    "cached": ("request_cached_tokens", SIZES, "Tokens of a request's prompt that were cached."),
    "new": ("request_new_tokens", SIZES, "Tokens that were generated for a request."),
}
DEFAULT = "default"  # label of the key "": Prometheus takes an empty label for a missing one
LOADED = (("loaded", "1 if the model is loaded, else 0."),)
LEFT = (  # names and help texts of the metrics of what is left to compute
    ("prompt_tokens_left", "Tokens of prompts under way that are not computed yet."),
    ("prompt_seconds_left", "Seconds until the prompts that have begun are computed, at their speeds so far."),
)


DISK = (  # of each field of Traffic
    ("disk_read_bytes", "Bytes of keys and values that were read from the disk."),
    ("disk_written_bytes", "Bytes of keys and values that were written to the disk."),
    ("disk_pages", "Pages of keys and values that were read from the disk and used."),
    ("disk_damaged_files", "Files of keys and values that were damaged, so that these were computed again."),
)


class Histogram:
    """Numbers of values by buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)  # the last one is of values above all bounds
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds, as Prometheus writes them, with the numbers of values up to each."""
        return [*zip([*map(str, self._bounds), "+Inf"], map(float, accumulate(self._counts)), strict=True)]


class Tally:
    """Counts of requests and tokens since the server started, by API key. Refused requests are not counted.

    Thread-safe.
    """

    def __init__(self, keys: Sequence[str] = ("",)) -> None:
        """``keys``: names of API keys to count by; "" if there is none, or a single one without a name."""
        self._lock = threading.Lock()  # guards: ``_counts``, ``_histograms``
        self._counts = {key: Counter(dict.fromkeys((*OUTCOMES, *METRICS), 0)) for key in keys}
        self._histograms = {
            key: {name: Histogram(bounds) for name, (_, bounds, _) in HISTOGRAMS.items()} for key in keys
        }

    def add(self, key: str, **more: int) -> None:
        """Increase each of the named counts, which are the keys of METRICS and the names in OUTCOMES."""
        with self._lock:
            self._counts[key].update(more)

    def observe(self, key: str, **values: float) -> None:
        """Count values in the named histograms, which are the keys of HISTOGRAMS."""
        with self._lock:
            for name, value in values.items():
                self._histograms[key][name].add(value)

    def counts(self) -> dict[str, int]:
        """Return a dictionary from the name of each count to its value for all keys, all read at one moment."""
        counts = self.by_key().values()
        return {name: sum(each[name] for each in counts) for name in (*OUTCOMES, *METRICS)}

    def by_key(self) -> dict[str, dict[str, int]]:
        """Return the counts of each key, all read at one moment."""
        with self._lock:
            return {key: dict(counts) for key, counts in self._counts.items()}

    def used_tokens(self, key: str) -> int:
        """Return how many tokens of prompts and answers were counted for a key."""
        with self._lock:
            return self._counts[key]["prompt_tokens"] + self._counts[key]["new_tokens"]

    def histograms(self) -> dict[str, dict[str, tuple[list[tuple[str, float]], float]]]:
        """Return the buckets and the sum of each histogram of each key, all read at one moment."""
        with self._lock:
            return {
                key: {name: (histogram.buckets, histogram.sum) for name, histogram in histograms.items()}
                for key, histograms in self._histograms.items()
            }


class Measured(Protocol):
    """Interface of the parts that serve a loaded model, as far as metrics read them."""

    @property
    def service(self) -> Any:
        """Its ``AnswerService``."""


Seen = tuple[str, Tally, Measured | None]  # name, counts and, if it is loaded, what serves a model


class ServeCollector(Collector):
    """Prometheus collector for the tiers of models, and for requests and tokens.

    Models have the names that requests use. (A daemon labels its metrics with the name in the store's manifest.)
    """

    def __init__(self, models: Callable[[], AbstractContextManager[Sequence[Seen]]]) -> None:
        """``models`` returns a context in which none of the models that it yields is unloaded."""
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        with self._models() as models:
            loaded = [(name, served.service) for name, _, served in models if served is not None]
            yield from tier_metrics([(name, tier) for name, service in loaded for tier in service.model.tiers.stats()])
            yield from _labelled(
                LOADED, GaugeMetricFamily, [(name, [served is not None]) for name, _, served in models]
            )
            yield from _counted([(name, tally) for name, tally, _ in models])
            left = [(name, service.prompt_tokens_left()) for name, service in loaded]
            yield from _labelled(LEFT, GaugeMetricFamily, left)
            disks = [(name, service.disk) for name, service in loaded]
            if any(disk is not None for _, disk in disks):
                values = [(name, astuple(disk.traffic())) for name, disk in disks if disk is not None]
                yield from _labelled(DISK, CounterMetricFamily, values)


def _counted(tallies: Sequence[tuple[str, Tally]]) -> Iterator[Metric]:
    """Yield the metrics of requests and tokens of each model."""
    counts = [(model, key, of_key) for model, tally in tallies for key, of_key in tally.by_key().items()]
    requests = CounterMetricFamily(
        "moetier_serve_requests", "Requests for an answer that have ended.", labels=["model", "key", "outcome"]
    )
    for model, key, of_key in counts:
        for outcome in OUTCOMES:
            requests.add_metric([model, key or DEFAULT, outcome], of_key[outcome])
    yield requests
    for count, (family, name, meaning) in METRICS.items():
        metric = family(f"moetier_serve_{name}", meaning, labels=["model", "key"])
        for model, key, of_key in counts:
            metric.add_metric([model, key or DEFAULT], of_key[count])
        yield metric
    observed = [(model, key, of_key) for model, tally in tallies for key, of_key in tally.histograms().items()]
    for name, (metric_name, _, meaning) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"moetier_serve_{metric_name}", meaning, labels=["model", "key"])
        for model, key, histograms in observed:
            buckets, total = histograms[name]
            histogram.add_metric([model, key or DEFAULT], buckets, total)
        yield histogram


def _labelled(
    names: Sequence[tuple[str, str]],
    family: type[GaugeMetricFamily | CounterMetricFamily],
    values: Sequence[tuple[str, Sequence[float]]],
) -> Iterator[Metric]:
    """Yield a metric for each of ``names``, which have help texts. ``values``: of each model, one for each name."""
    for number, (name, meaning) in enumerate(names):
        metric = family(f"moetier_serve_{name}", meaning, labels=["model"])
        for model, each in values:
            metric.add_metric([model], each[number])
        yield metric
