"""Prefetch outcomes: whether prefetched records were useful, late or wasted. Its owner's lock is held."""

from __future__ import annotations

from collections.abc import Callable

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters


class PrefetchOutcomes:
    """Prefetches that have begun, each until its record is first used or is lost. Counts what became of them.

    ``began`` has those under way, with the time of their begin. ``unused`` has the records that are there, the oldest
    first, with the seconds that their prefetch took.
    """

    def __init__(self, counters: TierCounters, clock: Callable[[], float]) -> None:
        self._counters = counters
        self._clock = clock
        self.began: dict[ExpertKey, float] = {}
        self.unused: dict[ExpertKey, float] = {}

    def arrive(self, key: ExpertKey) -> None:
        """Note that the record is there; it is unused if no demand came meanwhile."""
        if (began := self.began.pop(key, None)) is not None:
            self.unused[key] = self._clock() - began

    def use(self, key: ExpertKey) -> None:
        """Count the first demand for a record that was prefetched, or is on its way."""
        if (seconds := self.unused.pop(key, None)) is not None:
            self._counters.useful += 1
            self._counters.saved_seconds += seconds
        elif (began := self.began.pop(key, None)) is not None:
            self.late(self._clock() - began)

    def late(self, seconds: float) -> None:
        """Count a demand for a record of which ``seconds`` had been read."""
        self._counters.late += 1
        self._counters.saved_seconds += seconds

    def evict(self, key: ExpertKey) -> None:
        """Note that the record is gone. A prefetch that brought it for no demand was wasted."""
        if self.unused.pop(key, self.began.pop(key, None)) is not None:
            self._counters.wasted += 1

    def repair(self, find: Callable[[ExpertKey], int | None]) -> None:
        """Drop records without a slot, after a step that was cut."""
        for known in (self.began, self.unused):
            for key in [key for key in known if find(key) is None]:
                del known[key]
