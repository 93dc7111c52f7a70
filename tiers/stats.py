"""Statistics of one tier: counters that its owner writes under its lock, and a snapshot for readers."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from statistics import median, quantiles
from typing import Any

WAITS_KEPT = 65_536  # the latest waits, over which median and p99 are computed
# seconds: from a record in the page cache to one that waits for a busy disk
LOAD_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Counts:
    """Counts of a tier since it was opened.

    A wait is the time for which a caller of ``acquire`` stood still, or for which a request of another process was
    granted nothing.
    """

    name: str
    hits: int = 0
    misses: int = 0  # demands that began a load, and demands that joined a running load
    joined: int = 0  # of the misses, those that joined a running load
    prefetched: int = 0  # prefetches whose read began; those that neither failed nor were cancelled count once below:
    useful: int = 0  # READY when a demand came, here or in the tier above, which had borrowed the record
    late: int = 0  # still being read when a demand came
    wasted: int = 0  # evicted before any demand; of a borrowed record this is known when it is read again
    cancelled: int = 0  # prefetch requests cancelled before their read began, for want of a slot too, or during it
    saved_seconds: float = 0.0  # read time that useful and late prefetches spared their demands
    warmed: int = 0  # records that a warm-up has loaded
    recalled: int = 0  # of the warmed records, those that a demand has asked for since
    evictions: int = 0
    failures: int = 0  # loads that ended in an error
    discarded: int = 0  # results that were thrown away because their record had been replaced meanwhile
    bytes_in: int = 0  # bytes moved into this tier
    # loads by duration, one more than LOAD_BOUNDS; without those that began in a staging buffer
    loads: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BOUNDS) + 1))
    load_seconds: float = 0.0  # duration of all of these
    waits: int = 0
    wait_seconds: float = 0.0


@dataclass(slots=True)
class TierStats(Counts):
    """Snapshot of a tier: its counts, and the state of its slots."""

    slots: int = 0  # number of slots that the budget pays for
    ready: int = 0  # slots that hold a record now
    leased: int | None = None  # of the ready ones, those that are leased; None for a daemon's client, who can't know
    slot_bytes: int = 0  # bytes of all slots together
    load_bounds: tuple[float, ...] = LOAD_BOUNDS  # seconds; upper bounds of the histogram ``loads``
    wait_median: float = 0.0  # seconds, over the latest waits
    wait_p99: float = 0.0

    @property
    def hit_ratio(self) -> float:
        """The share of hits among all demands; 0 before the first demand."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return all fields and the hit ratio, by name."""
        return asdict(self) | {"hit_ratio": self.hit_ratio}


@dataclass(slots=True)
class TierCounters(Counts):
    """The counters behind ``TierStats``. Their owner holds a lock when it changes them."""

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
        """Return a copy of the counters. Call it under the owner's lock: its only cost is to sort the waits."""
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


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a process's records that came from one place."""

    place: str  # as shown to people
    records: int
    bytes: int
    away: str = ""  # why a daemon is not available now
    lost: int = 0  # how often the daemon became unavailable
