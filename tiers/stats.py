"""Statistics of a tier: the counters and prefetch outcomes, which the tier changes under its lock, and a snapshot."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from .layout import ExpertKey

WAITS_KEPT = 65_536  # number of the latest waits, of which the median and the 99th percentile are computed
# upper bounds of the bins of the histogram of load times, in seconds: from a read from the page cache to a busy disk
LOAD_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class TierStats:
    """Snapshot of a tier: its counters, which are 0 when it is opened, and the state of its slots.

    A wait is a time during which a caller was blocked in ``acquire``, or during which a request of another process
    waited for records and held no lease.
    """

    name: str
    hits: int = 0
    misses: int = 0  # demands for records that were not READY: they began a load, or joined one
    joined: int = 0  # misses that joined a load which a prefetch or another demand had begun
    prefetched: int = 0  # prefetches whose read began; if it does not fail, each has one of the next four outcomes
    useful: int = 0  # the record was READY when a demand came, in this tier or in the tier above, which had copied it
    late: int = 0  # the record was still being read when a demand came
    # the record was evicted before any demand; if the tier above has a copy, it counts when it is read again
    wasted: int = 0
    cancelled: int = 0  # prefetch requests that were replaced or got no slot, before their read or during it
    saved_seconds: float = 0.0  # how much longer demands would have waited without useful and late prefetches
    warmed: int = 0  # records that the warm-up has loaded: the most used of earlier runs, or the rest where all fit
    recalled: int = 0  # records that the warm-up has loaded and a demand has used since
    evictions: int = 0
    failures: int = 0  # loads that ended with an error, and reads that failed but succeeded from a mirror
    discarded: int = 0  # copies or results discarded because the record was replaced while it was in use
    bytes_in: int = 0  # bytes that were loaded into this tier
    # number of loads for each bin of their duration; LOAD_BOUNDS are the upper bounds, and the last bin has none
    loads: tuple[int, ...] = (0,) * (len(LOAD_BOUNDS) + 1)
    load_seconds: float = 0.0  # total duration of the loads in ``loads``
    waits: int = 0
    wait_seconds: float = 0.0  # total duration of all waits
    slots: int = 0  # number of slots
    ready: int = 0  # number of slots that are READY
    leased: int | None = None  # number of READY slots that are leased; None in a daemon's client, which can't know it
    slot_bytes: int = 0  # size of all slots together, in bytes
    load_bounds: tuple[float, ...] = LOAD_BOUNDS  # upper bounds of the bins of ``loads``, in seconds
    wait_median: float = 0.0  # median of the latest waits, in seconds
    wait_p99: float = 0.0  # 99th percentile of the latest waits, in seconds

    @property
    def hit_ratio(self) -> float:
        """Hits divided by all demands; 0 before the first demand."""
        demands = self.hits + self.misses
        return self.hits / demands if demands else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return all fields and ``hit_ratio`` as a dictionary by name."""
        return asdict(self) | {"hit_ratio": self.hit_ratio}


class TierCounters:
    """The counters of a tier, which the tier changes under its lock. ``TierStats`` says what each of them counts."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hits = self.misses = self.joined = 0
        self.prefetched = self.useful = self.late = self.wasted = self.cancelled = 0
        self.saved_seconds = 0.0
        self.warmed = self.recalled = self.evictions = self.failures = self.discarded = self.bytes_in = 0
        self.loads = [0] * (len(LOAD_BOUNDS) + 1)
        self.load_seconds = 0.0
        self.waits, self.wait_seconds = 0, 0.0
        self._latest_waits = deque[float](maxlen=WAITS_KEPT)

    def count(
        self,
        *,
        joined: int = 0,
        prefetched: int = 0,
        cancelled: int = 0,
        wasted: int = 0,
        recalled: int = 0,
        evictions: int = 0,
        failures: int = 0,
        discarded: int = 0,
    ) -> None:
        """Count what has happened. A miss that has ``joined`` a load is counted as a miss, too.

        ``discarded`` copies were not used, because their records were replaced meanwhile.
        """
        self.joined += joined
        self.prefetched += prefetched
        self.cancelled += cancelled
        self.wasted += wasted
        self.recalled += recalled
        self.evictions += evictions
        self.failures += failures
        self.discarded += discarded

    def count_lookups(self, *, hits: int = 0, misses: int = 0) -> None:
        """Count records that were looked up."""
        self.hits += hits
        self.misses += misses

    def take_back_hits(self, hits: int) -> None:
        """Count so many of the earlier hits as discarded, because their records were replaced during their use."""
        self.hits -= hits
        self.discarded += hits

    def count_load(self, seconds: float) -> None:
        """Count a load that took ``seconds``."""
        self.loads[bisect_left(LOAD_BOUNDS, seconds)] += 1
        self.load_seconds += seconds

    def count_fill(self, nbytes: int, *, is_warmup: bool = False) -> None:
        """Count a slot that was filled with a record of ``nbytes``."""
        self.bytes_in += nbytes
        self.warmed += is_warmup

    def count_used_prefetch(self, saved_seconds: float, *, is_late: bool) -> None:
        """Count a prefetch whose record a demand uses, and how much longer the demand would have waited without it."""
        self.late += is_late
        self.useful += not is_late
        self.saved_seconds += saved_seconds

    def count_wait(self, seconds: float) -> None:
        """Count a wait of ``seconds``."""
        self.waits += 1
        self.wait_seconds += seconds
        self._latest_waits.append(seconds)

    def snapshot(self, *, slots: int, ready: int, leased: int | None, slot_bytes: int) -> TierStats:
        """Return a copy of the counters, together with the given state of the slots.

        The caller holds the tier's lock. The only work that takes time is to sort the latest waits.
        """
        waits = sorted(self._latest_waits)
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return TierStats(
            **counts | {"loads": tuple(self.loads)},
            slots=slots,
            ready=ready,
            leased=leased,
            slot_bytes=slot_bytes,
            wait_median=median(waits) if waits else 0.0,
            wait_p99=quantiles(waits, n=100)[98] if len(waits) > 1 else sum(waits),
        )


class PrefetchOutcomes:
    """Follows each prefetch from the beginning of its read until its record is used or evicted, and counts its outcome.

    Callers hold the tier's lock.
    """

    def __init__(self, counters: TierCounters, clock: Callable[[], float]) -> None:
        self._counters = counters
        self._clock = clock
        # by key: the time at which the read of a prefetch began that is in progress
        self._began: dict[ExpertKey, float] = {}
        # by key, the oldest first: the seconds that the read of a prefetched record took that was not used yet
        self._unused: dict[ExpertKey, float] = {}

    @property
    def unused(self) -> Collection[ExpertKey]:
        """Keys of the prefetched records that have arrived and were not used yet, the oldest first."""
        return self._unused.keys()

    def begin(self, key: ExpertKey) -> None:
        """Note that the read of a prefetch begins now."""
        self._began[key] = self._clock()

    def complete(self, key: ExpertKey) -> None:
        """Note that the record has arrived. It is ``unused`` from now on, unless a demand came while it was read."""
        if (began := self._began.pop(key, None)) is not None:
            self._unused[key] = self._clock() - began

    def abort(self, key: ExpertKey, *, is_cancelled: bool = False) -> None:
        """Note that the record will not arrive: its read has failed, or was cancelled, which is counted."""
        if self._began.pop(key, None) is not None:
            self._counters.count(cancelled=is_cancelled)

    def note_use(self, key: ExpertKey) -> None:
        """Note a demand for a record. If it is the first since the prefetch, count the prefetch as useful or late."""
        if (seconds := self._unused.pop(key, None)) is not None:
            self._counters.count_used_prefetch(seconds, is_late=False)
        elif (began := self._began.pop(key, None)) is not None:
            self._counters.count_used_prefetch(self._clock() - began, is_late=True)

    def evict(self, key: ExpertKey) -> None:
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


@dataclass(slots=True)
class ShareCounts:
    """Counts of the records that come from one place. They are fields of ``Share``."""

    records: int = 0
    bytes: int = 0
    computed: int = 0
    computed_bytes: int = 0

    def count(self, *, records: int = 0, bytes: int = 0, computed: int = 0, computed_bytes: int = 0) -> None:
        """Count what has come from the place."""
        self.records += records
        self.bytes += bytes
        self.computed += computed
        self.computed_bytes += computed_bytes

    def share(self, place: str, away: str = "", lost: int = 0) -> Share:
        """Return these counts, labelled with ``place``. ``away`` and ``lost`` are as in ``Share``."""
        return Share(place, away=away, lost=lost, **asdict(self))
