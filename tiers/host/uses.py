"""Uses of records: by demands of the host tier, and by callers that find records without a demand of this tier.

Compiled code finds records in the arena's directory, and so do clients of a daemon; other demands find copies in the
tier above. Callers hold the host tier's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from moetier.tiers.layout import ExpertKey
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
        self._counters.count_lookups(hits=len(hits), misses=len(misses))
        self._prefetches.note_uses(hits)

    def note_uses(self, block: int, experts: Sequence[int]) -> None:
        """Note a use of ``experts`` by compiled code of this process, which has found all of them. Each is a hit."""
        pool = self._pool_of[block]
        keys = [ExpertKey(block, expert) for expert in dict.fromkeys(experts)]
        self._prefetches.replace(pool, block, (), None)
        self._counts.update(keys)
        self._counters.count_lookups(hits=len(keys))
        cached = [key for key in keys if pool.is_ready(key)]  # others were evicted since
        self._prefetches.note_uses(cached)
        pool.touch(reversed(cached), is_scan=len(keys) > pool.quota(block))

    def touch(self, block: int, experts: Sequence[int]) -> None:
        """Let records of a block be evicted as late as after a demand that uses them."""
        pool = self._pool_of[block]
        pool.touch(key for expert in reversed(experts) if pool.is_ready(key := ExpertKey(block, expert)))

    def take_back_uses(self, experts: Sequence[int]) -> None:
        """Count hits of ``note_uses`` as discarded, because records were replaced during their use."""
        self._counters.take_back_hits(len(set(experts)))

    def note_client_uses(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses by another process, which has found the records of ``keys``, in this order. Each is a hit."""
        self._counters.count_lookups(hits=len(keys))
        self._counts.update(keys)
        for key in keys:
            pool = self._pool_of[key.block]
            if pool.slot_of(key) is not None:
                pool.touch((key,))
                self._prefetches.note_uses((key,))

    def note_copy_uses(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses of copies in the tier above. They are hits of that tier, not of this one."""
        self._prefetches.note_uses(keys)
        self._counts.update(keys)
