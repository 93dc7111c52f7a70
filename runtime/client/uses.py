"""Counts of a daemon's client, which it reports to the daemon: demands, hits, and uses of copies."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters, TierStats

from .daemon_link import Link


class ClientUses:
    """The ``CopyUses`` of a client. Thread-safe.

    Both sets change without a lock: each call of a set's method is atomic, and if two threads compute one block, at
    most a use or the end of a prefetch is reported twice.
    """

    def __init__(self, link: Link) -> None:
        """``link`` reports to the daemon."""
        self._link = link
        self._prefetching: set[int] = set()  # blocks whose prefetch requests the daemon may still have to serve
        self._copied: set[ExpertKey] = set()  # keys pinned for a copy, and not reported as used since then
        self._counting = threading.Lock()  # guards: ``_counters``. No finalizer takes it
        self._counters = TierCounters("daemon")

    def note_demand(
        self, block: int, hits: Sequence[ExpertKey], misses: Sequence[ExpertKey], *, is_part: bool = False
    ) -> None:
        """Count a demand for ``hits``, which the arena has, and ``misses``. Report the hits.

        ``is_part``: the caller acquires further records of the block; until then its prefetch requests stay.
        """
        self._copied.difference_update([*hits, *misses])  # reported in any case: misses by their request
        if hits:
            self._link.report_uses(reversed(hits))
        if not is_part and block in self._prefetching:
            self._prefetching.discard(block)
            if not misses:  # with misses, their request tells the daemon that the demand has come
                self._link.prefetch(block, [])
        with self._counting:
            self._counters.count(hits=len(hits), misses=len(misses))

    def note_found(self, block: int, experts: Sequence[int]) -> None:
        """Count and report a demand, as ``ResidentUses`` specifies."""
        self.note_demand(block, [ExpertKey(block, expert) for expert in dict.fromkeys(experts)], ())

    def note_discarded(self, block: int, experts: Sequence[int]) -> None:
        """Count the hits of an earlier ``note_found`` as discarded, as ``ResidentUses`` specifies."""
        self.count(discarded=len(set(experts)))

    def touch(self, block: int, experts: Sequence[int]) -> None:
        """Report uses to the daemon, which counts them as hits, so that it keeps the records. Counts nothing here."""
        self._link.report_uses([ExpertKey(block, expert) for expert in reversed(experts)])

    def note_lost(self, hits: int) -> None:
        """Count hits as discarded, because their records were replaced during their use. They are requested now."""
        with self._counting:
            self._counters.count(discarded=hits, misses=hits)

    def note_copy(self, key: ExpertKey) -> None:
        """Note that the tier above copies a record. Its next use is reported."""
        self._copied.add(key)

    def forget_copy(self, key: ExpertKey) -> None:
        """Note that a copy has failed."""
        self._copied.discard(key)

    def note_copies(self, keys: Sequence[ExpertKey]) -> None:
        """Report uses of copies, as ``CopyUses`` specifies: each key once after its record was pinned for a copy.

        The daemon counts the reported uses as hits.
        """
        unreported = [key for key in keys if key in self._copied]
        self._copied.difference_update(unreported)
        if unreported:
            self._link.report_uses(unreported)

    def prefetch(self, block: int, experts: Sequence[int], *, is_needed: bool) -> None:
        """Send prefetch requests, unless none ``is_needed`` and no earlier request for the block may be open."""
        if is_needed:
            self._prefetching.add(block)
        elif block in self._prefetching:
            self._prefetching.discard(block)
        else:
            return
        self._link.prefetch(block, experts)

    def count(self, *, discarded: int = 0, failures: int = 0, waited: float | None = None) -> None:
        """Count uses of records that were replaced meanwhile, failures, and a wait.

        ``waited`` is how long a caller has waited for the daemon, in seconds.
        """
        with self._counting:
            self._counters.count(discarded=discarded, failures=failures)
            if waited is not None:
                self._counters.count_wait(waited)

    def stats(self, *, slots: int, ready: int, memory_bytes: int) -> TierStats:
        """Return the counters, with the present state of the slots."""
        with self._counting:
            return self._counters.snapshot(slots=slots, ready=ready, leased=None, memory_bytes=memory_bytes)
