"""Demands, what they refer to (pools of slots, loads, asynchronous callers and their events), and where they wait.

These classes refer to one another, so they share a module. Callers of their methods hold the host tier's lock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from moetier.tiers.cache.budget import Group
from moetier.tiers.cache.policies import Policy
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.errors import ExhaustedError
from moetier.tiers.layout import ExpertKey


class Pool(SlotPool):
    """The host tier's slots for records of one layout."""

    def __init__(
        self, groups: Sequence[Group], make_policy: Callable[[int], Policy], *, first: int, slot_bytes: int
    ) -> None:
        super().__init__(groups, make_policy, first=first, slot_bytes=slot_bytes)
        self.starved: deque[Demand] = deque()  # demands that hold nothing and wait for a slot, in order of arrival


@dataclass(eq=False, slots=True)
class Load:
    """A record on its way into a slot, and the demands that wait for it."""

    pool: Pool
    key: ExpertKey
    slot: int
    is_prefetch: bool  # begun for a prefetch request or for the warm-up, not for a demand
    is_warmup: bool  # begun for the warm-up
    is_taken: bool  # a loader reads the record; true at once for a prefetch, which is begun by the loader that reads it
    has_yielded: bool = False  # the read was paused while records were read for demands
    waiters: list[Demand] = field(default_factory=list)  # demands that wait for the record


@dataclass(frozen=True, slots=True)
class Granted:
    """Event: a lease was granted. Until it is released, the slot holds the record and keeps this generation."""

    request: int  # number of the request
    key: ExpertKey
    slot: int  # number of the slot in the tier
    generation: int  # generation of the slot in the arena's directory


@dataclass(frozen=True, slots=True)
class Failed:
    """Event: a request has failed. It is over, and its leases have ended."""

    request: int  # number of the request
    error: BaseException


Event = Granted | Failed


class AsyncCaller:
    """A caller that gets events instead of sleeping until its records are available.

    ``deliver`` is called with each event, in any thread and with the tier's lock held. It must not wait and must not
    call the tier. The caller holds at most ``leases`` slots at a time, slots that are still being filled included.
    """

    def __init__(self, deliver: Callable[[Event], None], leases: int) -> None:
        assert leases > 0
        self.deliver = deliver
        self.leases = leases
        self.demands: dict[int, Demand] = {}  # the demands that are not over, by number

    @property
    def outstanding(self) -> int:
        """Number of slots that the caller's demands hold or claim."""
        return sum([demand.outstanding for demand in list(self.demands.values())])

    @property
    def is_full(self) -> bool:
        """True if the caller holds as many slots as it may."""
        return self.outstanding >= self.leases


@dataclass(eq=False, slots=True)
class Demand:
    """One call of acquire. Each key is in one of ``pending``, ``loads``, ``ready`` or ``held``, or its lease has ended.

    The class shares no base with the device tier's ``DeviceDemand``, as the two have little in common: a DeviceDemand
    copies one record at a time in the caller's own thread, and never waits for a read.
    """

    pool: Pool
    block: int
    caller: Hashable  # id of the caller; loaders serve callers in turn
    async_caller: AsyncCaller | None = None  # the caller, if it is asynchronous
    number: int = 0  # number of the demand, given by an asynchronous caller
    patience: float = 0.0  # seconds after which an asynchronous demand that holds nothing fails
    is_scan: bool = False  # the demand is for more records than its block can keep
    pending: dict[ExpertKey, None] = field(default_factory=dict)  # keys that have no slot yet
    loads: list[Load] = field(default_factory=list)  # loads that the demand waits for; it has claims on their slots
    ready: deque[int] = field(default_factory=deque)  # slots that are pinned for the demand, but not leased yet
    residents: int = 0  # how many slots in ``ready`` were READY when the demand came
    held: dict[int, None] = field(default_factory=dict)  # slots that are pinned and leased
    error: BaseException | None = None  # the error of a failed load
    stands_since: float | None = None  # time since which the caller has had no record to compute with, in seconds

    @property
    def is_idle(self) -> bool:
        """True if the demand has no slot: no lease, no record that is ready, and no load that it waits for."""
        return not self.ready and not self.loads and not self.held

    @property
    def is_over(self) -> bool:
        """True if the demand has no slot and needs none any more."""
        return not self.pending and self.is_idle

    @property
    def outstanding(self) -> int:
        """Number of slots that the demand holds or claims."""
        return len(self.loads) + len(self.ready) + len(self.held)


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
