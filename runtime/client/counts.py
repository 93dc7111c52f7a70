"""The counters of a tier whose callers share no lock."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from moetier.tiers.locks import Monitor
from moetier.tiers.stats import TierCounters, TierStats


class Counts:
    """Whoever counts never waits: a finalizer may."""

    def __init__(self, name: str) -> None:
        self._counters = TierCounters(name)
        self._monitor = Monitor()

    def add(self, *, hits: int = 0, misses: int = 0, discarded: int = 0, failures: int = 0) -> None:
        self._monitor.post(partial(self._add, hits, misses, discarded, failures))

    def waited(self, seconds: float) -> None:
        """Somebody, for a record."""
        self._monitor.post(partial(self._counters.waited, seconds))

    def snapshot(self, *, slots: int, ready: int, slot_bytes: int, reads: TierStats | None) -> TierStats:
        """With the ``reads`` of another tier. Raises ClosedError in a forked child."""
        take = partial(self._counters.snapshot, slots=slots, ready=ready, leased=None, slot_bytes=slot_bytes)
        stats = self._monitor.run(take)
        if reads is None:
            return stats
        return replace(stats, bytes_in=reads.bytes_in, loads=reads.loads, load_seconds=reads.load_seconds)

    def _add(self, hits: int, misses: int, discarded: int, failures: int) -> None:
        self._counters.hits += hits
        self._counters.misses += misses
        self._counters.discarded += discarded
        self._counters.failures += failures
