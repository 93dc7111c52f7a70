"""Prefetch outcomes: whether prefetched records were useful, late or wasted. Callers hold the tier's lock."""

from __future__ import annotations

from collections.abc import Callable

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters


class PrefetchOutcomes:
    """Track each prefetch from its begin until its record is used or evicted, and count the outcome.

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
