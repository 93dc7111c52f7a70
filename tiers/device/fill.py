"""Fill the slots of a device tier with records that the host tier has leased, for demands and for promotions.

A *promotion* is a copy of a record to the device that a prefetch request asks for (see ``promoter``). One slot at a
time is LOADING, and only the thread that fills it uses the ring of buffers: the link to the device copies one record
after the other anyway.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from moetier.tiers.cache.pool import SlotState
from moetier.tiers.layout import ExpertKey, PoolSlot
from moetier.tiers.locks import Monitor, transition, waiting
from moetier.tiers.source import Lease
from moetier.tiers.stats import TierCounters

from .copies import Copies, QueuedCopy
from .device_pool import DevicePool, DeviceSlots
from .promoter import Promoter
from .stream import DeviceStream


@dataclass(eq=False, slots=True)
class DeviceDemand:
    """One call of ``acquire``, or a promotion: the slots that it holds, and the copies that it waits for.

    This class has no base class in common with ``Demand`` of the host tier, because the two differ too much: a
    DeviceDemand copies one record at a time, in the caller's own thread, never waits for a read, and releases its
    leases with events of the device.
    """

    pool: DevicePool
    caller: int  # id of the caller's thread
    is_scan: bool = False  # the demand is for more records than its block can keep
    latest: ExpertKey | None = None  # key of the record that was leased last
    lacks_records: bool = False  # records are not on the device; no promotion begins until the demand ends
    ready: list[PoolSlot] = field(default_factory=list)  # slots that are pinned for the demand, but not leased yet
    leased: tuple[list[PoolSlot], DeviceStream] | None = None  # the slots of all leases, and the stream that uses them
    filling: tuple[PoolSlot, ExpertKey] | None = None  # the slot that is LOADING and its key, until the copy is queued

    @property
    def slots(self) -> list[PoolSlot]:
        """The slots that are pinned for the demand."""
        return [*self.ready, *(self.leased[0] if self.leased is not None else ())]

    def begin(self, pool: DevicePool, *, is_scan: bool = False) -> None:
        """Begin with the slots of ``pool``."""
        self.pool = pool
        self.is_scan = is_scan

    def hold(self, slot: PoolSlot) -> None:
        """Note that a slot was pinned for the demand."""
        self.ready.append(slot)

    def note_lacking(self) -> None:
        """Note that records are not on the device."""
        self.lacks_records = True

    def begin_fill(self, slot: PoolSlot, key: ExpertKey) -> None:
        """Note that a slot will be LOADING."""
        self.filling = (slot, key)

    def end_fill(self) -> None:
        """Note that the slot is no longer LOADING."""
        self.filling = None

    def lease(self, count: int, stream: DeviceStream) -> list[PoolSlot]:
        """Lease the first ``count`` slots that are ready to ``stream``, and return these slots."""
        slots = self.ready[:count]
        self.leased = (slots, stream)
        del self.ready[:count]
        self.latest = self.pool.key(slots[-1])
        return slots

    def release_leases(self) -> None:
        """Note that the leases have ended. The slots are still pinned."""
        self.leased = None

    def end(self) -> bool:
        """End the demand. Return whether records were not on the device, unless it has ended before."""
        lacked, self.lacks_records = self.lacks_records, False
        return lacked


class DeviceFill:
    """Fills the slots of one device tier.

    Public methods, and those with a decorator, take the tier's lock. Callers hold it already for a method whose
    docstring ends with "Part of a transition", and for all other private methods but ``_transfer``.
    """

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
        self._promotion: DeviceDemand | None = None  # the latest promotion

    def copy_for(self, demand: DeviceDemand, lease: Lease[memoryview], began: float, *, wait: bool) -> bool:
        """Copy a record that the host tier has leased into a slot, for a demand.

        If the lease is not valid any more, the copy is discarded, and the host tier will lease the record again.

        Args:
            demand: the demand.
            lease: the host tier's lease.
            began: time by ``time.perf_counter`` since when the demand has waited for the record.
            wait: whether to wait if no slot is available, or another slot is being filled.

        Returns:
            False if ``wait`` is false and no slot can be filled now, else True.

        Raises:
            ClosedError: the tier was closed.
        """
        if not self._take_slot(demand, lease.key, began, wait):
            return False
        if demand.filling is not None:  # otherwise the record is already on the device
            copy = self._transfer(demand, lease)
            if copy is not None:
                self._complete(demand, copy, began)
        return True

    @waiting
    def _take_slot(self, demand: DeviceDemand, key: ExpertKey, began: float, wait: bool) -> bool | None:
        """Begin to fill a slot for a demand, or pin the slot that already has the record, and return True.

        If neither is possible now, wait if ``wait`` is true, and return False otherwise.
        """
        self._check_open()
        pool = demand.pool
        if pool.state_of(key) is SlotState.READY:  # another caller has copied the record since the demand began
            slot = pool.pin_ready(key)
            assert slot is not None
            self._counters.count(joined=1)
            pool.partitions.touch((key,), is_scan=demand.is_scan)
            self._admit(demand, slot, began)
            return True
        if self._slots.is_filling or (slot := self._choose(demand, key.block)) is None:
            return None if wait else False
        self._begin_fill(demand, slot, key)
        pool.partitions.touch((key,), is_scan=demand.is_scan)
        return True

    def promote(self, lease: Lease[memoryview]) -> None:
        """Copy a record that the host tier has leased into a slot, if it is still requested and a slot is available.

        Returns after the end of the copy.
        """
        began = time.perf_counter()
        promotion = DeviceDemand(self._slots.pool(lease.key.block), threading.get_ident())
        if not self._place_promotion(promotion, lease.key) or (copy := self._transfer(promotion, lease)) is None:
            return
        self._complete(promotion, copy, None)
        copy.ended.synchronize()
        self._end_promotion(lease.key, began)

    @waiting
    def _place_promotion(self, promotion: DeviceDemand, key: ExpertKey) -> bool | None:
        """Begin to fill a slot for a promotion, and return whether there is one to fill. Waits for another filling."""
        promoter, pool = self._promoter, self._slots.pool(key.block)
        promotion.begin(pool)  # another than before if the tier was made smaller meanwhile
        if not promoter.may_begin(key):
            return False
        if pool.slot_of(key) is not None:
            promoter.remove(key)
            return False
        if self._slots.is_filling:
            return None
        slot = pool.choose(key.block, keep=promoter.__contains__)
        if slot is None:
            promoter.drop(key)
            return False
        self._promotion = promotion
        self._begin_fill(promotion, slot, key, is_prefetch=True)
        promoter.begin(key)
        return True

    @transition
    def _end_promotion(self, key: ExpertKey, began: float) -> None:
        self._promoter.outcomes.note_arrived(key)
        self._counters.count_load(time.perf_counter() - began)

    def _choose(self, demand: DeviceDemand, block: int) -> PoolSlot | None:
        """Return a slot for a demand; None if no slot is available.

        Some records are evicted only if no other record can be: records that are requested for a promotion and, in a
        scan, the record that the caller has leased last. A copy into the slot of that record would have to wait until
        the computation with it ends.
        """

        def keep(key: ExpertKey) -> bool:
            return (demand.is_scan and key == demand.latest) or key in self._promoter

        choose = partial(demand.pool.choose, block, is_scan=demand.is_scan)
        slot = choose(keep=keep)
        return choose(may_borrow=True) if slot is None else slot

    def _begin_fill(self, demand: DeviceDemand, slot: PoolSlot, key: ExpertKey, *, is_prefetch: bool = False) -> None:
        demand.begin_fill(slot, key)
        evicted = demand.pool.begin_fill(slot, key, is_scan=demand.is_scan, is_prefetch=is_prefetch)
        if evicted is not None:
            self._counters.count(evictions=1)
            self._promoter.outcomes.note_eviction(evicted)

    def _transfer(self, demand: DeviceDemand, lease: Lease[memoryview]) -> QueuedCopy | None:
        """Queue the copy of a record into the slot that ``demand`` is filling; None if the lease is not valid."""
        assert demand.filling is not None
        try:
            copy = self._copies.queue(lease, demand.pool, demand.filling[0])
        except BaseException:
            self._fail(demand, "failures")
            raise
        if copy is None:
            self._fail(demand, "discarded")
        return copy

    @transition
    def _complete(self, demand: DeviceDemand, copy: QueuedCopy, began: float | None) -> None:
        """Make the slot that ``demand`` is filling READY. Later computations on the slot wait for the end of ``copy``.

        ``began`` is the time since when the demand has waited for the record; None for a promotion.
        """
        assert demand.filling is not None
        pool, (slot, _) = demand.pool, demand.filling
        self._counters.count(bytes_in=pool.slot_bytes)
        self._copies.complete(copy, pool, slot)
        pool.complete_fill(slot)
        self._end_fill(demand)
        if began is not None:
            pool.pin(slot)
            self._admit(demand, slot, began)

    def end(self, demand: DeviceDemand) -> None:
        """Stop filling a slot for a demand that ends, if the demand is filling one. Part of a transition."""
        if demand.filling is not None:
            self._abort(demand)

    @transition
    def _fail(self, demand: DeviceDemand, counter: Literal["failures", "discarded"]) -> None:
        """Abort the copy for ``demand``, and count it."""
        self._counters.count(**{counter: 1})
        self._abort(demand)

    def _abort(self, demand: DeviceDemand) -> None:
        assert demand.filling is not None
        slot, key = demand.filling
        self._promoter.outcomes.note_aborted(key)
        demand.pool.abort_fill(slot)
        self._end_fill(demand)
        self._copies.abort(demand.pool, slot)

    def _end_fill(self, demand: DeviceDemand) -> None:
        demand.end_fill()
        self._monitor.wake()

    def _admit(self, demand: DeviceDemand, slot: PoolSlot, began: float) -> None:
        demand.hold(slot)
        self._counters.count_wait(time.perf_counter() - began)

    def repair(self, demands: Collection[DeviceDemand]) -> None:
        """Make the slots agree with ``demands`` after an exception has interrupted a transition.

        Leases stay, and so do slots that are being filled for a demand or a promotion. Part of a transition.
        """
        for pool in self._slots.pools.values():
            pins = [0] * pool.slot_count
            loading: dict[PoolSlot, ExpertKey] = {}
            for demand in (*demands, *([self._promotion] if self._promotion is not None else [])):
                if demand.pool is pool:
                    for slot in demand.slots:
                        pins[slot] += 1
                    if demand.filling is not None:
                        loading[demand.filling[0]] = demand.filling[1]
            pool.repair(pins, loading)
