"""Waiting: demands without a slot, their deadlines, and asynchronous demands that may go on.

Part of the ledger: its owner's lock is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

from moetier.tiers.errors import ExhaustedError

from .demands import Demand, Pool


class Waiting:
    """``wake`` wakes the callers that sleep and has asynchronous demands served soon, ``ring`` wakes a loader, and
    ``watch`` tells the thread that calls ``expire`` that there is a new deadline."""

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
        self._deadlines: dict[Demand, float] = {}  # of asynchronous demands that have nothing

    # -- starved demands ----------------------------------------------------------------------------------------------

    def starve(self, demand: Demand) -> None:
        """Queue a demand that holds nothing and needs a slot (FIFO per pool)."""
        caller, starved = demand.async_caller, demand.pool.starved
        if caller is not None and demand not in self._deadlines:
            self._deadlines[demand] = self._clock() + demand.patience
            self._watch()
        if demand not in starved and not (caller is not None and caller.is_full):
            starved.append(demand)

    def feed(self, demand: Demand) -> None:
        """Remove a demand from the queue, if it is there."""
        starved = demand.pool.starved
        if demand in starved:
            starved.remove(demand)
            self.wake()  # the next in the queue may find a slot too
            self._ring()  # prefetches yield while a demand is starved

    # -- asynchronous demands -----------------------------------------------------------------------------------------

    def recheck(self, demand: Demand) -> None:
        """Have an asynchronous demand looked at again, since it may be able to go on."""
        self._rechecks[demand] = None

    def take_recheck(self) -> Demand | None:
        """Remove and return the first demand that is to be looked at again."""
        demand = next(iter(self._rechecks), None)
        if demand is not None:
            del self._rechecks[demand]
        return demand

    def count(self, demand: Demand, change: int) -> None:
        """Add ``change`` to the slots that an asynchronous demand's caller holds or claims."""
        caller = demand.async_caller
        if caller is None:
            return
        was_full = caller.is_full
        caller.outstanding += change
        if change > 0:
            self._deadlines.pop(demand, None)
        if caller.is_full and not was_full:  # other demands must not wait behind one that may not take a slot
            for other in caller.demands.values():
                self.feed(other)
        elif was_full and not caller.is_full:
            # Demands that have nothing go first, in the order of their deadlines: one for many keys holds up no other.
            for other in sorted(caller.demands.values(), key=lambda other: self._deadlines.get(other, math.inf)):
                if other.pending:
                    self.recheck(other)
            self.wake()

    def expire(self) -> float | None:
        """Fail asynchronous demands whose deadlines have passed. Return the next deadline, None if there is none."""
        now = self._clock()
        for demand in [demand for demand, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[demand]
            demand.error = _exhausted(demand)
            self.recheck(demand)
        return min(self._deadlines.values(), default=None)

    def remove(self, demand: Demand) -> None:
        """Drop what is kept of a demand that is over."""
        self._rechecks.pop(demand, None)
        self._deadlines.pop(demand, None)

    # -- repair and checks --------------------------------------------------------------------------------------------

    def repair(self, demands: Collection[Demand], pools: Iterable[Pool]) -> None:
        """Agree with ``demands`` after a step that was cut, and have all callers look again."""
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
                caller.outstanding = sum(other.outstanding for other in caller.demands.values())
                self.recheck(demand)
        self.wake()

    def check_integrity(self, demands: Collection[Demand]) -> None:
        """Assert that no asynchronous demand is lost, and that none waits that could go on."""
        for caller in {demand.async_caller for demand in demands if demand.async_caller is not None}:
            assert set(caller.demands.values()) == {demand for demand in demands if demand.async_caller is caller}
            assert caller.outstanding == sum(demand.outstanding for demand in caller.demands.values())
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
