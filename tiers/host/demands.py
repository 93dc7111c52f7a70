"""Demands, and what they refer to: pools of slots, loads, callers and events.

These classes refer to one another, so they are in one module. Callers of their methods hold the host tier's lock. A
demand changes its own fields, in its methods. Only the module ``loads`` changes a load. Other code reads these fields.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from moetier.tiers.cache.budget import Partition
from moetier.tiers.cache.policies import Policy
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey, PoolSlot, TierSlot


class Pool(SlotPool):
    """The host tier's slots for records of one layout."""

    def __init__(
        self, partitions: Sequence[Partition], make_policy: Callable[[int], Policy], *, first: int, slot_bytes: int
    ) -> None:
        super().__init__(partitions, make_policy, first=first, slot_bytes=slot_bytes)
        self.starved: deque[Demand] = deque()  # demands that hold no slot and wait for one, in order of arrival


class Purpose(Enum):
    """The reason why a load was begun."""

    DEMAND = "a demand"
    PREFETCH_REQUEST = "a prefetch request"
    WARMUP = "the warm-up"


class LoadState(Enum):
    """How far a load has come."""

    QUEUED = "no loader has taken it"
    TAKEN = "a loader reads the record"  # a load of a prefetch is begun by the loader that reads it
    CANCELLED = "the record is not needed any more, and no loader has taken the load"


@dataclass(eq=False, slots=True)
class Load:
    """The load of a record into a slot, and the demands that wait for the record."""

    pool: Pool
    key: ExpertKey
    slot: PoolSlot
    purpose: Purpose = Purpose.DEMAND
    state: LoadState = LoadState.QUEUED
    has_yielded: bool = False  # the read has paused while records were read for demands
    waiters: list[Demand] = field(default_factory=list)  # demands that wait for the record

    @property
    def is_prefetch(self) -> bool:
        """Whether the load was begun for a prefetch request or for the warm-up, not for a demand."""
        return self.purpose is not Purpose.DEMAND

    @property
    def is_for_demands(self) -> bool:
        """Whether the load was begun for a demand, or a demand waits for it."""
        return bool(self.waiters) or not self.is_prefetch


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


SessionEvent = Granted | Failed


class Caller:
    """The caller of demands. This base class fits a thread, which may take any number of slots."""

    __slots__ = ()

    is_asynchronous: ClassVar[bool] = False  # the caller gets events

    @property
    def is_full(self) -> bool:
        """Whether the caller's demands may not take more slots."""
        return False

    def was_full(self, released: int) -> bool:
        """Return whether the caller was full, and no longer is, since its demands have released so many slots."""
        return False

    def open_demands(self) -> Collection[Demand]:
        """Return the caller's demands that have been registered and are not over."""
        return ()

    def register(self, demand: Demand) -> None:
        """Note that a demand of the caller has begun."""

    def unregister(self, demand: Demand) -> None:
        """Note that a demand of the caller is over."""


@dataclass(frozen=True, slots=True)
class ThreadCaller(Caller):
    """A thread of this process, which sleeps until its records are available."""

    thread: int  # id of the thread


class AsyncCaller(Caller):
    """A caller that gets events, instead of sleeping until its records are available.

    ``deliver`` is called with each event, in any thread, with the tier's lock held. It must neither wait nor call the
    tier. The caller holds or claims at most ``max_leases`` slots at a time.
    """

    is_asynchronous = True

    def __init__(self, deliver: Callable[[SessionEvent], None], max_leases: int) -> None:
        assert max_leases > 0
        self.deliver = deliver
        self.max_leases = max_leases
        self.demands: dict[int, Demand] = {}  # from the number of each demand that is not over to the demand

    @property
    def outstanding(self) -> int:
        """Number of slots that the caller's demands hold or claim."""
        return sum([demand.outstanding for demand in list(self.demands.values())])

    @property
    def is_full(self) -> bool:
        """Whether the caller's demands hold or claim ``max_leases`` slots, so that they may not take more."""
        return self.outstanding >= self.max_leases

    def was_full(self, released: int) -> bool:
        """Return whether the caller was full, and no longer is, since its demands have released so many slots."""
        return self.outstanding < self.max_leases <= self.outstanding + released

    def open_demands(self) -> Collection[Demand]:
        """Return the caller's demands that are not over."""
        return self.demands.values()

    def register(self, demand: Demand) -> None:
        """Note that a demand of the caller has begun."""
        self.demands[demand.request] = demand

    def unregister(self, demand: Demand) -> None:
        """Note that a demand of the caller is over."""
        self.demands.pop(demand.request, None)


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
    request: int = 0  # the number that an asynchronous caller has given to the demand
    timeout: float = 0.0  # seconds without a slot after which the demand of an asynchronous caller fails
    is_scan: bool = False  # the demand is for more records than its block can keep
    pending: dict[ExpertKey, None] = field(default_factory=dict)  # keys for which the demand has no slot yet
    loads: list[Load] = field(default_factory=list)  # loads that the demand waits for; it has claims on their slots
    # slots that are pinned for the demand, but not leased yet: those that were READY when it came, and all others
    hits: deque[PoolSlot] = field(default_factory=deque)
    arrived: deque[PoolSlot] = field(default_factory=deque)
    leased: dict[PoolSlot, None] = field(default_factory=dict)  # slots that are pinned and leased
    error: BaseException | None = None  # the error with which the demand has failed
    waits_since: float | None = None  # time since when the caller has waited without a lease; None while it has one

    @property
    def is_idle(self) -> bool:
        """Whether the demand neither holds nor claims a slot."""
        return not (self.hits or self.arrived or self.loads or self.leased)

    @property
    def is_over(self) -> bool:
        """Whether the demand neither holds nor claims a slot, and needs none any more."""
        return not self.pending and self.is_idle

    @property
    def slots(self) -> list[PoolSlot]:
        """The slots that the demand holds or claims, each once even if ``lease`` was interrupted."""
        return list(dict.fromkeys([*self.leased, *self.ready, *(load.slot for load in self.loads)]))

    @property
    def ready(self) -> list[PoolSlot]:
        """The slots that are pinned for the demand and not leased yet, in the order in which they are leased."""
        return [*self.hits, *self.arrived]

    @property
    def outstanding(self) -> int:
        """Number of slots that the demand holds or claims."""
        return len(self.loads) + len(self.hits) + len(self.arrived) + len(self.leased)

    def begin(self, keys: Iterable[ExpertKey], *, is_scan: bool) -> None:
        """Begin with all ``keys`` pending."""
        self.is_scan = is_scan
        self.pending = dict.fromkeys(keys)

    def hold(self, key: ExpertKey, slot: PoolSlot, *, is_hit: bool = False) -> None:
        """Note that a READY slot was pinned for the demand. ``is_hit``: it was READY when the demand came."""
        (self.hits if is_hit else self.arrived).append(slot)
        self.pending.pop(key, None)

    def wait_for(self, load: Load) -> None:
        """Wait for a load, whose slot is pinned for the demand."""
        self.loads.append(load)
        self.pending.pop(load.key, None)

    def complete(self, load: Load) -> None:
        """Note that the record of a load has arrived in its slot."""
        self.arrived.append(load.slot)  # before ``remove``, so that an exception in between loses nothing
        self.loads.remove(load)

    def lose(self, load: Load, error: BaseException) -> None:
        """Fail with ``error``, because the record of a load will not arrive."""
        self.loads.remove(load)
        self.fail(error)

    def look_up_again(self, load: Load) -> None:
        """Make the key of a load pending, unless its record has arrived, because a transition was interrupted."""
        if load.slot not in self.ready:
            self.pending[load.key] = None
        self.loads.remove(load)

    def fail(self, error: BaseException) -> None:
        """Fail with ``error``, unless the demand has failed with another error before."""
        self.error = self.error or (error.fresh() if isinstance(error, MoetierError) else error)

    def lease(self, limit: int) -> list[PoolSlot]:
        """Lease up to ``limit`` of the slots that are ready, and return these slots."""
        slots: list[PoolSlot] = []
        while (queue := self.hits or self.arrived) and len(slots) < limit:
            self.leased[slot := queue[0]] = None  # before ``popleft``, so that an exception in between loses nothing
            queue.popleft()
            slots.append(slot)
        return slots

    def release(self, slots: Collection[PoolSlot | None]) -> list[PoolSlot]:
        """Release the leases of ``slots``, and return those of them that were leased."""
        ended = [slot for slot in slots if slot in self.leased]
        for slot in ended:
            del self.leased[slot]
        return ended

    def clear(self) -> tuple[list[PoolSlot], list[Load]]:
        """Let go of all slots and loads, and return them. The slots are still pinned."""
        slots, loads = self.slots, self.loads
        self.pending, self.loads = {}, []
        self.hits.clear()
        self.arrived.clear()
        self.leased.clear()
        return slots, loads

    def begin_wait(self, now: float) -> None:
        """Note that the caller waits without a lease. ``now`` is the time in seconds."""
        if self.waits_since is None:
            self.waits_since = now

    def end_wait(self, now: float) -> float:
        """Note that the caller, which has waited, gets a lease. Return how long it has waited, in seconds."""
        assert self.waits_since is not None
        since, self.waits_since = self.waits_since, None
        return now - since
