"""Counters of one tier: written under the tier's lock, read as a frozen value."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import asdict, dataclass, field, fields
from statistics import median, quantiles
from typing import Any

WAITS_KEPT = 65_536  # the latest; median and p99 are over these
# seconds: from a record in a page cache to one that waits behind a busy disk
LOAD_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class TierStats:
    """A snapshot. ``bytes_in`` is what moved into this tier; waits are seconds that callers of acquire stood still, and
    in which requests of other processes had nothing granted."""

    name: str
    slots: int  # that the budget pays for
    ready: int  # slots that hold a record now
    leased: int | None  # of these: that somebody holds; None of a daemon's client, as the daemon knows
    slot_bytes: int  # of all slots together
    hits: int
    misses: int  # loads that a demand began, and demands that joined what was under way
    joined: int  # of the misses: those that joined
    prefetched: (
        int  # records whose reads a wish began; of these, but for those that failed or were cancelled meanwhile:
    )
    useful: int  # READY when a demand came, to this tier or to the one above, which had borrowed it
    late: int  # begun, and not READY, when a demand came
    wasted: int  # evicted before any demand; of what the tier above has borrowed that is known once it is read again
    cancelled: int  # wishes that were given up: before they had begun, for want of a slot too; or while being read
    saved_seconds: float  # that the useful and late ones were read before a demand came: what it did not have to wait
    warmed: int  # records that a warm-up has brought; of these:
    recalled: int  # that were wanted since, or while they were under way
    evictions: int
    failures: int  # loads that ended in an error
    discarded: int  # results that were thrown away: their record had been replaced meanwhile
    bytes_in: int
    load_bounds: tuple[float, ...]  # seconds; of the loads that were timed as a whole, with no head:
    loads: tuple[int, ...]  # how many took no longer than each bound, but longer than the one before; and than them all
    load_seconds: float  # that they took, all of them
    waits: int  # how many there were
    wait_seconds: float
    wait_median: float  # of the latest
    wait_p99: float

    @property
    def hit_ratio(self) -> float:
        """Hits among all demands; 0 before the first."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"hit_ratio": self.hit_ratio}


@dataclass(slots=True)
class TierCounters:
    """The mutable side; its owner holds a lock."""

    name: str
    hits: int = 0
    misses: int = 0
    joined: int = 0
    prefetched: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    cancelled: int = 0
    saved_seconds: float = 0.0
    warmed: int = 0
    recalled: int = 0
    evictions: int = 0
    failures: int = 0
    discarded: int = 0
    bytes_in: int = 0
    loads: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BOUNDS) + 1))
    load_seconds: float = 0.0
    waits: int = 0
    wait_seconds: float = 0.0
    latest_waits: deque[float] = field(default_factory=lambda: deque(maxlen=WAITS_KEPT))

    def loaded(self, seconds: float) -> None:
        """One load took so long."""
        self.loads[bisect_left(LOAD_BOUNDS, seconds)] += 1
        self.load_seconds += seconds

    def waited(self, seconds: float) -> None:
        self.waits += 1
        self.wait_seconds += seconds
        self.latest_waits.append(seconds)

    def snapshot(self, *, slots: int, ready: int, leased: int | None, slot_bytes: int) -> TierStats:
        """Call it under the owner's lock; the sort of the latest waits is the only work."""
        waits = sorted(self.latest_waits)
        p99 = quantiles(waits, n=100)[98] if len(waits) > 1 else sum(waits)
        counts = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "latest_waits"}
        return TierStats(
            **counts | {"loads": tuple(self.loads)},
            slots=slots,
            ready=ready,
            leased=leased,
            slot_bytes=slot_bytes,
            load_bounds=LOAD_BOUNDS,
            wait_median=median(waits) if waits else 0.0,
            wait_p99=p99,
        )


@dataclass(frozen=True, slots=True)
class Share:
    place: str  # for people
    records: int
    bytes: int
    away: str = ""  # of a daemon that is not there now: why
    lost: int = 0  # times that it went away
