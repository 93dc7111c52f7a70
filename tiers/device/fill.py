"""Fill the device's slots with records that the host has leased, for demands and for promotions."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.source import Lease
from moetier.tiers.stats import TierCounters

from .copies import Copies, Copy
from .device_pool import DevicePool, DeviceSlots
from .promoter import Promoter
from .stream import Event, Stream


@dataclass(eq=False, slots=True)
class DeviceDemand:
    """One call of acquire, or a promotion: the slots that it holds, and the copies that it waits for.

    It has no base class in common with the host tier's ``Demand``, as the two have little in common: this one copies
    one record at a time in the caller's own thread, never waits for a read, and ends its leases by events of the
    device.
    """

    pool: DevicePool
    caller: int  # id of the caller's thread
    is_scan: bool = False  # the demand is for more records than its block can keep
    latest: ExpertKey | None = None  # key of the latest lease
    misses: bool = False  # it lacks records; promotions wait until it ends
    ready: deque[int] = field(default_factory=deque)  # slots that are pinned for it, but not leased yet
    leased: tuple[int, Stream] | None = None  # the slot that is leased, and the stream that computes on it
    filling: tuple[int, ExpertKey] | None = None  # the slot that is LOADING, and its key, until the copy is queued
    copied: Event | None = None  # the end of the latest copy, and so of all copies before

    def end_copies(self) -> None:
        """Wait until all copies of the demand have ended, so that the host's records may be released."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None


class DeviceFill:
    """Fills the slots of one tier. Methods take the tier's lock, except those that are documented as part of a step."""

    promotion: DeviceDemand | None = None  # the latest promotion

    def __init__(
        self,
        monitor: Monitor,
        slots: DeviceSlots,
        copies: Copies,
        counters: TierCounters,
        promoter: Promoter,
        check_open: Callable[[], None],
    ) -> None:
        self._monitor = monitor
        self._slots = slots
        self._copies = copies
        self._counters = counters
        self._promoter = promoter
        self._check_open = check_open

    def demand(self, demand: DeviceDemand, lease: Lease[memoryview], began: float, *, wait: bool) -> bool:
        """Copy a record that the host has leased into a slot, for a demand.

        If the lease does not hold, nothing is copied, and the host will lease the record again.

        Args:
            demand: the demand.
            lease: the host's lease.
            began: time by ``time.perf_counter`` since when the demand has waited for the record.
            wait: whether to wait for a slot.

        Returns:
            False if there is no slot now and ``wait`` is false, else True.

        Raises:
            ClosedError: the tier was closed.
        """
        if not self._monitor.wait_for(self._place, demand, lease.key, began, wait):
            return False
        if demand.filling is not None:  # otherwise the record was already on the device
            copy = self._transfer(demand, lease)
            if copy is not None:
                demand.copied = copy.ended
                self._monitor.run(self._arrive, demand, copy, began)
        return True

    def _place(self, demand: DeviceDemand, key: ExpertKey, began: float, wait: bool) -> bool | None:
        """Begin to fill a slot for a demand, or pin the slot that has the record already. Part of a step.

        Returns True if that succeeded. If there is no slot, returns None to wait for one, or False if not ``wait``.
        """
        self._check_open()
        pool = demand.pool
        slot = pool.find(key)
        if slot is not None and pool.is_ready(slot):  # another caller has copied it meanwhile
            self._counters.joined += 1
            pool.touch((key,), scan=demand.is_scan)
            self._admit(demand, slot, began)
            return True
        if slot is not None or (slot := self._choose(demand, key.block)) is None:
            return None if wait else False
        self._begin(demand, slot, key)
        pool.touch((key,), scan=demand.is_scan)
        return True

    def promote(self, lease: Lease[memoryview]) -> None:
        """Copy a record leased from the host into a slot, if it is still requested and a slot is available.

        Returns when the copy has ended, so that the caller may release the lease.
        """
        began = time.perf_counter()
        promotion = self._monitor.run(self._place_promotion, lease.key, began)
        if promotion is None or (copy := self._transfer(promotion, lease)) is None:
            return
        self._monitor.run(self._arrive, promotion, copy)
        copy.ended.synchronize()
        self._monitor.run(self._end_promotion, lease.key, began)

    def _place_promotion(self, key: ExpertKey, began: float) -> DeviceDemand | None:
        promoter, pool = self._promoter, self._slots.pool(key.block)
        if not promoter.may_begin(key):
            return None
        if pool.find(key) is not None:
            promoter.remove(key)
            return None
        slot = pool.choose(key.block, keep=promoter.__contains__)
        if slot is None:
            promoter.cancel(key)
            return None
        self.promotion = DeviceDemand(pool, threading.get_ident())
        self._begin(self.promotion, slot, key, prefetched=True)
        promoter.note_begun(key, began)
        return self.promotion

    def _end_promotion(self, key: ExpertKey, began: float) -> None:
        self._promoter.outcomes.arrive(key)
        self._counters.loaded(time.perf_counter() - began)

    def _choose(self, demand: DeviceDemand, block: int) -> int | None:
        """Choose a slot for a demand.

        Two kinds of records are evicted only if there is no other: records that are requested for promotion and, in a
        scan, the record that the caller leased last. A copy into that record's slot would have to wait until the
        computation with it ends.
        """

        def keep(key: ExpertKey) -> bool:
            return (demand.is_scan and key == demand.latest) or key in self._promoter

        choose = partial(demand.pool.choose, block, scan=demand.is_scan)
        slot = choose(keep=keep)
        return choose(may_borrow=True) if slot is None else slot

    def _begin(self, demand: DeviceDemand, slot: int, key: ExpertKey, *, prefetched: bool = False) -> None:
        demand.filling = (slot, key)
        evicted = demand.pool.begin_fill(slot, key, scan=demand.is_scan, prefetched=prefetched)
        if evicted is not None:
            self._counters.evictions += 1
            self._promoter.outcomes.evict(evicted)

    def _transfer(self, demand: DeviceDemand, lease: Lease[memoryview]) -> Copy | None:
        """Queue the copy into the slot that is being filled. Return None if the lease did not hold."""
        assert demand.filling is not None
        try:
            copy = self._copies.queue(lease, demand.pool, demand.filling[0])
        except BaseException:
            self._monitor.run(self._cancel, demand, 1, 0)
            raise
        if copy is None:
            self._monitor.run(self._cancel, demand, 0, 1)
        return copy

    def _arrive(self, demand: DeviceDemand, copy: Copy, began: float | None = None) -> None:
        """Make the slot READY. Computations on it from now on wait for the copy. Part of a step.

        ``began`` is the time since when the demand has waited for the record; None for a promotion.
        """
        assert demand.filling is not None
        pool, (slot, _) = demand.pool, demand.filling
        self._counters.bytes_in += pool.slot_bytes
        pool.copied[slot] = copy.ready
        pool.used[slot] = dict(copy.uses)
        pool.fill(slot)
        self._end_filling(demand)
        if began is not None:
            self._admit(demand, slot, began)

    def leave(self, demand: DeviceDemand) -> None:
        """Cancel the copy that a demand was about to queue, because the demand ends. Part of a step."""
        if demand.filling is not None:
            demand.copied = self._copies.abandon(demand.pool, demand.filling[0])
            self._cancel(demand)

    def _cancel(self, demand: DeviceDemand, failures: int = 0, discarded: int = 0) -> None:
        assert demand.filling is not None
        slot, key = demand.filling
        self._counters.failures += failures
        self._counters.discarded += discarded
        self._promoter.outcomes.began.pop(key, None)
        demand.pool.fail(slot)
        self._end_filling(demand)

    def _end_filling(self, demand: DeviceDemand) -> None:
        demand.filling = None
        locks = self._copies.locks
        if locks.has_retired and not self._slots.copying:  # no copy begins while the lock is held
            self._slots.wait_for_copies()
            locks.unlock_retired()
        self._monitor.wake()

    def _admit(self, demand: DeviceDemand, slot: int, began: float) -> None:
        demand.pool.pin(slot)
        demand.ready.append(slot)
        self._counters.waited(time.perf_counter() - began)

    def repair(self, demands: Collection[DeviceDemand]) -> None:
        """Make the slots agree with the demands, after an exception has interrupted a step. Part of a step.

        Leases stay, and so do records that are being copied for demands or for a promotion.
        """
        for pool in self._slots.pools.values():
            pins = [0] * pool.count
            loading: dict[int, ExpertKey] = {}
            for demand in (*demands, *([self.promotion] if self.promotion is not None else [])):
                if demand.pool is pool:
                    for slot in [*demand.ready, *([demand.leased[0]] if demand.leased is not None else [])]:
                        pins[slot] += 1
                    if demand.filling is not None:
                        loading[demand.filling[0]] = demand.filling[1]
            pool.repair(pins, loading)
