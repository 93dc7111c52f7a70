"""Prefetch queue and its outcomes: what is read before a demand comes, for requests and for the warm-up.

Part of the ledger: no I/O, and its owner's lock is held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moetier.tiers.cache.outcomes import PrefetchOutcomes
from moetier.tiers.layout import ExpertKey
from moetier.tiers.source import Pace, interruptible_bytes
from moetier.tiers.stats import TierCounters

from .demands import AsyncCaller, Pool, StagingBuffer
from .staging import StagingBuffers, buffer_bytes, piece_bytes

QUICK_SECONDS = 2e-3  # records that are read in less time are not staged


class Place(NamedTuple):
    """Where a record is to be read to."""

    pool: Pool
    key: ExpertKey
    slot: int | None  # None: a staging buffer
    is_warmup: bool


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
        # not begun, by caller and block; callers whose turn comes later are further behind
        self._waiting: dict[AsyncCaller | None, dict[int, tuple[Pool, deque[ExpertKey]]]] = {}
        self._latest: dict[int, dict[AsyncCaller | None, frozenset[ExpertKey]]] = {}  # begun or not, by block
        self._warmup: deque[tuple[Pool, ExpertKey]] = deque()  # not begun
        self._warmed: set[ExpertKey] = set()  # read or being read for the warm-up, and not used yet
        self._lent: set[ExpertKey] = set()  # to the tier above, which may have them still when they are evicted here

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def unbegun(self) -> int:
        """How many reads have not begun."""
        return sum(len(keys) for blocks in self._waiting.values() for _, keys in blocks.values()) + len(self._warmup)

    @property
    def readable(self) -> int:
        """How many reads loaders could begin or go on with."""
        return self.unbegun + sum([staged.is_idle and self.is_requested(staged.key) for staged in self.buffers or ()])

    def is_requested(self, key: ExpertKey) -> bool:
        """Whether any caller's latest requests name it, begun or not, here or not."""
        return any(key in keys for keys in self._latest.get(key.block, {}).values())

    def request(self, pool: Pool, block: int, keys: Sequence[ExpertKey], caller: AsyncCaller | None) -> bool:
        """Replace a caller's requests for a block. Return whether any record of them has no slot."""
        lacking = [key for key in keys if pool.slots.find(key) is None]
        latest = self._latest.setdefault(block, {})
        if keys:
            latest[caller] = frozenset(keys)
        else:
            latest.pop(caller, None)
        blocks = self._waiting.setdefault(caller, {})
        _, waiting = blocks.pop(block, (pool, ()))
        self._counters.cancelled += sum([key not in keys for key in waiting])
        if absent := [key for key in lacking if key not in (self.buffers or ())]:
            blocks[block] = (pool, deque(dict.fromkeys(absent)))
        if not blocks:
            del self._waiting[caller]
        return bool(lacking)

    def cancel(self, caller: AsyncCaller) -> None:
        """Cancel all requests of a caller."""
        for latest in self._latest.values():
            latest.pop(caller, None)
        self._counters.cancelled += sum(len(keys) for _, keys in self._waiting.pop(caller, {}).values())

    def warm(self, pool: Pool, keys: Sequence[ExpertKey]) -> None:
        """Read these behind all requests, each into an EMPTY slot of its group or not at all."""
        self._warmup.extend((pool, key) for key in keys)

    def clear(self) -> None:
        """Drop all requests that have not begun, and the warm-up."""
        self._warmup.clear()
        self.repair()

    def repair(self) -> None:
        """Drop all requests after a step that was cut."""
        self._waiting.clear()
        self._latest.clear()

    def take(self) -> Place | None:
        """Return what is to be read next, requests first; None if there is nothing that has a place.

        A request gets an EMPTY slot, else one that an earlier prefetch of any block filled in vain, else a staging
        buffer. Where records are not staged it gets a slot of its own group that is neither held nor requested. The
        warm-up evicts nothing. Pools where a demand is starved get nothing.
        """
        for caller, pool, key in self._take_waiting():
            is_staged = self.stages(pool)
            if pool.slots.find(key) is None and key not in (self.buffers or ()):
                slot = self._cheap_slot(pool, key) if is_staged else self.slot_for(pool, key)
                if slot is not None or is_staged:
                    self._waiting[caller] = self._waiting.pop(caller)  # the others' turns come before its next
                    self._counters.prefetched += 1
                    return Place(pool, key, slot, is_warmup=False)
                self._counters.cancelled += 1
        while self._warmup:
            pool, key = self._warmup.popleft()
            if pool.slots.find(key) is None and not pool.starved:
                slot = pool.policy.vacancy(key.block)
                if slot is not None:
                    return Place(pool, key, slot, is_warmup=True)
        return None

    def slot_for(self, pool: Pool, key: ExpertKey) -> int | None:
        """Return a slot for a prefetch: one that costs nothing, else one of its group, neither held nor requested."""
        slot = self._cheap_slot(pool, key)
        return pool.policy.choose(key.block, keep=self.is_requested) if slot is None else slot

    def _take_waiting(self) -> Iterator[tuple[AsyncCaller | None, Pool, ExpertKey]]:
        """Take requests one by one: callers by turns, and each one's blocks in the order in which they came."""
        for caller, blocks in list(self._waiting.items()):
            for block, (pool, keys) in list(blocks.items()):
                if pool.starved:
                    continue
                while keys:
                    yield caller, pool, keys.popleft()
                del blocks[block]
            if not blocks:
                del self._waiting[caller]

    def _cheap_slot(self, pool: Pool, key: ExpertKey) -> int | None:
        """Return an EMPTY slot, else that of an unused prefetch that is not requested any more."""
        if (slot := pool.policy.vacancy(key.block)) is not None:
            return slot
        for unused in self.outcomes.unused:
            slot = pool.slots.find(unused)
            if slot is not None and not self.is_requested(unused) and pool.slots.is_evictable(slot):
                return slot
        return None

    # -- staging ------------------------------------------------------------------------------------------------------

    def stages(self, pool: Pool) -> bool:
        """Whether records of the pool are staged: not where a read is over before pieces would pay."""
        seconds = pool.read_seconds
        return self.buffers is not None and (seconds is None or seconds >= QUICK_SECONDS)

    def make_room(self) -> bool:
        """Return whether a staging buffer is free, perhaps one whose record is not requested any more."""
        if self.buffers is None or self.buffers.has_room:
            return True
        self._counters.cancelled += self.buffers.discard(self.is_requested)
        return self.buffers.has_room

    def give_up(self, staged: StagingBuffer) -> None:
        """End a full buffer whose record found no slot, since others wait for its room."""
        assert self.buffers is not None
        self.buffers.end(staged)
        self._counters.cancelled += 1

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

    def begin(self, key: ExpertKey, began: float, *, is_warmup: bool) -> None:
        """Note that a record is being read into a slot for no demand."""
        if is_warmup:
            self._warmed.add(key)
        else:
            self.outcomes.begin(key, began)

    def fail(self, key: ExpertKey) -> None:
        """Note that the record does not come."""
        self._warmed.discard(key)
        self.outcomes.fail(key)

    def lend(self, key: ExpertKey) -> None:
        """Note that the tier above has borrowed the record."""
        self._lent.add(key)

    def use(self, key: ExpertKey) -> None:
        """Count a demand for the record, here or in the tier above."""
        self._lent.discard(key)
        if key in self._warmed:
            self._warmed.remove(key)
            self._counters.recalled += 1
        self.outcomes.use(key)

    def evict(self, key: ExpertKey) -> None:
        """Note that the record is evicted here; one that was lent may still be used in the tier above."""
        if key not in self._lent:
            self.lose(key)

    def lose(self, key: ExpertKey) -> None:
        """Note that the record is in no tier any more."""
        self._lent.discard(key)
        self._warmed.discard(key)
        self.outcomes.evict(key)
