"""The prefetch queue: records that are to be read before a demand comes, for prefetch requests and for the warm-up.

This module is a part of the ledger: callers hold the tier's lock, and it does no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from moetier.tiers.layout import ExpertKey, PoolSlot
from moetier.tiers.stats import PrefetchOutcomes, TierCounters

from .demands import Caller, Pool, Purpose


class NextRead(NamedTuple):
    """A record that is to be read, and the slot for it."""

    pool: Pool
    key: ExpertKey
    slot: PoolSlot
    purpose: Purpose  # the record is read for a prefetch request or for the warm-up
    is_scan: bool = False  # the request is for more records than the block can keep


@dataclass(slots=True)
class BlockRequests:
    """The latest prefetch requests of a caller for a block."""

    pool: Pool
    keys: frozenset[ExpertKey]  # all requested keys, even if their records are READY or being read
    unbegun: deque[ExpertKey]  # the requested keys whose reads have not begun
    is_scan: bool  # a demand or requests since then were for more records than the block can keep


class PrefetchQueue:
    """The latest prefetch requests of each caller for each block. The caller None is the tier's own process."""

    def __init__(self, counters: TierCounters, clock: Callable[[], float]) -> None:
        self._outcomes = PrefetchOutcomes(counters, clock)
        self._counters = counters
        # a dictionary from caller to a dictionary from block to requests; the caller that was served last comes last
        self._requests: dict[Caller | None, dict[int, BlockRequests]] = {}
        self._warmup: deque[tuple[Pool, ExpertKey]] = deque()  # records for the warm-up whose reads have not begun
        self._warmed: set[ExpertKey] = set()  # records that the warm-up has begun to read and no demand has used yet
        self._copied: set[ExpertKey] = set()  # records of which the tier above may have a copy, even after an eviction

    # -- requests -----------------------------------------------------------------------------------------------------

    @property
    def unbegun(self) -> int:
        """Number of records whose reads, for requests or for the warm-up, have not begun."""
        requests = [request for blocks in self._requests.values() for request in blocks.values()]
        return sum([len(request.unbegun) for request in requests]) + len(self._warmup)

    def is_requested(self, key: ExpertKey) -> bool:
        """Return whether a record is among the latest requests of a caller, even if it is READY or being read."""
        requests = [blocks[key.block] for blocks in self._requests.values() if key.block in blocks]
        return any(key in request.keys for request in requests)

    def replace(self, pool: Pool, block: int, keys: Collection[ExpertKey], caller: Caller | None) -> bool:
        """Replace a caller's requests for a block by requests for ``keys``, which are distinct.

        Return whether a requested record has no slot.
        """
        blocks, requested = self._requests.setdefault(caller, {}), frozenset(keys)
        if (before := blocks.pop(block, None)) is not None:
            self._outcomes.note_dropped(sum([key not in requested for key in before.unbegun]))
        if not requested:
            return False
        absent = deque([key for key in keys if pool.slot_of(key) is None])
        is_scan = pool.partitions.is_scan(block, len(requested)) or (before is not None and before.is_scan)
        blocks[block] = BlockRequests(pool, requested, absent, is_scan)
        return bool(absent)

    def cancel_block(self, pool: Pool, block: int, caller: Caller | None) -> None:
        """Cancel a caller's requests for a block, because its demand for the block has come."""
        self.replace(pool, block, (), caller)

    def begin_scan(self, pool: Pool, block: int, caller: Caller | None) -> None:
        """Let a caller's requests for a block be those of a scan, until it has none any more."""
        blocks = self._requests.setdefault(caller, {})
        before = blocks.get(block, BlockRequests(pool, frozenset(), deque(), is_scan=True))
        blocks[block] = replace(before, is_scan=True)

    def cancel(self, caller: Caller) -> None:
        """Cancel all requests of a caller."""
        requests = self._requests.pop(caller, {}).values()
        self._outcomes.note_dropped(sum([len(request.unbegun) for request in requests]))

    def queue_warmup(self, pool: Pool, keys: Iterable[ExpertKey]) -> None:
        """Queue records for the warm-up, behind all requests."""
        self._warmup.extend((pool, key) for key in keys)

    def clear(self) -> None:
        """Remove all requests, and the records for the warm-up, because the tier is closed."""
        self._requests.clear()
        self._warmup.clear()

    def repair(self, slot_of: Callable[[ExpertKey], object]) -> None:
        """Remove all requests, and records that are in neither tier, because a transition was interrupted.

        ``slot_of`` returns the slot of a key, or None.
        """
        self._requests.clear()
        self._outcomes.repair(lambda key: key in self._copied or slot_of(key) is not None)
        self._warmed = {key for key in self._warmed if key in self._copied or slot_of(key) is not None}

    def next_read(self) -> NextRead | None:
        """Choose the next record to read, and the slot for it. Return None if there is nothing to read.

        Requests come before the warm-up. A requested record gets the first of these slots that exists:

        1. an EMPTY slot, if its partition has fewer slots than its quota;
        2. the slot of a prefetched record, of any block, that was not used and is no longer requested;
        3. in a scan, such as a long prompt: an EMPTY slot even if its partition has used up its quota, or the slot of a
           scanned record of any partition. So all the slots that scans use serve the next block of a prompt;
        4. the slot of a record of its own partition that is neither pinned nor requested.

        If there is no such slot, the request is dropped. A record of the warm-up gets only an EMPTY slot. Nothing is
        read into a pool in which a demand waits for a slot.
        """
        for caller, request, key in self._take_requests():
            pool = request.pool
            if pool.slot_of(key) is None:
                if (slot := self._slot_for(request, key)) is not None:
                    self._requests[caller] = self._requests.pop(caller)  # other callers are served before this one
                    return NextRead(pool, key, slot, Purpose.PREFETCH_REQUEST, request.is_scan)
                self._outcomes.note_dropped(1)
        while self._warmup:
            pool, key = self._warmup.popleft()
            if pool.slot_of(key) is None and not pool.starved and (slot := pool.vacancy(key.block)) is not None:
                return NextRead(pool, key, slot, Purpose.WARMUP)
        return None

    def _take_requests(self) -> Iterator[tuple[Caller | None, BlockRequests, ExpertKey]]:
        """Take requests one by one, and yield them by the turn of the caller, then by the arrival of the request.

        A caller's scans come last: their requests are many, and predictions of its other sequences must not wait.
        """
        for caller, blocks in list(self._requests.items()):
            for request in sorted(blocks.values(), key=lambda request: request.is_scan):
                while request.unbegun and not request.pool.starved:
                    yield caller, request, request.unbegun.popleft()

    def _slot_for(self, request: BlockRequests, key: ExpertKey) -> PoolSlot | None:
        """Return a slot for a requested record, as ``next_read`` specifies; None if there is no such slot."""
        pool = request.pool
        if (slot := pool.vacancy(key.block)) is not None:
            return slot
        for unused in self._outcomes.unused:
            slot = pool.slot_of(unused)
            if slot is not None and not self.is_requested(unused) and pool.is_evictable(slot):
                return slot
        if request.is_scan and (slot := pool.choose_scanned(self.is_requested)) is not None:
            return slot
        return pool.choose(key.block, is_scan=request.is_scan, keep=self.is_requested)

    # -- outcomes -----------------------------------------------------------------------------------------------------

    def note_begun(self, key: ExpertKey, purpose: Purpose) -> None:
        """Note that the read of a record begins, for the warm-up or for a request."""
        if purpose is Purpose.WARMUP:
            self._warmed.add(key)
        else:
            self._outcomes.note_begun(key)

    def note_arrived(self, key: ExpertKey) -> None:
        """Note that a record has arrived."""
        self._outcomes.note_arrived(key)

    def note_aborted(self, key: ExpertKey, *, is_cancelled: bool = False) -> None:
        """Note that a record will not arrive, because its read has failed or was cancelled."""
        self._warmed.discard(key)
        self._outcomes.note_aborted(key, is_cancelled=is_cancelled)

    def note_copy(self, key: ExpertKey) -> None:
        """Note that the tier above may copy a record."""
        self._copied.add(key)

    def note_uses(self, keys: Iterable[ExpertKey]) -> None:
        """Note that demands of this tier, or of the tier above, use the records of ``keys``."""
        for key in keys:
            self._copied.discard(key)
            if key in self._warmed:
                self._warmed.remove(key)
                self._counters.count(recalled=1)
            self._outcomes.note_use(key)

    def note_eviction(self, key: ExpertKey) -> None:
        """Note that a record is evicted from this tier. The tier above may still use its copy, if it has made one."""
        if key not in self._copied:
            self.forget_copy(key)

    def forget_copy(self, key: ExpertKey) -> None:
        """Note that a record is in neither this tier nor the tier above any more. If it was not used, it was wasted."""
        self._copied.discard(key)
        self._warmed.discard(key)
        self._outcomes.note_eviction(key)
