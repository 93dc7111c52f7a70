"""Queues of demands that wait for a slot or are to be served, their deadlines, and the waking of threads.

This module is a part of the ledger: callers hold the tier's lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from queue import SimpleQueue

from moetier.tiers.errors import ExhaustedError
from moetier.tiers.locks import Monitor

from .demands import AsyncCaller, Demand, Pool


class Notifier:
    """Wakes threads that can go on after a transition."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        # The queues are SimpleQueues because a finalizer may put an item into them, at any time, in any thread.
        self.loaders: SimpleQueue[None] = SimpleQueue()  # each item wakes one loader, which reads all there is to read
        self.timekeeper: SimpleQueue[None] = SimpleQueue()  # an item makes the timekeeper look at the deadlines again

    def wake_sleepers(self) -> None:
        """Wake sleeping callers and paused loaders; then ``Ledger.serve`` runs, too."""
        self._monitor.wake()

    def serve_asynchronous(self) -> None:
        """Let ``Ledger.serve`` run after this transition."""
        self._monitor.mark()

    def wake_loader(self) -> None:
        """Wake one loader, because there is a record to read."""
        self.loaders.put(None)

    def wake_timekeeper(self) -> None:
        """Wake the timekeeper, because there is a new deadline."""
        self.timekeeper.put(None)


class WaitingDemands:
    """Queues of demands that wait: for a slot, or to be served. Also the deadlines of asynchronous demands.

    A demand of an asynchronous caller is an *asynchronous demand*.
    """

    def __init__(self, notifier: Notifier, clock: Callable[[], float]) -> None:
        """``clock`` returns the time in seconds."""
        self._notifier = notifier
        self._clock = clock
        self._rechecks: dict[Demand, None] = {}  # asynchronous demands that are to be served, since they may go on
        self._deadlines: dict[Demand, float] = {}  # from each asynchronous demand without a slot to when it fails

    # -- starved demands ----------------------------------------------------------------------------------------------

    def wait_for_slot(self, demand: Demand) -> None:
        """Queue a starved demand in its pool's FIFO queue. A demand is starved if it needs a slot and holds none."""
        caller, starved = demand.caller, demand.pool.starved
        if caller.is_asynchronous and demand not in self._deadlines:
            self._deadlines[demand] = self._clock() + demand.timeout
            self._notifier.wake_timekeeper()
        if demand not in starved and not caller.is_full:
            starved.append(demand)

    def stop_waiting(self, demand: Demand) -> None:
        """Remove a demand from its pool's queue of starved demands, if it is in the queue."""
        starved = demand.pool.starved
        if demand in starved:
            starved.remove(demand)
            self._notifier.wake_sleepers()  # the next demand in the queue may find a slot too
            self._notifier.wake_loader()  # prefetches that have yielded to the demand may go on

    # -- asynchronous demands -----------------------------------------------------------------------------------------

    def recheck(self, demand: Demand) -> None:
        """Mark an asynchronous demand to be served again, because it may be able to go on. No effect on others."""
        if demand.caller.is_asynchronous:
            self._rechecks[demand] = None
            self._notifier.serve_asynchronous()

    def take_recheck(self) -> Demand | None:
        """Take the first demand that ``recheck`` has marked, and return it. Return None if no demand is marked."""
        if (demand := next(iter(self._rechecks), None)) is not None:
            del self._rechecks[demand]
        return demand

    def note_taken(self, demand: Demand) -> None:
        """Note that a demand holds or claims one more slot."""
        self.stop_waiting(demand)
        self._deadlines.pop(demand, None)
        if demand.caller.is_full:  # its starved demands may not take slots, so they must not keep other demands waiting
            for other in demand.caller.open_demands():
                self.stop_waiting(other)

    def note_released(self, demand: Demand, slots: int) -> None:
        """Note that a demand no longer holds or claims ``slots`` slots. Its caller's other demands may then go on."""
        if demand.caller.was_full(slots):
            # Demands without a slot are served first, in the order of their deadlines. Otherwise a demand for many keys
            # would keep the caller's other demands waiting.
            waiting = [other for other in demand.caller.open_demands() if other.pending]
            for other in sorted(waiting, key=lambda other: self._deadlines.get(other, math.inf)):
                self.recheck(other)
            self._notifier.wake_sleepers()

    def expire(self) -> float | None:
        """Fail asynchronous demands whose deadlines have passed. Return the next deadline, or None."""
        now = self._clock()
        for demand in [demand for demand, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[demand]
            demand.fail(_exhausted(demand))
            self.recheck(demand)
        return min(self._deadlines.values(), default=None)

    def remove(self, demand: Demand) -> None:
        """Remove a demand that has ended from all queues."""
        if demand.pool.starved:
            self.stop_waiting(demand)
        self._rechecks.pop(demand, None)
        self._deadlines.pop(demand, None)

    # -- repair -------------------------------------------------------------------------------------------------------

    def repair(self, demands: Collection[Demand], pools: Iterable[Pool]) -> None:
        """Make the queues agree with ``demands`` after an interrupted transition, and let all callers go on."""
        for pool in pools:
            waiting = [demand for demand in pool.starved if demand in demands and demand.pending and demand.is_idle]
            pool.starved.clear()
            pool.starved.extend(dict.fromkeys(waiting))
        for demand in list(self._deadlines):
            if demand not in demands or not (demand.pending and demand.is_idle):
                del self._deadlines[demand]
        self._rechecks.clear()
        for demand in demands:
            demand.caller.register(demand)
            self.recheck(demand)
        self._notifier.wake_sleepers()


def _exhausted(demand: Demand) -> ExhaustedError:
    caller = demand.caller
    if isinstance(caller, AsyncCaller) and caller.is_full:
        return ExhaustedError(
            f"The client holds all of its {caller.max_leases} leases, and released none "
            f"for {demand.timeout:g} seconds.",
            "Release leases in the client, or start the daemon with more --leases.",
        )
    return ExhaustedError(
        f"All slots of the host tier are leased, and none became free for {demand.timeout:g} seconds.",
        "Try again, give the daemon more memory (--ram), or run fewer clients at the same time.",
    )
