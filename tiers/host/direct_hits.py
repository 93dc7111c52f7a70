"""Direct hits: uses of records that were found without a demand of the host tier.

Compiled code finds records in the arena's directory, and so do clients of a daemon; other demands find copies in the
tier above. Callers hold the host tier's lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters

from .demands import Pool
from .prefetch import PrefetchQueue


class DirectHits:
    """Counts direct hits, and lets them count in outcomes of prefetches and in the order of eviction.

    Args:
        pool_of: for each block, the pool of its records.
        counters: the tier's counters.
        prefetches: the queue of prefetches.
    """

    def __init__(self, pool_of: Sequence[Pool], counters: TierCounters, prefetches: PrefetchQueue) -> None:
        self._pool_of = pool_of
        self._counters = counters
        self._prefetches = prefetches
        self.uses = Counter[ExpertKey]()  # number of uses of each key, those by demands of this tier among them

    def count_hits(self, block: int, experts: Sequence[int]) -> None:
        """Count a use of ``experts`` by compiled code of this process, which has found all of them. Each is a hit."""
        pool = self._pool_of[block]
        keys = [ExpertKey(block, expert) for expert in dict.fromkeys(experts)]
        self._prefetches.replace(pool, block, (), None)
        self.uses.update(keys)
        self._counters.count_lookups(hits=len(keys))
        cached = [key for key in keys if pool.is_ready(key)]  # others were evicted since
        self._prefetches.use(cached)
        pool.touch(reversed(cached), is_scan=len(keys) > pool.quota(block))

    def discard_hits(self, experts: Sequence[int]) -> None:
        """Count hits of ``count_hits`` as discarded, because records were replaced during their use."""
        self._counters.count_lookups(discarded=len(set(experts)))

    def count_demand(self, keys: Sequence[ExpertKey]) -> None:
        """Count uses by a demand of this tier, which counts its hits and misses itself."""
        self.uses.update(keys)

    def count_client_hits(self, keys: Sequence[ExpertKey]) -> None:
        """Count hits of another process, which has used the records of ``keys`` in this order."""
        self._counters.count_lookups(hits=len(keys))
        self.uses.update(keys)
        for key in keys:
            pool = self._pool_of[key.block]
            if pool.slot_of(key) is not None:
                pool.touch((key,))
                self._prefetches.use((key,))

    def count_copy_uses(self, keys: Sequence[ExpertKey]) -> None:
        """Count uses of copies in the tier above. They are hits of that tier, not of this one."""
        self._prefetches.use(keys)
        self.uses.update(keys)
