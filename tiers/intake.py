"""What comes into the device's slots: records that the host has leased, for demands and for wishes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from .copies import Copies, Copy
from .device_pool import DevicePool
from .device_slots import DeviceSlots
from .keys import ExpertKey
from .monitor import Monitor
from .promoter import Promoter
from .source import Lease
from .stats import TierCounters
from .visit import Visit


class Intake:
    """Of one tier, whose lock it takes itself."""

    promoter: Promoter | None = None  # of the tier, if it has one

    def __init__(
        self,
        monitor: Monitor,
        slots: DeviceSlots,
        copies: Copies,
        counters: TierCounters,
        check_open: Callable[[], None],
    ) -> None:
        self._monitor = monitor
        self._slots = slots
        self._copies = copies
        self._counters = counters
        self._check_open = check_open

    def demand(self, visit: Visit, lease: Lease[memoryview], began: float, *, wait: bool) -> bool:
        """Puts a record that the host has leased into a slot, unless the lease does not hold so long: then it comes
        again. False if there is no slot now, and the caller does not ``wait`` for one. Raises ClosedError."""
        pool = visit.pool
        with self._monitor:
            self._check_open()
            while True:
                slot = pool.slots.find(lease.key)
                if slot is not None and pool.slots.is_ready(slot):  # since this caller looked
                    self._counters.joined += 1
                    pool.policy.touch(slot, passing=visit.passing)
                    self._admit(visit, slot, began)
                    return True  # the lease was not used, so there is nothing to prove
                if slot is None:
                    slot = self._choose(visit, lease.key.block)
                    if slot is not None:
                        break
                if not wait:
                    return False
                self._monitor.sleep()
                self._check_open()
            self._begin(pool, slot, lease.key, passing=visit.passing)
            pool.policy.touch(slot, passing=visit.passing)
        copy = self._transfer(pool, slot, lease)
        if copy is not None:
            visit.copied = copy.ended
            with self._monitor:
                self._arrive(pool, slot, copy)
                self._admit(visit, slot, began)
        return True

    def wish(self, lease: Lease[memoryview]) -> None:
        """Promotes what the host has leased for a wish, if that still stands and has a slot. The lease may end then."""
        promoter, key = self.promoter, lease.key
        assert promoter is not None
        with self._monitor:
            pool = self._slots.pool(key.block)
            if not promoter.may_begin(key):
                return
            if pool.slots.find(key) is not None:
                promoter.drop(key)
                return
            slot = pool.policy.choose(key.block, keep=promoter.__contains__)
            if slot is None:
                promoter.give_up(key)
                return
            self._begin(pool, slot, key, wished=True)
            promotion = promoter.begin(key)
        copy = self._transfer(pool, slot, lease)
        if copy is not None:
            with self._monitor:
                self._arrive(pool, slot, copy)
            copy.ended.synchronize()
            promotion.seconds = time.perf_counter() - promotion.began
            with self._monitor:
                self._counters.loaded(promotion.seconds)

    def _choose(self, visit: Visit, block: int) -> int | None:
        """The slot for a demand: only if there is no other, one of what is wished for, or, in a passage, the one that
        was leased last: the copy would wait until that is computed on."""
        choose = partial(visit.pool.policy.choose, block, passing=visit.passing)
        slot = choose(keep=partial(self._is_kept, visit))
        return choose(borrow=True) if slot is None else slot

    def _is_kept(self, visit: Visit, key: ExpertKey) -> bool:
        return (visit.passing and key == visit.latest) or (self.promoter is not None and key in self.promoter)

    def _begin(
        self, pool: DevicePool, slot: int, key: ExpertKey, *, wished: bool = False, passing: bool = False
    ) -> None:
        evicted = self._slots.begin(pool, slot, key, wished=wished, passing=passing)
        if evicted is not None and self.promoter is not None:
            self.promoter.evict(evicted)

    def _transfer(self, pool: DevicePool, slot: int, lease: Lease[memoryview]) -> Copy | None:
        """Queues the copy into a slot that was begun; None if the lease did not hold so long."""
        try:
            copy = self._copies.queue(lease, pool, slot)
        except BaseException:
            with self._monitor:
                self._counters.failures += 1
                self._give_up(pool, slot)
            raise
        if copy is None:
            with self._monitor:
                self._counters.discarded += 1
                self._give_up(pool, slot)
        return copy

    def _arrive(self, pool: DevicePool, slot: int, copy: Copy) -> None:
        self._slots.arrive(pool, slot, copy)
        self._end_copying()

    def _give_up(self, pool: DevicePool, slot: int) -> None:
        """What was to be promoted into a slot is not there."""
        if self.promoter is not None:
            self.promoter.fail(pool.slots.key(slot))
        self._slots.give_up(pool, slot)
        self._end_copying()

    def _end_copying(self) -> None:
        locks = self._copies.locks
        if not self._slots.copying and locks.has_retired:  # nobody begins a copy while the lock is held
            self._slots.wait_for_copies()
            locks.unlock_retired()
        self._monitor.wake()

    def _admit(self, visit: Visit, slot: int, began: float) -> None:
        visit.pool.slots.pin(slot)
        visit.ready.append(slot)
        self._counters.waited(time.perf_counter() - began)
