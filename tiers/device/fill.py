"""What comes into the device's slots: records that the host has leased, for demands and for wishes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.source import Lease
from moetier.tiers.stats import TierCounters

from .copies import Copies, Copy
from .pool import DevicePool
from .promoter import Promoter
from .residency import DeviceSlots
from .visit import Visit

_THERE, _NONE = -1, -2  # in place of a slot


class Intake:
    """Of one tier, whose lock it takes itself."""

    promoter: Promoter | None = None  # of the tier, if it has one
    promoting: tuple[DevicePool, int, ExpertKey] | None = None  # what it copies now

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
        slot = self._monitor.wait_for(self._place, visit, lease.key, began, wait)
        if slot in (_THERE, _NONE):
            return slot == _THERE  # then the lease was not used, so there is nothing to prove
        copy = self._transfer(visit.pool, slot, lease, visit)
        if copy is not None:
            visit.copied = copy.ended
            self._monitor.run(self._arrive, visit.pool, slot, copy, visit, began)
        return True

    def _place(self, visit: Visit, key: ExpertKey, began: float, wait: bool) -> int | None:
        """The slot for a demand, which is begun; None while it is to wait for one."""
        self._check_open()
        pool = visit.pool
        slot = pool.slots.find(key)
        if slot is not None and pool.slots.is_ready(slot):  # since this caller looked
            self._counters.joined += 1
            pool.policy.touch(slot, scan=visit.passing)
            self._admit(visit, slot, began)
            return _THERE
        if slot is not None or (slot := self._choose(visit, key.block)) is None:
            return None if wait else _NONE
        visit.filling = (slot, key)
        self._begin(pool, slot, key, passing=visit.passing)
        pool.policy.touch(slot, scan=visit.passing)
        return slot

    def wish(self, lease: Lease[memoryview]) -> None:
        """Promotes what the host has leased for a wish, if that still stands and has a slot. The lease may end then."""
        begun = self._monitor.run(self._place_wish, lease.key)
        if begun is None:
            return
        pool, slot, began = begun
        copy = self._transfer(pool, slot, lease)
        if copy is not None:
            self._monitor.run(self._arrive, pool, slot, copy)
            copy.ended.synchronize()
            self._monitor.run(self._end_wish, lease.key, began)

    def _place_wish(self, key: ExpertKey) -> tuple[DevicePool, int, float] | None:
        promoter, pool = self.promoter, self._slots.pool(key.block)
        assert promoter is not None
        if not promoter.may_begin(key):
            return None
        if pool.slots.find(key) is not None:
            promoter.drop(key)
            return None
        slot = pool.policy.choose(key.block, keep=promoter.__contains__)
        if slot is None:
            promoter.give_up(key)
            return None
        self.promoting = (pool, slot, key)
        self._begin(pool, slot, key, wished=True)
        return pool, slot, promoter.begin(key)

    def _end_wish(self, key: ExpertKey, began: float) -> None:
        assert self.promoter is not None
        self.promoter.outcomes.arrive(key)
        self._counters.loaded(time.perf_counter() - began)

    def _choose(self, visit: Visit, block: int) -> int | None:
        """The slot for a demand: only if there is no other, one of what is wished for, or, in a passage, the one that
        was leased last: the copy would wait until that is computed on."""
        choose = partial(visit.pool.policy.choose, block, scan=visit.passing)
        slot = choose(keep=partial(self._is_kept, visit))
        return choose(may_borrow=True) if slot is None else slot

    def _is_kept(self, visit: Visit, key: ExpertKey) -> bool:
        return (visit.passing and key == visit.latest) or (self.promoter is not None and key in self.promoter)

    def _begin(
        self, pool: DevicePool, slot: int, key: ExpertKey, *, wished: bool = False, passing: bool = False
    ) -> None:
        evicted = self._slots.begin(pool, slot, key, wished=wished, passing=passing)
        if evicted is not None and self.promoter is not None:
            self.promoter.outcomes.evict(evicted)

    def _transfer(
        self, pool: DevicePool, slot: int, lease: Lease[memoryview], visit: Visit | None = None
    ) -> Copy | None:
        """Queues the copy into a slot that was begun; None if the lease did not hold so long."""
        try:
            copy = self._copies.queue(lease, pool, slot)
        except BaseException:
            self._monitor.run(self._fail, pool, slot, visit)
            raise
        if copy is None:
            self._monitor.run(self._discard, pool, slot, visit)
        return copy

    def _arrive(self, pool: DevicePool, slot: int, copy: Copy, visit: Visit | None = None, began: float = 0.0) -> None:
        self._slots.arrive(pool, slot, copy)
        self._end_filling(visit)
        if visit is not None:
            self._admit(visit, slot, began)

    def _fail(self, pool: DevicePool, slot: int, visit: Visit | None) -> None:
        self._counters.failures += 1
        self._give_up(pool, slot, visit)

    def _discard(self, pool: DevicePool, slot: int, visit: Visit | None) -> None:
        self._counters.discarded += 1
        self._give_up(pool, slot, visit)

    def leave(self, visit: Visit) -> None:
        """Part of a step: a caller goes, and what it was about to copy does not come."""
        if visit.filling is not None:
            slot, _ = visit.filling
            visit.copied = self._copies.abandon(visit.pool, slot)
            self._give_up(visit.pool, slot, visit)

    def _give_up(self, pool: DevicePool, slot: int, visit: Visit | None) -> None:
        """What was to be copied into a slot is not there."""
        if self.promoter is not None:
            self.promoter.outcomes.fail(pool.slots.key(slot))
        self._slots.give_up(pool, slot)
        self._end_filling(visit)

    def _end_filling(self, visit: Visit | None) -> None:
        if visit is None:
            self.promoting = None
        else:
            visit.filling = None
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
