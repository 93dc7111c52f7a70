"""Prefetch outcomes: whether prefetched records were useful, late or wasted. Its owner's lock is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters


class PrefetchOutcomes:
    """Prefetches that have begun, each until its record is first used or is lost. Counts what became of them."""

    def __init__(self, counters: TierCounters, clock: Callable[[], float]) -> None:
        self._counters = counters
        self._clock = clock
        self._began: dict[ExpertKey, float] = {}  # under way: seconds, by the clock
        self._unused: dict[ExpertKey, float] = {}  # there: seconds that the prefetch took

    @property
    def unused(self) -> Iterator[ExpertKey]:
        """Records that are there and have not been used, from the oldest."""
        return iter(self._unused)

    def begin(self, key: ExpertKey, began: float) -> None:
        """Note that a prefetch is under way since ``began``."""
        self._began[key] = began

    def arrive(self, key: ExpertKey) -> None:
        """Note that the record is there; it is unused if no demand came meanwhile."""
        if (began := self._began.pop(key, None)) is not None:
            self._unused[key] = self._clock() - began

    def use(self, key: ExpertKey) -> None:
        """Count the first demand for a record that was prefetched, or is on its way."""
        if (seconds := self._unused.pop(key, None)) is not None:
            self._counters.useful += 1
            self._counters.saved_seconds += seconds
        elif (began := self._began.pop(key, None)) is not None:
            self.late(self._clock() - began)

    def late(self, seconds: float) -> None:
        """Count a demand for a record of which ``seconds`` had been read."""
        self._counters.late += 1
        self._counters.saved_seconds += seconds

    def fail(self, key: ExpertKey) -> None:
        """Note that the record does not come."""
        self._began.pop(key, None)

    def evict(self, key: ExpertKey) -> None:
        """Note that the record is gone. A prefetch that brought it for no demand was wasted."""
        if self._unused.pop(key, self._began.pop(key, None)) is not None:
            self._counters.wasted += 1

    def repair(self, find: Callable[[ExpertKey], int | None]) -> None:
        """Drop records without a slot, after a step that was cut."""
        for known in (self._began, self._unused):
            for key in [key for key in known if find(key) is None]:
                del known[key]
