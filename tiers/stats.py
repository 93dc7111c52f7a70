"""Statistics of a tier: the counters and prefetch outcomes, which the tier changes under its lock, and a snapshot."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from statistics import median, quantiles
from typing import Any, Literal, NamedTuple

from .layout import ExpertKey

WAITS_KEPT = 65_536  # number of the latest waits, of which the median and the 99th percentile are computed
# upper bounds of the bins of the histogram of load times, in seconds: from a read from the page cache to a busy disk
LOAD_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class MetricText(NamedTuple):
    """Name of a field as a metric of Prometheus, after the prefix ``moetier_tier_``, and its meaning for users."""

    name: str
    help: str


def _counter(metric: str, help: str, *, zero: float = 0) -> Any:
    """Declare a counter of a tier, which is ``zero`` at first."""
    return field(default=zero, metadata={"counter": MetricText(metric, help)})


def _outcome(outcome: str) -> Any:
    """Declare a counter of prefetches that have ended with ``outcome``, a label of one metric."""
    return field(default=0, metadata={"outcome": outcome})


def _gauge(metric: str, help: str, default: int | None = 0) -> Any:
    """Declare a number that describes the present state of the slots."""
    return field(default=default, metadata={"gauge": MetricText(metric, help)})


@dataclass(frozen=True, slots=True)
class TierStats:
    """Snapshot of a tier: its counters, which are 0 when it is opened, and the state of its slots.

    A counter is declared here: ``TierCounters`` counts it by this name, and ``/metrics`` takes its name and meaning
    from here. A daemon sends it in a field of the same name (``Tier`` in ``proto/expert_store.proto``).

    A wait is a time during which a caller was blocked in ``acquire``, or during which a request of another process
    waited for records and held no lease.
    """

    name: str
    # a hit whose record was replaced during its use counts as discarded, too; the demand is repeated, and counted again
    hits: int = _counter("hits", "Demands whose record was in the tier.")
    # each has begun a load, or joined one
    misses: int = _counter("misses", "Demands whose record was not in the tier.")
    # the load was begun for a prefetch or another demand
    joined: int = _counter("joined", "Misses whose record was already being loaded.")
    # if the read does not fail, each prefetch has one of the next four outcomes
    prefetched: int = _counter("prefetches", "Loads that a prefetch request began.")
    # the record was READY when a demand came, in this tier or in the tier above, which had copied it
    useful: int = _outcome("useful")
    late: int = _outcome("late")  # the record was still being read when a demand came
    # The record was evicted before any demand. If the tier above has an unused copy, the prefetch counts as wasted only
    # when this tier reads the record again.
    wasted: int = _outcome("wasted")
    cancelled: int = _outcome("cancelled")  # the read was stopped, because the record was no longer requested
    dropped: int = _counter(
        "prefetches_dropped",
        "Prefetch requests that ended before their load: replaced, demanded first, or without a slot.",
    )
    # how much longer demands would have waited
    saved_seconds: float = _counter(
        "prefetch_saved_seconds", "Seconds that useful and late prefetches have saved, at most.", zero=0.0
    )
    warmed: int = _counter(
        "warmed",
        "Records that were read beforehand: the most used of earlier runs, and the rest of a model that fits.",
    )
    recalled: int = _counter("recalled", "Records that were read beforehand and demanded afterwards.")
    evictions: int = _counter("evictions", "Records that were evicted to make room for others.")
    failures: int = _counter("load_failures", "Loads in which a read failed, also if a mirror then had the record.")
    discarded: int = _counter(
        "discarded", "Results that were discarded because their record had been replaced meanwhile."
    )
    bytes_in: int = _counter("loaded_bytes", "Bytes of records that came into the tier.")
    # number of loads for each bin of their duration; LOAD_BOUNDS are the upper bounds, and the last bin has none
    loads: tuple[int, ...] = (0,) * (len(LOAD_BOUNDS) + 1)
    load_seconds: float = 0.0  # total duration of the loads in ``loads``
    waits: int = 0
    wait_seconds: float = 0.0  # total duration of all waits
    slots: int = _gauge("slots", "Slots that the memory budget allows.")
    ready: int = _gauge("ready_slots", "Slots that hold a record.")
    # of the READY slots; None in a daemon's client, which can't know it
    leased: int | None = _gauge("leased_slots", "Slots whose record is leased.", None)
    memory_bytes: int = _gauge("memory_bytes", "Memory of all slots.")
    load_bounds: tuple[float, ...] = LOAD_BOUNDS  # upper bounds of the bins of ``loads``, in seconds
    wait_median: float = 0.0  # median of the latest waits, in seconds
    wait_p99: float = 0.0  # 99th percentile of the latest waits, in seconds

    @property
    def hit_ratio(self) -> float:
        """Hits divided by all demands; 0 before the first demand. A demand that was repeated counts each time."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return all fields and ``hit_ratio`` as a dictionary by name."""
        return asdict(self) | {"hit_ratio": self.hit_ratio}


def declared(kind: Literal["counter", "gauge", "outcome"]) -> dict[str, Any]:
    """Return what the fields of ``TierStats`` declare, by their names: a MetricText, or the text of an outcome."""
    return {each.name: each.metadata[kind] for each in fields(TierStats) if kind in each.metadata}


class TierCounters:
    """The counters of a tier, which are fields of ``TierStats``. They change under the tier's lock."""

    def __init__(self, name: str) -> None:
        self.name = name
        names = declared("counter") | declared("outcome")
        self._counts: dict[str, Any] = {each.name: each.default for each in fields(TierStats) if each.name in names}
        self._loads = [0] * (len(LOAD_BOUNDS) + 1)
        self._load_seconds = 0.0
        self._waits, self._wait_seconds = 0, 0.0
        self._latest_waits = deque[float](maxlen=WAITS_KEPT)

    def count(self, **events: float) -> None:
        """Count what has happened: so many ``hits``, ``evictions`` or other counters of ``TierStats``."""
        for name, number in events.items():
            self._counts[name] += number

    def count_load(self, seconds: float) -> None:
        """Count a load that took ``seconds``."""
        self._loads[bisect_left(LOAD_BOUNDS, seconds)] += 1
        self._load_seconds += seconds

    def count_wait(self, seconds: float) -> None:
        """Count a wait of ``seconds``."""
        self._waits += 1
        self._wait_seconds += seconds
        self._latest_waits.append(seconds)

    def snapshot(
        self, *, slots: int = 0, ready: int = 0, leased: int | None = None, memory_bytes: int = 0
    ) -> TierStats:
        """Return a copy of the counters, together with the given state of the slots.

        The caller holds the tier's lock. The only work that takes time is to sort the latest waits.
        """
        waits = sorted(self._latest_waits)
        return TierStats(
            self.name,
            **self._counts,
            loads=tuple(self._loads),
            load_seconds=self._load_seconds,
            waits=self._waits,
            wait_seconds=self._wait_seconds,
            slots=slots,
            ready=ready,
            leased=leased,
            memory_bytes=memory_bytes,
            wait_median=median(waits) if waits else 0.0,
            wait_p99=quantiles(waits, n=100)[98] if len(waits) > 1 else sum(waits),
        )


class PrefetchOutcomes:
    """Counts prefetches: follows each from the beginning of its load until its record is used or evicted.

    Callers hold the tier's lock.
    """

    def __init__(self, counters: TierCounters, clock: Callable[[], float]) -> None:
        self._counters = counters
        self._clock = clock
        # by key, for each prefetch whose read is in progress: the time at which the read began
        self._began: dict[ExpertKey, float] = {}
        # by key, the oldest first, for each prefetched record that was not used yet: the seconds that its read took
        self._unused: dict[ExpertKey, float] = {}

    @property
    def unused(self) -> Collection[ExpertKey]:
        """Keys of the prefetched records that have arrived and were not used yet, the oldest first."""
        return self._unused.keys()

    def note_dropped(self, requests: int) -> None:
        """Count requests that end before their load begins."""
        self._counters.count(dropped=requests)

    def note_begun(self, key: ExpertKey) -> None:
        """Count a prefetch, whose load begins now."""
        self._counters.count(prefetched=1)
        self._began[key] = self._clock()

    def note_arrived(self, key: ExpertKey) -> None:
        """Note that the record has arrived. It is ``unused`` from now on, unless a demand came while it was read."""
        if (began := self._began.pop(key, None)) is not None:
            self._unused[key] = self._clock() - began

    def note_aborted(self, key: ExpertKey, *, is_cancelled: bool = False) -> None:
        """Note that the record will not arrive: its read has failed, or was cancelled, which is counted."""
        if self._began.pop(key, None) is not None:
            self._counters.count(cancelled=is_cancelled)

    def note_use(self, key: ExpertKey) -> None:
        """Note a demand for a record. If it is the first since the prefetch, count the prefetch as useful or late."""
        if (seconds := self._unused.pop(key, None)) is not None:
            self._counters.count(useful=1, saved_seconds=seconds)
        elif (began := self._began.pop(key, None)) is not None:
            self._counters.count(late=1, saved_seconds=self._clock() - began)

    def note_eviction(self, key: ExpertKey) -> None:
        """Note that the record was evicted. If no demand has used it, count its prefetch as wasted."""
        if self._unused.pop(key, self._began.pop(key, None)) is not None:
            self._counters.count(wasted=1)

    def repair(self, has: Callable[[ExpertKey], bool]) -> None:
        """Remove records that are gone, after an interrupted transition. ``has`` returns whether a record is there."""
        for keys in (self._began, self._unused):
            for key in [key for key in keys if not has(key)]:
                del keys[key]


@dataclass(frozen=True, slots=True)
class Share:
    """Counts of the records that a process got from one place: a daemon, or the local store."""

    place: str  # name of the place for users
    records: int  # number of records
    bytes: int  # total size of these records
    away: str = ""  # why the daemon is unavailable now; "" if it is available, or if the place is the local store
    lost: int = 0  # how often the daemon has become unavailable
    computed: int = 0  # outputs that the daemon has computed: one for each expert and token
    computed_bytes: int = 0  # hidden states and outputs that were sent for that, both ways


class Counts:
    """A dataclass whose fields are counters. Its owner holds a lock."""

    __slots__ = ()

    def count(self, **events: int) -> None:
        """Add to fields, by their names."""
        for name, number in events.items():
            setattr(self, name, getattr(self, name) + number)


@dataclass(slots=True)
class ShareCounts(Counts):
    """Counts of the records that come from one place. They are fields of ``Share``."""

    records: int = 0
    bytes: int = 0
    computed: int = 0
    computed_bytes: int = 0

    def share(self, place: str, away: str = "", lost: int = 0) -> Share:
        """Return these counts, labelled with ``place``. ``away`` and ``lost`` are as in ``Share``."""
        return Share(place, away=away, lost=lost, **asdict(self))
