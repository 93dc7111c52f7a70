"""Uses of records: counters of hits, outcomes of prefetches, and the order of eviction.

This module is a part of the ledger: callers hold the tier's lock. The ledger counts the uses of its own demands with
``count``. The other methods are for uses without a demand: of records that were found in the arena's directory, or in
the tier above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters

from .demands import Pool
from .prefetch import PrefetchQueue


class Uses:
    """Uses of a tier's records.

    Args:
        pool_of: for each block, the pool of its records.
        counters: the tier's counters.
        prefetches: the queue of prefetches.
    """

    def __init__(self, pool_of: Sequence[Pool], counters: TierCounters, prefetches: PrefetchQueue) -> None:
        self._pool_of = pool_of
        self._counters = counters
        self._prefetches = prefetches
        self._by_key: Counter[ExpertKey] | None = None  # number of demands for each key; None until this is counted

    def by_key(self) -> dict[ExpertKey, int]:
        """Return a dictionary from each key to the number of demands for it. Counting begins with the first call."""
        if self._by_key is None:
            self._by_key = Counter()
        return dict(self._by_key)

    def count(self, keys: Iterable[ExpertKey]) -> None:
        """Count a demand for ``keys`` in what ``by_key`` returns, and nowhere else."""
        if self._by_key is not None:
            self._by_key.update(list(keys))

    def found(self, block: int, experts: Sequence[int]) -> None:
        """Count a demand of this process that has found all of its records in the directory. Each record is a hit."""
        pool = self._pool_of[block]
        keys = [ExpertKey(block, expert) for expert in dict.fromkeys(experts)]
        self._prefetches.request(pool, block, (), None)
        self.count(keys)
        self._counters.hits += len(keys)
        here = [key for key in keys if pool.holds(key)]  # other records were evicted since the demand found them
        self._prefetches.use(here)
        pool.touch(reversed(here), scan=len(keys) > pool.quota(block))

    def take_back(self, experts: Sequence[int]) -> None:
        """Count the hits of an earlier ``found`` as discarded, because records were replaced during their use."""
        count = len(set(experts))
        self._counters.hits -= count
        self._counters.discarded += count

    def found_elsewhere(self, key: ExpertKey) -> None:
        """Count a hit of another process, which has found the record of ``key`` in the directory and used it."""
        pool = self._pool_of[key.block]
        self._counters.hits += 1
        self.count((key,))
        if pool.find(key) is not None:
            pool.touch((key,))
            self._prefetches.use((key,))

    def above(self, keys: Sequence[ExpertKey]) -> None:
        """Count uses of the records of ``keys``, which demands have found in the tier above."""
        self._prefetches.use(keys)
        self.count(keys)
