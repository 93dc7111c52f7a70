"""Queues of the ledger: demands that wait for slots, and asynchronous demands that are to be served.

Callers hold the host tier's lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

from moetier.tiers.errors import ExhaustedError

from .demands import Demand, Pool


class Waiting:
    """Queues of demands: of those that lack a slot, one for each pool; and of asynchronous ones that are to be served.

    ``wake`` wakes sleeping callers and makes the tier serve asynchronous demands soon. ``ring`` wakes a loader.
    ``watch`` tells the thread that calls ``expire`` that there is a new deadline.
    """

    def __init__(
        self,
        *,
        wake: Callable[[], None],
        ring: Callable[[], None],
        watch: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.wake = wake
        self._ring = ring
        self._watch = watch
        self._clock = clock
        self._rechecks: dict[Demand, None] = {}  # asynchronous demands that may be able to go on
        self._deadlines: dict[Demand, float] = {}  # time at which each asynchronous demand without a slot fails

    # -- starved demands ----------------------------------------------------------------------------------------------

    def starve(self, demand: Demand) -> None:
        """Queue a demand that holds nothing and needs a slot: it is starved. Each pool has one FIFO queue."""
        caller, starved = demand.async_caller, demand.pool.starved
        if caller is not None and demand not in self._deadlines:
            self._deadlines[demand] = self._clock() + demand.patience
            self._watch()
        if demand not in starved and not (caller is not None and caller.is_full):
            starved.append(demand)

    def feed(self, demand: Demand) -> None:
        """Remove a demand from its pool's queue of starved demands, if it is there."""
        starved = demand.pool.starved
        if demand in starved:
            starved.remove(demand)
            self.wake()  # the next in the queue may find a slot too
            self._ring()  # prefetches yield while a demand is starved

    # -- asynchronous demands -----------------------------------------------------------------------------------------

    def recheck(self, demand: Demand) -> None:
        """Mark an asynchronous demand to be served again, since it may be able to go on."""
        self._rechecks[demand] = None

    def take_recheck(self) -> Demand | None:
        """Remove and return the first demand that is marked to be served again; None if there is none."""
        demand = next(iter(self._rechecks), None)
        if demand is not None:
            del self._rechecks[demand]
        return demand

    def took(self, demand: Demand) -> None:
        """Note that a demand holds or claims one more slot."""
        self.feed(demand)
        caller = demand.async_caller
        if caller is not None:
            self._deadlines.pop(demand, None)
            if caller.is_full:  # the caller's starved demands may not take slots, and must not keep others waiting
                for other in caller.demands.values():
                    self.feed(other)

    def gave(self, demand: Demand, slots: int) -> None:
        """Note that an asynchronous demand has given up ``slots`` slots that it held or claimed."""
        caller = demand.async_caller
        assert caller is not None
        if caller.outstanding < caller.leases <= caller.outstanding + slots:  # the caller was full before
            # Demands that have nothing are served first, by deadline, so that a demand for many keys can't hold up
            # others.
            for other in sorted(caller.demands.values(), key=lambda other: self._deadlines.get(other, math.inf)):
                if other.pending:
                    self.recheck(other)
            self.wake()

    def expire(self) -> float | None:
        """Fail asynchronous demands whose deadlines have passed. Return the next deadline, or None if there is none."""
        now = self._clock()
        for demand in [demand for demand, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[demand]
            demand.error = _exhausted(demand)
            self.recheck(demand)
        return min(self._deadlines.values(), default=None)

    def remove(self, demand: Demand) -> None:
        """Remove a demand that has ended from all queues."""
        if demand.pool.starved:
            self.feed(demand)
        if demand.async_caller is not None:
            self._rechecks.pop(demand, None)
            self._deadlines.pop(demand, None)

    # -- repair and checks --------------------------------------------------------------------------------------------

    def repair(self, demands: Collection[Demand], pools: Iterable[Pool]) -> None:
        """Make the queues agree with ``demands`` after an interrupted step, and let all callers check their demands."""
        for pool in pools:
            waiting = [demand for demand in pool.starved if demand in demands and demand.pending and demand.is_idle]
            pool.starved.clear()
            pool.starved.extend(dict.fromkeys(waiting))
        for demand in list(self._deadlines):
            if demand not in demands or not (demand.pending and demand.is_idle):
                del self._deadlines[demand]
        self._rechecks.clear()
        for demand in demands:
            if (caller := demand.async_caller) is not None:
                caller.demands[demand.number] = demand
                self.recheck(demand)
        self.wake()

    def check_integrity(self, demands: Collection[Demand]) -> None:
        """Assert that no asynchronous demand is lost, and that none waits although it could go on. Tests call it."""
        for caller in {demand.async_caller for demand in demands if demand.async_caller is not None}:
            assert set(caller.demands.values()) == {demand for demand in demands if demand.async_caller is caller}
            assert caller.outstanding <= caller.leases
            for demand in caller.demands.values():
                rechecked = demand in self._rechecks
                assert rechecked or not demand.ready, "what is ready is granted at once"
                assert rechecked or not demand.is_over
                waits = bool(demand.pending) and demand.is_idle
                assert rechecked or waits == (demand in self._deadlines)
                assert not caller.is_full or demand not in demand.pool.starved
                assert rechecked or caller.is_full or not waits or demand in demand.pool.starved
        assert all(demand in demands for demand in (*self._rechecks, *self._deadlines))


def _exhausted(demand: Demand) -> ExhaustedError:
    caller = demand.async_caller
    if caller is not None and caller.is_full:
        return ExhaustedError(
            f"The client holds all {caller.leases} leases that it may: none was given back in {demand.patience:g} s.",
            "Release some, or give it more (moetier daemon --leases).",
        )
    return ExhaustedError(
        f"All slots of the host tier are leased: none came free in {demand.patience:g} seconds.",
        "Try again, give the daemon more memory, or have fewer clients at a time.",
    )
