"""Uses of records: by demands of the host tier, and by callers that find records without a demand of this tier.

Compiled code finds records in the arena's directory, and so do clients of a daemon; other demands find copies in the
tier above. ``Uses`` is a part of the ledger: its callers hold the host tier's lock. ``HostUses`` has the transitions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from moetier.tiers.cache.pool import Lookup
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, deferred, transition
from moetier.tiers.stats import TierCounters

from .demands import Pool
from .prefetch import PrefetchQueue


class Uses:
    """Counts uses, and lets them count in outcomes of prefetches and in the order of eviction.

    Args:
        pool_of: for each block, the pool of its records.
        counters: the tier's counters.
        prefetches: the queue of prefetches.
    """

    def __init__(self, pool_of: Sequence[Pool], counters: TierCounters, prefetches: PrefetchQueue) -> None:
        self._pool_of = pool_of
        self._counters = counters
        self._prefetches = prefetches
        self._counts = Counter[ExpertKey]()

    def counts(self) -> dict[ExpertKey, int]:
        """Return a dictionary from each key to the number of its uses."""
        return dict(self._counts)

    def note_demand(self, hits: Collection[ExpertKey], misses: Collection[ExpertKey]) -> None:
        """Note a demand of the host tier: for ``hits``, whose records are READY, and ``misses``."""
        self._counts.update([*hits, *misses])
        self._counters.count(hits=len(hits), misses=len(misses))
        self._prefetches.mark_used(hits)

    def note_found(self, block: int, experts: Sequence[int]) -> None:
        """Note a use of ``experts`` by compiled code of this process, which has found all of them. Each is a hit."""
        pool = self._pool_of[block]
        keys = [ExpertKey(block, expert) for expert in dict.fromkeys(experts)]
        self._prefetches.replace(pool, block, (), None)
        self._counts.update(keys)
        self._counters.count(hits=len(keys))
        cached = [key for key in keys if pool.lookup(key) is Lookup.HIT]  # others were evicted since
        self._prefetches.mark_used(cached)
        pool.partitions.touch(reversed(cached), is_scan=len(keys) > pool.partitions.quota(block))

    def take_back(self, experts: Sequence[int]) -> None:
        """Count hits of ``note_found`` as discarded, because records were replaced during their use."""
        self._counters.take_back_hits(len(set(experts)))

    def touch(self, block: int, experts: Sequence[int]) -> None:
        """Let records of a block be evicted as late as after a demand that uses them."""
        pool = self._pool_of[block]
        keys = (ExpertKey(block, expert) for expert in reversed(experts))
        pool.partitions.touch(key for key in keys if pool.lookup(key) is Lookup.HIT)

    def note_client(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses by another process, which has found the records of ``keys``, in this order. Each is a hit."""
        self._counters.count(hits=len(keys))
        self._counts.update(keys)
        for key in keys:
            pool = self._pool_of[key.block]
            if pool.slot_of(key) is not None:
                pool.partitions.touch((key,))
                self._prefetches.mark_used((key,))

    def note_copies(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses of copies in the tier above. They are hits of that tier, not of this one."""
        self._prefetches.mark_used(keys)
        self._counts.update(keys)


class HostUses:
    """The ``CopyUses`` of a host tier, which also returns what was counted."""

    def __init__(self, monitor: Monitor, uses: Uses) -> None:
        self._monitor = monitor
        self._uses = uses

    @deferred
    def note(self, block: int, experts: Sequence[int]) -> None:
        """Count a demand, as ``ResidentUses`` specifies."""
        self._uses.note_found(block, experts)

    @deferred
    def take_back(self, block: int, experts: Sequence[int]) -> None:
        """Count the hits of an earlier ``note`` as discarded, as ``ResidentUses`` specifies."""
        self._uses.take_back(experts)

    @deferred
    def touch(self, block: int, experts: Sequence[int]) -> None:
        """Let records stay in memory, as ``ResidentUses`` specifies."""
        self._uses.touch(block, experts)

    @transition
    def note_copies(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses in the tier above, as ``CopyUses`` specifies. The result of ``counts`` includes them."""
        self._uses.note_copies(keys)

    @transition
    def counts(self) -> dict[ExpertKey, int]:
        """Return a dictionary from each key to the number of its uses."""
        return self._uses.counts()
