"""Counters of one tier: written under the tier's lock, read as a frozen value."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from statistics import median, quantiles
from typing import Any

WAITS_KEPT = 65_536  # the latest; median and p99 are over these


@dataclass(frozen=True, slots=True)
class TierStats:
    """A snapshot. ``bytes_in`` is what moved into this tier; waits are seconds that callers of acquire stood still."""

    name: str
    slots: int  # that the budget pays for
    ready: int  # slots that hold a record now
    slot_bytes: int  # of all slots together
    hits: int
    misses: int  # loads that a demand began, and demands that joined a load under way
    joined: int  # of the misses: those that joined
    prefetched: int  # loads that a wish began; of these, but for those that failed or were cancelled meanwhile:
    useful: int  # READY when a demand came, to this tier or to the one above, which had borrowed it
    late: int  # still under way when a demand came
    wasted: int  # evicted before any demand; of what the tier above has borrowed that is known once it is read again
    cancelled: int  # wishes that were given up: before they had begun, for want of a slot too; or while being read
    saved_seconds: float  # that the useful and late ones were read before a demand came: what it did not have to wait
    warmed: int  # records that a warm-up has brought; of these:
    recalled: int  # that were wanted since, or while they were under way
    evictions: int
    failures: int  # loads that ended in an error
    discarded: int  # results that were thrown away: their record had been replaced meanwhile
    bytes_in: int
    wait_seconds: float
    wait_median: float
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
    wait_seconds: float = 0.0
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=WAITS_KEPT))

    def waited(self, seconds: float) -> None:
        self.wait_seconds += seconds
        self.waits.append(seconds)

    def snapshot(self, *, slots: int, ready: int, slot_bytes: int) -> TierStats:
        """Call it under the owner's lock; the sort of the waits is the only work."""
        waits = list(self.waits)
        p99 = quantiles(waits, n=100)[98] if len(waits) > 1 else sum(waits)
        return TierStats(
            name=self.name,
            slots=slots,
            ready=ready,
            slot_bytes=slot_bytes,
            hits=self.hits,
            misses=self.misses,
            joined=self.joined,
            prefetched=self.prefetched,
            useful=self.useful,
            late=self.late,
            wasted=self.wasted,
            cancelled=self.cancelled,
            saved_seconds=self.saved_seconds,
            warmed=self.warmed,
            recalled=self.recalled,
            evictions=self.evictions,
            failures=self.failures,
            discarded=self.discarded,
            bytes_in=self.bytes_in,
            wait_seconds=self.wait_seconds,
            wait_median=median(waits) if waits else 0.0,
            wait_p99=p99,
        )
