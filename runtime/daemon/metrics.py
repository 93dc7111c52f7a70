"""A tier's counters as Prometheus takes them: read when it asks, and kept nowhere else.

Names, types and units are those of Prometheus's practices (https://prometheus.io/docs/practices/naming/);
docs/watching.md has them in a table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.wire.address import DIGEST_CHARS
from moetier.tiers.stats import TierStats

LABELS = ("model", "tier")

# metric: (field, meaning)
GAUGES = {
    "slots": ("slots", "Slots that the budget pays for."),
    "ready_slots": ("ready", "Slots that hold a record."),
    "leased_slots": ("leased", "Slots whose record somebody holds."),
    "slot_bytes": ("slot_bytes", "Memory of all slots."),
}
COUNTERS = {
    "hits": ("hits", "Demands whose record was there."),
    "misses": ("misses", "Demands whose record was not there."),
    "joined": ("joined", "Misses whose load was under way already."),
    "evictions": ("evictions", "Records that made room for others."),
    "load_failures": ("failures", "Loads that ended in an error."),
    "discarded": ("discarded", "Results thrown away, as their record had been replaced meanwhile."),
    "loaded_bytes": ("bytes_in", "Bytes of records that came into the tier."),
    "prefetches": ("prefetched", "Loads that a wish began."),
    "prefetch_saved_seconds": (
        "saved_seconds",
        "What useful and late prefetches have saved at most.",
    ),
    "warmed": ("warmed", "Records of earlier runs that were read beforehand."),
    "recalled": ("recalled", "Records that were read beforehand and wanted since."),
}
OUTCOMES = ("useful", "late", "wasted", "cancelled")

OF_CLIENTS_NOW = {
    "clients": ("clients", "Processes of this host that are connected."),
    "sessions": ("sessions", "Clients that have a session."),
    "leases": ("leases", "Slots held for clients of this host, or on their way to them."),
    "recovered_slots": ("recovered", "Slots that were taken back full when the daemon started."),
}
FAULTY = "1 where nothing is served any more, as the shards are not all of one conversion."
OF_CLIENTS = {
    "requests": ("requests", "Requests of clients for the missing experts of a block."),
    "reported_hits": ("used", "Hits that clients found by themselves, and reported."),
    "fetches": ("fetches", "Records, or parts of them, sent to other hosts."),
    "fetched_bytes": ("fetched_bytes", "Bytes of records sent to other hosts."),
    "received_bytes": ("session_bytes_in", "Bytes of messages from clients of this host."),
    "sent_bytes": ("session_bytes_out", "Bytes of messages to clients of this host."),
}

Tiers = Sequence[tuple[str, TierStats | pb.Tier]]  # each with its model's name


class DaemonCollector(Collector):
    """What ``stats`` says of each model of a daemon."""

    def __init__(self, stats: Callable[[], Sequence[pb.ModelStats]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        models = self._stats()
        count = Counter(model.name for model in models)
        # two stores of one model have one name
        named = [(m.name if count[m.name] == 1 else f"{m.name} ({m.digest[:DIGEST_CHARS]})", m) for m in models]
        yield from tier_metrics([(name, model.host) for name, model in named])
        for metric, (field, meaning) in OF_CLIENTS_NOW.items():
            gauge = GaugeMetricFamily(f"moetier_daemon_{metric}", meaning, labels=LABELS[:1])
            for name, model in named:
                gauge.add_metric([name], getattr(model, field))
            yield gauge
        faulty = GaugeMetricFamily("moetier_daemon_faulty", FAULTY, labels=LABELS[:1])
        for name, model in named:
            faulty.add_metric([name], bool(model.fault))
        yield faulty
        for metric, (field, meaning) in OF_CLIENTS.items():
            counter = CounterMetricFamily(f"moetier_daemon_{metric}", meaning, labels=LABELS[:1])
            for name, model in named:
                counter.add_metric([name], getattr(model, field))
            yield counter


def tier_metrics(tiers: Tiers) -> Iterator[Metric]:
    """Of tiers, all told apart by model and name."""
    for metric, (field, meaning) in GAUGES.items():
        gauge = GaugeMetricFamily(f"moetier_tier_{metric}", meaning, labels=LABELS)
        for model, tier in tiers:
            if (value := getattr(tier, field)) is not None:
                gauge.add_metric([model, tier.name], value)
        yield gauge
    for metric, (field, meaning) in COUNTERS.items():
        counter = CounterMetricFamily(f"moetier_tier_{metric}", meaning, labels=LABELS)
        for model, tier in tiers:
            counter.add_metric([model, tier.name], getattr(tier, field))
        yield counter
    outcomes = CounterMetricFamily(
        "moetier_tier_prefetch_outcomes", "What became of wishes, as far as it is known.", labels=[*LABELS, "outcome"]
    )
    loads = HistogramMetricFamily("moetier_tier_load_seconds", "How long loads took.", labels=LABELS)
    waits = SummaryMetricFamily("moetier_tier_wait_seconds", "How long callers waited for records.", labels=LABELS)
    for model, tier in tiers:
        place = [model, tier.name]
        for outcome in OUTCOMES:
            outcomes.add_metric([*place, outcome], getattr(tier, outcome))
        loads.add_metric(place, _buckets(tier.load_bounds, tier.loads), tier.load_seconds)
        waits.add_metric(place, tier.waits, tier.wait_seconds)
    yield from (outcomes, loads, waits)


def registry_of(collector: Collector) -> CollectorRegistry:
    """With what Prometheus's own library says of a process, and moetier's version."""
    registry = CollectorRegistry()
    registry.register(collector)
    registry.register(_Build())
    ProcessCollector(registry=registry)
    return registry


def _buckets(bounds: Iterable[float], counts: Iterable[int]) -> list[tuple[str, float]]:
    """Cumulative ones, each with the seconds that its loads took at most."""
    names = [*map(repr, bounds), "+Inf"]
    return list(zip(names, accumulate(counts), strict=True))


class _Build(Collector):
    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("moetier_build", "Which moetier this is.", {"version": version("moetier")})
