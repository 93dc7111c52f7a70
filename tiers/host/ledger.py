"""The ledger: the state of the host tier, which consists of all demands, the loads in progress, and the slots.

The ledger does no I/O, and has neither threads nor a lock. Its methods are parts of transitions (``tiers.locks``), so
their callers hold the host tier's lock. Its parts (``slots``, ``loads``, ``waiting``, ``prefetch``, ``uses``) change in
the same transitions, so their methods also expect the lock.

A demand goes through ``begin``, ``next_leases`` as often as its caller wants leases, and ``end``. A load goes through
``Loads.begin_for``, ``take``, and ``complete`` or ``fail``.

No caller waits for ever, for these reasons. A caller of ``acquire`` sleeps only while it holds no READY slot, because
READY records are yielded first. While the caller sleeps, it may have claims on LOADING slots. But a loader never waits
for a slot, so each LOADING slot becomes READY or EMPTY. Therefore each pinned READY slot belongs to a caller that is
computing, which returns the slot when it takes its next lease. A demand is *starved* if it neither holds nor claims a
slot, and finds none. Starved demands get the slots that are returned, in order of arrival. While a demand is starved,
no other demand of its pool begins a load.

A caller is either a thread, which sleeps until it is woken, or *asynchronous*, such as a session of another process.
``serve`` advances the demands of asynchronous callers and delivers events to the callers. It runs after each transition
that lets such a demand go on (``WaitingDemands.recheck``) or wakes callers. An asynchronous caller may hold several
leases at a time, up to a limit. If one of its demands is without a slot for too long, the demand fails. So a process
that does not return its slots can't block other callers.

The tier calls methods of the ledger, and gives two of its parts to others: ``loads`` to loaders and ``disk_order``, and
``uses`` to sessions and to what finds records without a demand. It reads quotas from ``slots``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.pool import SlotState, stats_of
from moetier.tiers.errors import MoetierError, StoreError
from moetier.tiers.layout import ExpertKey, PoolSlot, TierSlot
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierCounters, TierStats

from .demands import AsyncCaller, Caller, Demand, Failed, Granted
from .loads import LoadLimits, Loads
from .prefetch import PrefetchQueue
from .slots import HostSlots
from .uses import Uses
from .waiting import Notifier, WaitingDemands


class SlotBatch(NamedTuple):
    """Slots of a demand that are leased at the same time."""

    slots: list[PoolSlot]
    is_last: bool  # whether the demand has no further ones


class Ledger:
    """All demands, loads and slots of the host tier.

    Args:
        manifest: the manifest of the store.
        layout: layout of the arena that has the slots.
        directory: the directory of that arena.
        notifier: wakes threads that can go on.
        limits: how many loads may be in progress.
        policy: the policy of eviction, a key of ``POLICIES``.
        loads_rest: whether all records are read, in the background, where there is room (``Loads``).
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        manifest: Manifest,
        layout: ArenaLayout,
        directory: Directory,
        notifier: Notifier,
        limits: LoadLimits,
        *,
        policy: str,
        loads_rest: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = manifest
        self._counters = TierCounters("host")
        self.slots = HostSlots(manifest, layout, policy)
        self._prefetches = PrefetchQueue(self._counters, clock)
        self.uses = Uses(self.slots.pool_of, self._counters, self._prefetches)
        self.waiting = WaitingDemands(notifier, clock)
        rest = {self.slots.pools[array]: blocks for array, blocks in manifest.members.items()} if loads_rest else {}
        self.loads = Loads(directory, self._counters, self._prefetches, self.waiting, notifier, limits, rest)
        self._directory = directory
        self._notifier = notifier
        self._clock = clock
        self._demands: set[Demand] = set()
        self.fault: StoreError | None = None  # the error with which the tier was condemned

    def check_open(self) -> None:
        """If the ledger was closed, raise the error with which it was closed."""
        if (error := self.loads.closed_by) is not None:
            raise error.fresh()  # the frames of a raised error would keep slots

    def stats(self) -> TierStats:
        """Return a snapshot of the counters and of the state of the slots."""
        return stats_of(self._counters, self.slots.pools.values())

    def absent(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        """Return those of ``keys`` whose records are not READY. Callers need not hold the lock."""
        return [key for key in keys if not self.slots.is_ready(key)]

    def recover(self, kept: Mapping[TierSlot, ExpertKey]) -> None:
        """Make slots READY that hold intact records of a reclaimed arena. ``kept`` has the keys of these records."""
        self.slots.recover(kept)

    def note_failover(self) -> None:
        """Count a read that failed, but succeeded from a mirror."""
        self._counters.count(failures=1)

    # -- demands ------------------------------------------------------------------------------------------------------

    def new_demand(self, block: int, caller: Caller, request: int = 0, timeout: float = 0.0) -> Demand:
        """Return a demand for records of ``block``, which has not begun. ``request`` and ``timeout`` are its fields."""
        return Demand(self.slots.pool_of[block], block, caller, request, timeout)

    def begin(self, demand: Demand, keys: Sequence[ExpertKey], of_total: int = 0) -> None:
        """Begin a demand for ``keys``: pin READY records, join loads in progress, and begin other loads if possible.

        ``of_total`` is that of ``ExpertSource.acquire``. Raises ClosedError if the tier was closed, or the StoreError
        with which it was condemned (``HostTier.condemn``).
        """
        self.check_open()
        self._demands.add(demand)
        pool, caller = demand.pool, demand.caller
        caller.register(demand)
        distinct, requester = dict.fromkeys(keys), caller if caller.is_asynchronous else None
        demand.begin(distinct, is_scan=pool.partitions.is_scan(demand.block, max(len(distinct), of_total)))
        if not of_total:
            self._prefetches.cancel_block(pool, demand.block, requester)
        elif demand.is_scan:
            self._prefetches.begin_scan(pool, demand.block, requester)
        hits = []
        for key in distinct:
            if not caller.is_full and (slot := pool.pin_ready(key)) is not None:
                demand.hold(key, slot, is_hit=True)
                hits.append(key)
                self.waiting.note_taken(demand)
        self.uses.note_demand(hits, demand.pending)
        if demand.pending:
            self._take_slots(demand)
        # Touch the first key last: it is then evicted last. ``_advance`` touches pending keys, once they have slots.
        pool.partitions.touch([key for key in reversed(distinct) if key not in demand.pending], is_scan=demand.is_scan)
        self.waiting.recheck(demand)

    def next_leases(self, demand: Demand) -> SlotBatch | None:
        """Release the demand's leases, and lease the slots that are ready for it.

        Returns None if the caller has to wait. If the demand has failed, there are no slots. Raises the same errors as
        ``begin``.
        """
        self.release(demand)
        self.check_open()
        if demand.error is not None:
            return SlotBatch([], is_last=True)
        if demand.pending:
            self._advance(demand)
        is_last = not (demand.pending or demand.loads)
        if not (demand.ready or is_last):
            demand.begin_wait(self._clock())
            return None
        self._end_wait(demand)
        if demand.is_scan:  # one lease at a time, because the demand needs its slots for further records
            is_last = is_last and len(demand.ready) <= 1
        return SlotBatch(demand.lease(1 if demand.is_scan else len(demand.ready)), is_last)

    def _advance(self, demand: Demand) -> None:
        """Serve the demand's pending keys, as long as slots are available.

        If the record of a key is READY, its slot is pinned for the demand. Otherwise the demand joins the load of the
        record that is in progress, or begins a load.
        """
        demand.pool.partitions.touch(reversed(self._take_slots(demand)), is_scan=demand.is_scan)

    def release(self, demand: Demand, keys: Iterable[ExpertKey] | None = None) -> None:
        """Release the demand's leases of ``keys``, or all of its leases if ``keys`` is None.

        Keys that the demand has not leased are ignored.
        """
        slots = demand.leased if keys is None else dict.fromkeys(demand.pool.slot_of(key) for key in keys)
        if ended := demand.release(slots):
            self._unpin(demand, ended)
        self.waiting.recheck(demand)

    def end(self, demand: Demand) -> None:
        """End a demand: release its leases and claims, and cancel its pending keys.

        Loads that a loader has begun go on, and their records are cached. A load that no loader has begun is cancelled,
        unless another demand waits for it. Without this, demands that end early could fill all slots with records that
        no caller needs.
        """
        self.waiting.remove(demand)
        slots, loads = demand.clear()
        self._unpin(demand, slots)
        for load in loads:
            self.loads.withdraw(demand, load)
        demand.caller.unregister(demand)
        self._demands.discard(demand)

    def end_caller(self, caller: Caller) -> None:
        """End all demands of ``caller``, and cancel its prefetch requests, if it is asynchronous."""
        for demand in [demand for demand in self._demands if demand.caller == caller]:
            self.end(demand)
        self._prefetches.cancel(caller)

    def lease_for_copy(self, demand: Demand, key: ExpertKey) -> PoolSlot | None:
        """Lease the slot of a key to the tier above, if the slot is READY and no demand of its pool is starved.

        Returns the slot, or None. ``demand`` holds the lease until ``end``. This does not count as a use of the record.
        Raises the same errors as ``begin``.
        """
        self.check_open()
        slot = None if demand.pool.starved else demand.pool.pin_ready(key)
        if slot is not None:
            self._demands.add(demand)
            demand.hold(key, slot)
            demand.lease(1)
            self._prefetches.note_copy(key)
        return slot

    def condemn(self, error: StoreError) -> None:
        """Close the ledger with ``error`` unless it is closed, and let readers of the directory find no record."""
        if self.loads.closed_by is None:
            self.fault = error
            self.close(error)
            self._directory.retire()

    def close(self, error: MoetierError) -> None:
        """Close the ledger: fail all demands with ``error``, and begin no more loads."""
        self.loads.close(error)
        for demand in self._demands:
            if demand.caller.is_asynchronous:
                demand.fail(error)
                self.waiting.recheck(demand)
        self._notifier.wake_sleepers()

    # -- prefetches ---------------------------------------------------------------------------------------------------

    def prefetch(self, block: int, keys: Collection[ExpertKey], caller: AsyncCaller | None = None) -> None:
        """Replace a caller's prefetch requests for a block by distinct ``keys``. ``caller`` is None for this process.

        While a record is requested, records that are not requested are evicted before it. This is so even if the record
        is already READY. Raises the same errors as ``begin``.
        """
        self.check_open()
        if self._prefetches.replace(self.slots.pool_of[block], block, keys, caller):
            self.loads.wake_loaders_for_prefetches()

    def warm(self, hottest: Iterable[Sequence[ExpertKey]]) -> None:
        """Queue records of each block for the warm-up (``Loads.warm``). Raises the same errors as ``begin``."""
        self.check_open()
        for pool, keys in zip(self.slots.pool_of, hottest, strict=True):
            self.loads.warm(pool, keys)

    # -- asynchronous callers -----------------------------------------------------------------------------------------

    def expire(self) -> float | None:
        """Fail asynchronous demands whose deadlines have passed. Return the next deadline, or None."""
        return self.waiting.expire()

    def serve(self) -> None:
        """Advance all asynchronous demands that can go on. Others are advanced by the threads of their callers.

        ``Notifier`` lets this run after the transitions that it has to follow.
        """
        while True:
            while (demand := self.waiting.take_recheck()) is not None:
                self._deliver(demand)
            # if the first starved demand of a pool is not asynchronous, its thread was woken and advances it
            firsts = [demand for demand in self.slots.starved() if demand.caller.is_asynchronous]
            for demand in firsts:
                self._deliver(demand)
            if all(demand.is_idle for demand in firsts):
                return

    def _deliver(self, demand: Demand) -> None:
        """Advance an asynchronous demand, and deliver events to its caller: leases that are ready, or an error."""
        caller = demand.caller
        assert isinstance(caller, AsyncCaller)
        if demand.error is None and demand.pending:
            self._advance(demand)
        if demand.error is not None:
            self.end(demand)
            caller.deliver(Failed(demand.request, demand.error))
            return
        if demand.hits or demand.arrived:
            self._end_wait(demand)
        while demand.hits or demand.arrived:
            (slot,) = demand.lease(1)
            number = demand.pool.number(slot)
            caller.deliver(Granted(demand.request, demand.pool.key(slot), number, self._directory.generation(number)))
        if demand.is_over:
            self.end(demand)
        elif not demand.leased:
            demand.begin_wait(self._clock())

    def _end_wait(self, demand: Demand) -> None:
        if demand.waits_since is not None:
            self._counters.count_wait(demand.end_wait(self._clock()))

    # -- slots --------------------------------------------------------------------------------------------------------

    def _take_slots(self, demand: Demand) -> list[ExpertKey]:
        """Take slots for pending keys, as ``_advance`` does. Return these keys; the caller touches them in the pool."""
        served, may_load = list[ExpertKey](), True
        for key in list(demand.pending):
            if demand.caller.is_full:
                break
            match demand.pool.state_of(key):
                case SlotState.READY:  # another load has brought the record since this demand began
                    self._counters.count(joined=1)
                    slot = demand.pool.pin_ready(key)
                    assert slot is not None
                    demand.hold(key, slot)
                    self._prefetches.note_uses((key,))
                case SlotState.LOADING:  # a prefetch or another demand has begun to load the record
                    self._counters.count(joined=1)
                    self.loads.join(demand, key)
                case SlotState.EMPTY:
                    may_load = may_load and self.loads.begin_for(demand, key)
                    if not may_load:
                        continue
            served.append(key)
            self.waiting.note_taken(demand)
        if demand.pending and demand.is_idle:
            self.waiting.wait_for_slot(demand)
        return served

    def _unpin(self, demand: Demand, slots: Sequence[PoolSlot]) -> None:
        """Unpin slots that a demand no longer holds or claims, so that other demands can use them."""
        pool = demand.pool
        freed = [slot for slot in slots if not pool.unpin(slot)]
        if freed and pool.starved:
            self._notifier.wake_sleepers()
        self.waiting.note_released(demand, len(slots))

    # -- repair -------------------------------------------------------------------------------------------------------

    def repair(self) -> None:
        """Make the whole state consistent again after an exception has interrupted a transition at any instruction.

        Leases and loads in progress stay. Cached records stay too, except in slots whose state is uncertain. Prefetch
        requests are removed.
        """
        self.loads.repair(self._demands)
        self.slots.repair(self._demands, self.loads)
        self._directory.repair(self.slots.contents())
        self._prefetches.repair(self.slots.slot_of)
        self.waiting.repair(self._demands, self.slots.pools.values())
