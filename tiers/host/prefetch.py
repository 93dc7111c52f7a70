"""Prefetch queue and its outcomes: what is read before a demand comes, for requests and for the warm-up.

Part of the ledger: no I/O, and its owner's lock is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from moetier.tiers.cache.outcomes import PrefetchOutcomes
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Pace, interruptible_bytes
from moetier.tiers.stats import TierCounters

from .demands import AsyncCaller, Pool
from .staging import StagingBuffers, buffer_bytes, piece_bytes

QUICK_SECONDS = 2e-3  # records that are read in less time are not staged


class Place(NamedTuple):
    """The place that a record is to be read to."""

    pool: Pool
    key: ExpertKey
    slot: int | None  # None: a staging buffer
    is_warmup: bool


class Request(NamedTuple):
    """The latest request of a caller for a block."""

    pool: Pool
    keys: frozenset[ExpertKey]  # begun or not, here or not
    unbegun: deque[ExpertKey]


class PrefetchQueue:
    """Each caller's latest requests for each block; those of the tier's own process come from the caller None.

    Without ``buffers`` a prefetch evicts as soon as its read begins.
    """

    def __init__(
        self, counters: TierCounters, clock: Callable[[], float], buffers: StagingBuffers | None = None
    ) -> None:
        self.buffers = buffers
        self.outcomes = PrefetchOutcomes(counters, clock)
        self._counters = counters
        # by caller and block; the caller that was served last is last
        self._requests: dict[AsyncCaller | None, dict[int, Request]] = {}
        self.warmup: deque[tuple[Pool, ExpertKey]] = deque()  # not begun
        self.warmed: set[ExpertKey] = set()  # read or being read for the warm-up, and not used yet
        self.lent: set[ExpertKey] = set()  # to the tier above, which may have them still when they are evicted here

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def unbegun(self) -> int:
        """Number of reads that have not begun."""
        requests = [request for blocks in self._requests.values() for request in blocks.values()]
        return sum([len(request.unbegun) for request in requests]) + len(self.warmup)

    @property
    def readable(self) -> int:
        """Number of reads that loaders could begin or go on with."""
        return self.unbegun + sum([staged.is_idle and self.is_requested(staged.key) for staged in self.buffers or ()])

    def is_requested(self, key: ExpertKey) -> bool:
        """Return whether any caller's latest requests name it, begun or not, here or not."""
        found = [blocks[key.block] for blocks in self._requests.values() if key.block in blocks]
        return any(key in request.keys for request in found)

    def request(self, pool: Pool, block: int, keys: Sequence[ExpertKey], caller: AsyncCaller | None) -> bool:
        """Replace a caller's requests for a block. Return whether any record of them has no slot."""
        blocks = self._requests.setdefault(caller, {})
        if (before := blocks.pop(block, None)) is not None:
            self._counters.cancelled += sum([key not in keys for key in before.unbegun])
        if not keys:
            return False
        lacking = [key for key in keys if pool.find(key) is None]
        unbegun = dict.fromkeys(key for key in lacking if key not in (self.buffers or ()))
        blocks[block] = Request(pool, frozenset(keys), deque(unbegun))
        return bool(lacking)

    def cancel(self, caller: AsyncCaller) -> None:
        """Cancel all requests of a caller."""
        requests = self._requests.pop(caller, {}).values()
        self._counters.cancelled += sum([len(request.unbegun) for request in requests])

    def repair(self) -> None:
        """Drop all requests, after a step that was cut."""
        self._requests.clear()

    def take(self) -> Place | None:
        """Return what is to be read next, requests first; None if there is nothing that has a place.

        A request gets an EMPTY slot, else one that an earlier prefetch of any block filled in vain, else a staging
        buffer. Where records are not staged it gets a slot of its own group that is neither held nor requested. The
        warm-up evicts nothing. Pools where a demand is starved get nothing.
        """
        for caller, pool, key in self._take_requests():
            is_staged = self.stages(pool)
            if pool.find(key) is None and key not in (self.buffers or ()):
                slot = self._cheap_slot(pool, key) if is_staged else self.slot_for(pool, key)
                if slot is not None or is_staged:
                    self._requests[caller] = self._requests.pop(caller)  # the others' turns come before its next
                    self._counters.prefetched += 1
                    return Place(pool, key, slot, is_warmup=False)
                self._counters.cancelled += 1
        while self.warmup:
            pool, key = self.warmup.popleft()
            if pool.find(key) is None and not pool.starved:
                slot = pool.vacancy(key.block)
                if slot is not None:
                    return Place(pool, key, slot, is_warmup=True)
        return None

    def slot_for(self, pool: Pool, key: ExpertKey) -> int | None:
        """Return a slot for a prefetch: one that costs nothing, else one of its group, neither held nor requested."""
        slot = self._cheap_slot(pool, key)
        return pool.choose(key.block, keep=self.is_requested) if slot is None else slot

    def _take_requests(self) -> Iterator[tuple[AsyncCaller | None, Pool, ExpertKey]]:
        """Take requests one by one: callers by turns, and each one's blocks in the order in which they came."""
        for caller, blocks in list(self._requests.items()):
            for request in blocks.values():
                while request.unbegun and not request.pool.starved:
                    yield caller, request.pool, request.unbegun.popleft()

    def _cheap_slot(self, pool: Pool, key: ExpertKey) -> int | None:
        """Return an EMPTY slot, else that of an unused prefetch that is not requested any more."""
        if (slot := pool.vacancy(key.block)) is not None:
            return slot
        for unused in self.outcomes.unused:
            slot = pool.find(unused)
            if slot is not None and not self.is_requested(unused) and pool.is_evictable(slot):
                return slot
        return None

    # -- staging ------------------------------------------------------------------------------------------------------

    def stages(self, pool: Pool) -> bool:
        """Return whether records of the pool are staged: not where a read is over before pieces would pay."""
        seconds = pool.read_seconds
        return self.buffers is not None and (seconds is None or seconds >= QUICK_SECONDS)

    def make_room(self) -> bool:
        """Return whether a staging buffer is free, perhaps one whose record is not requested any more."""
        if self.buffers is None or self.buffers.has_room:
            return True
        self._counters.cancelled += self.buffers.discard(self.is_requested)
        return self.buffers.has_room

    def pace(self, pool: Pool) -> Pace | None:
        """Return how long reads of the pool's records take; None where too little is known."""
        read, whole, counted = pool.read_seconds, pool.slot_bytes, self._counters
        if read is None or not (right := counted.useful + counted.late):
            return None
        saved = counted.saved_seconds / right
        if not self.stages(pool):
            return Pace(read, read * interruptible_bytes(whole) / whole, saved)
        return Pace(read, read * piece_bytes(whole, read) / whole, saved, read * buffer_bytes(whole) / whole)

    # -- outcomes -----------------------------------------------------------------------------------------------------

    def fail(self, key: ExpertKey) -> None:
        """Note that the record does not come."""
        self.warmed.discard(key)
        self.outcomes.began.pop(key, None)

    def use(self, keys: Iterable[ExpertKey]) -> None:
        """Count demands for records, here or in the tier above."""
        for key in keys:
            self.lent.discard(key)
            if key in self.warmed:
                self.warmed.remove(key)
                self._counters.recalled += 1
            if key in self.outcomes.unused or key in self.outcomes.began:
                self.outcomes.use(key)

    def evict(self, key: ExpertKey) -> None:
        """Note that the record is evicted here; one that was lent may still be used in the tier above."""
        if key not in self.lent:
            self.lose(key)

    def lose(self, key: ExpertKey) -> None:
        """Note that the record is in no tier any more."""
        self.lent.discard(key)
        self.warmed.discard(key)
        self.outcomes.evict(key)
