"""Demands, the queues in which they wait, and what they refer to: pools of slots, loads, callers and events.

These classes refer to one another, so they are in one module. Callers of their methods hold the host tier's lock.
``Notifier`` wakes the threads that can go on after a transition.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import ClassVar

from moetier.tiers.cache.budget import Partition
from moetier.tiers.cache.policies import Policy
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.errors import ExhaustedError
from moetier.tiers.layout import ExpertKey, PoolSlot, TierSlot
from moetier.tiers.locks import Monitor


class Pool(SlotPool):
    """The host tier's slots for records of one layout."""

    def __init__(
        self, partitions: Sequence[Partition], make_policy: Callable[[int], Policy], *, first: int, slot_bytes: int
    ) -> None:
        super().__init__(partitions, make_policy, first=first, slot_bytes=slot_bytes)
        self.starved: deque[Demand] = deque()  # demands that hold no slot and wait for one, in order of arrival


@dataclass(eq=False, slots=True)
class Load:
    """The load of a record into a slot, and the demands that wait for the record."""

    pool: Pool
    key: ExpertKey
    slot: PoolSlot
    is_prefetch: bool  # the load was begun for a prefetch request or for the warm-up, not for a demand
    is_warmup: bool  # the load was begun for the warm-up
    # a loader reads the record; a prefetch is begun by the loader that reads it, so this is true at once
    is_taken: bool
    is_cancelled: bool = False  # the record is not needed any more, and no loader has taken the load
    has_yielded: bool = False  # the read has paused while records were read for demands
    waiters: list[Demand] = field(default_factory=list)  # demands that wait for the record

    @property
    def is_queued(self) -> bool:
        """True until a loader takes the load, or the load is cancelled."""
        return not (self.is_taken or self.is_cancelled)


@dataclass(frozen=True, slots=True)
class Granted:
    """Event: a lease was granted. Until the lease is released, the slot holds the record and keeps its generation."""

    request: int  # number of the request
    key: ExpertKey
    slot: TierSlot
    generation: int  # generation of the slot in the arena's directory


@dataclass(frozen=True, slots=True)
class Failed:
    """Event: a request has failed. The request is over, and all of its leases have ended."""

    request: int  # number of the request
    error: BaseException


Event = Granted | Failed


class Caller:
    """The caller of demands. This base class fits a thread, which may take any number of slots."""

    __slots__ = ()

    is_asynchronous: ClassVar[bool] = False  # the caller gets events

    @property
    def is_full(self) -> bool:
        """True if the caller's demands may not take more slots."""
        return False

    def was_full(self, released: int) -> bool:
        """Return whether the caller was full, and no longer is, since its demands have released so many slots."""
        return False

    def open_demands(self) -> Collection[Demand]:
        """Return the caller's demands that have been registered and are not over."""
        return ()

    def register(self, demand: Demand) -> None:
        """Note that a demand of the caller has begun."""

    def deregister(self, demand: Demand) -> None:
        """Note that a demand of the caller is over."""


@dataclass(frozen=True, slots=True)
class ThreadCaller(Caller):
    """A thread of this process, which sleeps until its records are available."""

    thread: int  # id of the thread


class AsyncCaller(Caller):
    """A caller that gets events, instead of sleeping until its records are available.

    ``deliver`` is called with each event, in any thread, with the tier's lock held. It must neither wait nor call the
    tier. The caller holds or claims at most ``leases`` slots at a time.
    """

    is_asynchronous = True

    def __init__(self, deliver: Callable[[Event], None], leases: int) -> None:
        assert leases > 0
        self.deliver = deliver
        self.leases = leases
        self.demands: dict[int, Demand] = {}  # from the number of each demand that is not over to the demand

    @property
    def outstanding(self) -> int:
        """Number of slots that the caller's demands hold or claim."""
        return sum([demand.outstanding for demand in list(self.demands.values())])

    @property
    def is_full(self) -> bool:
        """True if the caller's demands hold or claim ``leases`` slots, so that they may not take more."""
        return self.outstanding >= self.leases

    def was_full(self, released: int) -> bool:
        """Return whether the caller was full, and no longer is, since its demands have released so many slots."""
        return self.outstanding < self.leases <= self.outstanding + released

    def open_demands(self) -> Collection[Demand]:
        """Return the caller's demands that are not over."""
        return self.demands.values()

    def register(self, demand: Demand) -> None:
        """Note that a demand of the caller has begun."""
        self.demands[demand.number] = demand

    def deregister(self, demand: Demand) -> None:
        """Note that a demand of the caller is over."""
        self.demands.pop(demand.number, None)


@dataclass(eq=False, slots=True)
class Demand:
    """One call of ``acquire``.

    Until its lease ends, each key goes through ``pending``, ``loads``, ``ready`` and ``leased``. A key whose record is
    READY when the demand comes begins in ``ready``. This class has no base class in common with ``DeviceDemand``,
    because the two differ too much: a DeviceDemand copies one record at a time, in the caller's own thread, and never
    waits for a read.
    """

    pool: Pool
    block: int
    caller: Caller  # loaders serve callers in turn
    number: int = 0  # the number that an asynchronous caller has given to the demand
    timeout: float = 0.0  # seconds without a slot after which the demand of an asynchronous caller fails
    is_scan: bool = False  # the demand is for more records than its block can keep
    pending: dict[ExpertKey, None] = field(default_factory=dict)  # keys for which the demand has no slot yet
    loads: list[Load] = field(default_factory=list)  # loads that the demand waits for; it has claims on their slots
    ready: deque[PoolSlot] = field(default_factory=deque)  # slots that are pinned for the demand, but not leased yet
    hits: int = 0  # how many of the slots in ``ready`` were READY when the demand came
    leased: dict[PoolSlot, None] = field(default_factory=dict)  # slots that are pinned and leased
    error: BaseException | None = None  # the error with which the demand has failed
    waits_since: float | None = None  # time since when the caller has waited without a lease; None while it has one

    @property
    def is_idle(self) -> bool:
        """True if the demand neither holds nor claims a slot."""
        return not self.ready and not self.loads and not self.leased

    @property
    def is_over(self) -> bool:
        """True if the demand neither holds nor claims a slot, and needs none any more."""
        return not self.pending and self.is_idle

    @property
    def slots(self) -> list[PoolSlot]:
        """The slots that the demand holds or claims."""
        return [*self.leased, *self.ready, *(load.slot for load in self.loads)]

    @property
    def outstanding(self) -> int:
        """Number of slots that the demand holds or claims."""
        return len(self.loads) + len(self.ready) + len(self.leased)


class Notifier:
    """Wakes threads that can go on after a transition."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        # The queues are SimpleQueues because a finalizer may put an item into them, at any time, in any thread.
        self.loaders: SimpleQueue[None] = SimpleQueue()  # each item wakes one loader, which reads all there is to read
        self.timekeeper: SimpleQueue[None] = SimpleQueue()  # an item makes the timekeeper look at the deadlines again

    def wake_callers(self) -> None:
        """Wake all callers that sleep, and all loaders that have paused, and ``serve_asynchronous``."""
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
            self._notifier.wake_callers()  # the next demand in the queue may find a slot too
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
            self._notifier.wake_callers()

    def expire(self) -> float | None:
        """Fail asynchronous demands whose deadlines have passed. Return the next deadline, or None."""
        now = self._clock()
        for demand in [demand for demand, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[demand]
            demand.error = _exhausted(demand)
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
        self._notifier.wake_callers()


def _exhausted(demand: Demand) -> ExhaustedError:
    caller = demand.caller
    if isinstance(caller, AsyncCaller) and caller.is_full:
        return ExhaustedError(
            f"The client holds all of its {caller.leases} leases, and released none for {demand.timeout:g} seconds.",
            "Release leases in the client, or start the daemon with more --leases.",
        )
    return ExhaustedError(
        f"All slots of the host tier are leased, and none became free for {demand.timeout:g} seconds.",
        "Try again, give the daemon more memory (--ram), or run fewer clients at the same time.",
    )
