"""Uses of records, which decide whether a prefetch was useful and which record is evicted next.

A use is a demand of the host tier, or a record that is found without one: compiled code and clients of a daemon find
records in the arena's directory, other demands find copies in the tier above.

``Uses`` is a part of the ledger: callers hold the tier's lock, and it does no I/O. ``HostUses`` takes the lock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from moetier.tiers.cache.pool import SlotState
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
        self._prefetches.note_uses(hits)

    def note_found(self, block: int, experts: Sequence[int]) -> None:
        """Note a use of ``experts`` by compiled code of this process, which has found all of them. Each is a hit."""
        pool = self._pool_of[block]
        keys = [ExpertKey(block, expert) for expert in dict.fromkeys(experts)]
        self._prefetches.cancel_block(pool, block, None)
        self._counts.update(keys)
        self._counters.count(hits=len(keys))
        cached = [key for key in keys if pool.state_of(key) is SlotState.READY]  # others were evicted since
        self._prefetches.note_uses(cached)
        pool.partitions.touch(reversed(cached), is_scan=pool.partitions.is_scan(block, len(keys)))

    def note_discarded(self, experts: Sequence[int]) -> None:
        """Count hits of ``note_found`` as discarded, too, because records were replaced during their use."""
        self._counters.count(discarded=len(set(experts)))

    def touch(self, block: int, experts: Sequence[int]) -> None:
        """Let records of a block be evicted as late as after a demand that uses them."""
        pool = self._pool_of[block]
        keys = (ExpertKey(block, expert) for expert in reversed(experts))
        pool.partitions.touch(key for key in keys if pool.state_of(key) is SlotState.READY)

    def note_client(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses by another process, which has found the records of ``keys``, in this order. Each is a hit."""
        self._counters.count(hits=len(keys))
        self._counts.update(keys)
        for key in keys:
            pool = self._pool_of[key.block]
            if pool.slot_of(key) is not None:
                pool.partitions.touch((key,))
                self._prefetches.note_uses((key,))

    def note_copies(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses of copies in the tier above. They are hits of that tier, not of this one."""
        self._prefetches.note_uses(keys)
        self._counts.update(keys)


class HostUses:
    """The ``CopyUses`` of a host tier, which also returns what was counted."""

    def __init__(self, monitor: Monitor, uses: Uses) -> None:
        self._monitor = monitor
        self._uses = uses

    @deferred
    def note_found(self, block: int, experts: Sequence[int]) -> None:
        """Count a demand, as ``ResidentUses`` specifies."""
        self._uses.note_found(block, experts)

    @deferred
    def note_discarded(self, block: int, experts: Sequence[int]) -> None:
        """Count the hits of an earlier ``note_found`` as discarded, as ``ResidentUses`` specifies."""
        self._uses.note_discarded(experts)

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
