"""Changes of the counters of a daemon's models from one query to the next. This module does no I/O."""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import dataclass, field

from moetier.proto.expert_store_pb2 import Client, DescribeReply, Details, ModelStats, StatsReply, Tier

KEPT = 600  # maximum number of changes that are kept
HEAT_HALF_LIFE = 30.0  # seconds after which a use counts half in ``lately``


@dataclass(frozen=True, slots=True)
class CounterRates:
    """Change of one model's counters between two queries. All values but ``hit_ratio`` are per second."""

    hits: float
    misses: float
    reads: float  # loads that have begun
    bytes_read: float
    evictions: float
    waiting: float  # seconds that callers waited
    fetches: float
    bytes_fetched: float

    @property
    def demands(self) -> float:
        """Hits and misses per second."""
        return self.hits + self.misses

    @property
    def hit_ratio(self) -> float | None:
        """Hits divided by demands; None without demands."""
        return self.hits / self.demands if self.demands else None


def reads_of(host: Tier) -> int:
    """Return the number of loads that have begun: for demands, for prefetches, and for learned experts at the start."""
    return host.misses - host.joined + host.prefetched + host.warmed


@dataclass(slots=True)
class ModelHistory:
    """Latest state of a model, and the changes that led to it.

    ``lately[block][expert]`` is the number of recent uses of an expert, which count half after HEAT_HALF_LIFE.
    """

    stats: ModelStats
    details: Details
    changes: deque[CounterRates] = field(default_factory=lambda: deque(maxlen=KEPT))
    rates: dict[int, tuple[float, float]] = field(default_factory=dict)  # client's number -> (hits, misses) per second
    lately: list[list[float]] = field(default_factory=list)

    @property
    def last(self) -> CounterRates | None:
        """Latest change, or None if there is none yet."""
        return self.changes[-1] if self.changes else None

    def go_on(self, stats: ModelStats, details: Details, seconds: float) -> None:
        """Replace the state by a newer one, and append the change between the two to ``changes``.

        ``seconds``: the time between the two states.
        """
        self.changes.append(_change(self.stats, stats, seconds))
        former = {client.number: client for client in self.details.clients}
        self.rates = {
            client.number: (
                (client.reported_hits - was.reported_hits) / seconds,
                (client.requested - was.requested) / seconds,
            )
            for client in details.clients
            for was in [former.get(client.number, Client())]
        }
        fading = 0.5 ** (seconds / HEAT_HALF_LIFE)
        before = self.lately or [[0.0] * len(block.uses) for block in details.blocks]
        self.lately = [
            [value * fading + new - old for value, old, new in zip(values, was.uses, now.uses, strict=True)]
            for values, was, now in zip(before, self.details.blocks, details.blocks, strict=True)
        ]
        self.stats, self.details = stats, details


class History:
    """Histories of a daemon's models. They are cleared when another daemon takes its place.

    ``models`` is a dictionary from the digest of a store to the history of its model, in the daemon's order.
    """

    def __init__(self) -> None:
        self.models: dict[str, ModelHistory] = {}
        self._daemon = (0, 0)  # process id, and start in ms since 1970
        self._uptime = 0.0

    def add(self, described: DescribeReply, stats: StatsReply) -> None:
        """Add the present state of all models. Clear the history first if the state is that of another daemon."""
        daemon = described.pid, described.started_unix_ms
        # a daemon of an earlier version sends no details
        every = list(stats.details) or [Details() for _ in stats.models]
        model_details = list(zip(stats.models, every, strict=True))
        # a new daemon may have started between the two replies: a counter that has fallen shows that
        if daemon != self._daemon or stats.uptime_s < self._uptime or any(self._falls(*one) for one in model_details):
            self.models = {}
        seconds = max(stats.uptime_s - self._uptime, 1e-9)
        self._daemon, self._uptime = daemon, stats.uptime_s
        for model, details in model_details:
            if model.digest in self.models:
                self.models[model.digest].go_on(model, details, seconds)
            else:
                self.models[model.digest] = ModelHistory(model, details)

    def _falls(self, stats: ModelStats, details: Details) -> bool:
        """Return whether a counter of a model is less than before, or the number of experts of a block has changed."""
        if (earlier := self.models.get(stats.digest)) is None:
            return False
        if [len(block.uses) for block in details.blocks] != [len(block.uses) for block in earlier.details.blocks]:
            return True
        return any(map(operator.lt, _counters(stats, details), _counters(earlier.stats, earlier.details)))


def _counters(stats: ModelStats, details: Details) -> list[float]:
    host = stats.host
    counted = (host.hits, host.misses, host.bytes_in, host.evictions, host.wait_seconds)
    return [*counted, stats.fetches, stats.fetched_bytes, *(use for block in details.blocks for use in block.uses)]


def _change(before: ModelStats, now: ModelStats, seconds: float) -> CounterRates:
    was, host = before.host, now.host
    return CounterRates(
        hits=(host.hits - was.hits) / seconds,
        misses=(host.misses - was.misses) / seconds,
        reads=max(reads_of(host) - reads_of(was), 0) / seconds,  # unlike a counter, such a sum may fall
        bytes_read=(host.bytes_in - was.bytes_in) / seconds,
        evictions=(host.evictions - was.evictions) / seconds,
        waiting=(host.wait_seconds - was.wait_seconds) / seconds,
        fetches=(now.fetches - before.fetches) / seconds,
        bytes_fetched=(now.fetched_bytes - before.fetched_bytes) / seconds,
    )
