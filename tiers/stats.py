"""Statistics of one tier: counters and prefetch outcomes, which the tier changes under its lock, and a snapshot."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from statistics import median, quantiles
from typing import Any

from .layout import ExpertKey

WAITS_KEPT = 65_536  # the latest waits, over which median and p99 are computed
# upper bounds of the histogram of load times, in seconds: from a record in the page cache to a wait for a busy disk
LOAD_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Counts:
    """Counts of a tier since it was opened.

    A wait is the time during which a caller of ``acquire`` was blocked, or a request of another process held no lease.
    """

    name: str
    hits: int = 0
    misses: int = 0  # demands that began a load, and demands that joined a running load
    joined: int = 0  # of the misses, those that joined a running load
    prefetched: int = 0  # prefetches whose read began; each that does not fail is counted in one of the next four
    useful: int = 0  # the record was READY when a demand came, here or in a tier above that had borrowed the record
    late: int = 0  # the record was still being read when a demand came
    wasted: int = 0  # evicted before any demand; a borrowed record is only counted when it is read again
    cancelled: int = 0  # prefetch requests that were replaced or found no slot, before or during their read
    saved_seconds: float = 0.0  # read time that demands did not wait for, thanks to useful and late prefetches
    warmed: int = 0  # records that a warm-up has loaded
    recalled: int = 0  # warmed records that a demand has used since
    evictions: int = 0
    failures: int = 0  # loads that ended in an error, and reads that were recovered from a mirror
    discarded: int = 0  # copies or results discarded because their record was replaced while it was in use
    bytes_in: int = 0  # bytes moved into this tier
    # histogram: loads by duration, with LOAD_BOUNDS as upper bounds and one bin above the last
    loads: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BOUNDS) + 1))
    load_seconds: float = 0.0  # total duration of the loads in the histogram
    waits: int = 0
    wait_seconds: float = 0.0  # total duration of all waits


@dataclass(slots=True)
class TierStats(Counts):
    """Snapshot of a tier: its counts, and the state of its slots."""

    slots: int = 0  # number of slots, as many as fit the budget
    ready: int = 0  # slots that hold a record now
    leased: int | None = None  # ready slots that are leased; None in a daemon's client, which can't know the number
    slot_bytes: int = 0  # bytes of all slots together
    load_bounds: tuple[float, ...] = LOAD_BOUNDS  # seconds; upper bounds of the histogram ``loads``
    wait_median: float = 0.0  # seconds, over the latest waits
    wait_p99: float = 0.0  # seconds, over the latest waits

    @property
    def hit_ratio(self) -> float:
        """Hits divided by all demands; 0 before the first demand."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of all fields and the hit ratio."""
        return asdict(self) | {"hit_ratio": self.hit_ratio}


@dataclass(slots=True)
class TierCounters(Counts):
    """The changing counters from which ``TierStats`` are made. The tier holds its lock when it changes them."""

    latest_waits: deque[float] = field(default_factory=lambda: deque(maxlen=WAITS_KEPT))

    def loaded(self, seconds: float) -> None:
        """Count a load that took ``seconds``."""
        self.loads[bisect_left(LOAD_BOUNDS, seconds)] += 1
        self.load_seconds += seconds

    def waited(self, seconds: float) -> None:
        """Count a wait of ``seconds``."""
        self.waits += 1
        self.wait_seconds += seconds
        self.latest_waits.append(seconds)

    def snapshot(self, *, slots: int, ready: int, leased: int | None, slot_bytes: int) -> TierStats:
        """Return a copy of the counters with the given state of the slots.

        Call it with the tier's lock held. That is cheap: the only work is to sort the latest waits.
        """
        waits = sorted(self.latest_waits)
        counts = {field.name: getattr(self, field.name) for field in fields(Counts)}
        return TierStats(
            **counts | {"loads": list(self.loads)},
            slots=slots,
            ready=ready,
            leased=leased,
            slot_bytes=slot_bytes,
            wait_median=median(waits) if waits else 0.0,
            wait_p99=quantiles(waits, n=100)[98] if len(waits) > 1 else sum(waits),
        )


class PrefetchOutcomes:
    """Track each prefetch from its begin until its record is used or evicted, and count its outcome.

    Callers hold the tier's lock.

    ``began`` has the prefetches whose read is in progress, with the time by ``clock`` at which the read began.
    ``unused`` has the records that have arrived and were not used yet, the oldest first, with the duration of their
    read in seconds.
    """

    def __init__(self, counters: TierCounters, clock: Callable[[], float]) -> None:
        self._counters = counters
        self._clock = clock
        self.began: dict[ExpertKey, float] = {}
        self.unused: dict[ExpertKey, float] = {}

    def begin(self, key: ExpertKey) -> None:
        """Note that the read of a prefetch begins."""
        self.began[key] = self._clock()

    def arrive(self, key: ExpertKey) -> None:
        """Note that the record has arrived. It counts as unused if no demand has come since its read began."""
        if (began := self.began.pop(key, None)) is not None:
            self.unused[key] = self._clock() - began

    def use(self, key: ExpertKey) -> None:
        """Count the first demand for a record that was prefetched (useful) or is still being read (late)."""
        if (seconds := self.unused.pop(key, None)) is not None:
            self._counters.useful += 1
            self._counters.saved_seconds += seconds
        elif (began := self.began.pop(key, None)) is not None:
            self._counters.late += 1
            self._counters.saved_seconds += self._clock() - began

    def evict(self, key: ExpertKey) -> None:
        """Note that the record was evicted. If no demand has used it, its prefetch was wasted."""
        if self.unused.pop(key, self.began.pop(key, None)) is not None:
            self._counters.wasted += 1

    def repair(self, find: Callable[[ExpertKey], int | None]) -> None:
        """Remove keys that have no slot, after an exception has interrupted a change. ``find`` returns a key's slot."""
        for known in (self.began, self.unused):
            for key in [key for key in known if find(key) is None]:
                del known[key]


@dataclass(frozen=True, slots=True)
class Share:
    """How many of a process's records came from one place, such as a daemon or the local store."""

    place: str  # name of the place, as shown to users
    records: int
    bytes: int
    away: str = ""  # why the daemon is not available now; "" if it is available, or the place is not a daemon
    lost: int = 0  # how often the daemon became unavailable
