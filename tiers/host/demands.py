"""Demands and what they refer to: pools of slots, loads, asynchronous callers and their events.

These classes refer to one another, so they share a module. Callers of their methods hold the host tier's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from moetier.tiers.cache.budget import Group
from moetier.tiers.cache.policies import Policy
from moetier.tiers.cache.pool import SlotPool
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
