"""Entries of the host tier's ledger: pools of slots, loads, demands, their callers, and the demands that wait.

Part of the ledger: callers of these methods hold the lock of the ledger's owner.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from moetier.tiers.cache.budget import Group
from moetier.tiers.cache.orders import Order
from moetier.tiers.cache.pool import SlotPool
from moetier.tiers.errors import ExhaustedError
from moetier.tiers.layout import ExpertKey

READS_KEPT = 15  # latest reads of a pool; the median of their times is its read time


class Pool(SlotPool):
    """The host's slots of one record geometry."""

    def __init__(
        self, groups: Sequence[Group], make_order: Callable[[int], Order], *, first: int, slot_bytes: int
    ) -> None:
        super().__init__(groups, make_order, first=first, slot_bytes=slot_bytes)
        self.starved: deque[Demand] = deque()  # demands that hold nothing and wait for a slot, in order of arrival
        self.read_seconds: float | None = None  # median time of the latest reads; None before the first
        self._reads: deque[float] = deque(maxlen=READS_KEPT)  # seconds

    def note_read(self, seconds: float) -> None:
        """Record how long the read of one record took."""
        self._reads.append(seconds)
        self.read_seconds = median(self._reads)


class StagingBuffer:
    """The first ``filled`` bytes of a record."""

    def __init__(self, pool: Pool, key: ExpertKey, buffer: memoryview, step: int) -> None:
        self.pool = pool  # that the record belongs to
        self.key = key
        self.buffer = buffer
        self.step = step  # bytes of a piece
        self.filled = 0
        self.end = 0  # of the piece that is being read; else as ``filled``
        self.seconds = 0.0  # that reading has taken
        self.began = 0.0  # the latest piece, by the ledger's clock
        self.error: BaseException | None = None
        self.is_claimed = False  # by a load, which reads the rest
        self.piece_read = threading.Event()  # cleared while a piece is being read
        self.piece_read.set()

    @property
    def is_reading(self) -> bool:
        """True if a piece is being read into it."""
        return self.end > self.filled

    @property
    def is_full(self) -> bool:
        """True if all of the buffer is filled."""
        return self.filled == len(self.buffer)

    @property
    def is_idle(self) -> bool:
        """True if it is neither claimed nor being read into."""
        return not (self.is_claimed or self.is_reading)

    def begin_piece(self, now: float) -> StagingBuffer:
        """Note that the next piece is about to be read; return the buffer itself."""
        self.piece_read.clear()
        self.end = min(self.filled + self.step, len(self.buffer))
        self.began = now
        return self


@dataclass(eq=False, slots=True)
class Load:
    """A record on its way into a slot, and the demands that wait for it."""

    pool: Pool
    key: ExpertKey
    slot: int
    is_prefetch: bool  # begun for a prefetch request or for the warm-up, and not for a demand
    is_warmup: bool
    began: float  # seconds, by the ledger's clock
    is_taken: bool  # by a loader; a prefetch is begun by the loader that reads it
    has_yielded: bool = False  # paused while records were read for demands
    staged: StagingBuffer | None = None  # holds the beginning of the record, which was read ahead
    waiters: list[Demand] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease: the slot of the tier holds the record, of this generation, until the lease is released."""

    request: int
    key: ExpertKey
    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request is over, and its leases have ended."""

    request: int
    error: BaseException


Event = Granted | Failed


class AsyncCaller:
    """A caller that gets events instead of sleeping until its records are there.

    ``deliver`` is called in any thread, with the tier's lock held: it must neither wait nor call the tier. At most
    ``leases`` slots are held for the caller at a time, slots that are still being filled among them.
    """

    def __init__(self, deliver: Callable[[Event], None], leases: int) -> None:
        assert leases > 0
        self.deliver = deliver
        self.leases = leases
        self.demands: dict[int, Demand] = {}  # by number, those that are not over

    @property
    def outstanding(self) -> int:
        """Number of slots that its demands hold or claim."""
        return sum([demand.outstanding for demand in list(self.demands.values())])

    @property
    def is_full(self) -> bool:
        """True if as many slots are held for the caller as it may have."""
        return self.outstanding >= self.leases


@dataclass(eq=False, slots=True)
class Demand:
    """One call of acquire. Each key is in one of pending, loads, ready or held, or its lease has ended.

    It shares little with a ``DeviceDemand`` of the device tier: that copies one record at a time in the caller's own
    thread, and never waits for a read.
    """

    pool: Pool
    block: int
    caller: Hashable  # whose turn at the loaders it takes
    async_caller: AsyncCaller | None = None  # the caller, where it is one
    number: int = 0  # by which an asynchronous caller names the demand
    patience: float = 0.0  # seconds that an asynchronous demand waits while it has nothing
    is_scan: bool = False  # wants more records than its block can keep
    pending: dict[ExpertKey, None] = field(default_factory=dict)  # no slot yet
    loads: list[Load] = field(default_factory=list)  # claims on slots that are being filled
    ready: deque[int] = field(default_factory=deque)  # slots: pinned, not leased yet
    residents: int = 0  # how many of ``ready`` were READY when the demand came
    held: dict[int, None] = field(default_factory=dict)  # slots: pinned and leased
    error: BaseException | None = None
    stands_since: float | None = None  # seconds: since when the caller has had nothing to compute with

    @property
    def is_idle(self) -> bool:
        """True if it has nothing to compute with, and nothing in flight."""
        return not self.ready and not self.loads and not self.held

    @property
    def is_over(self) -> bool:
        """True if it waits for no slot and holds none."""
        return not self.pending and self.is_idle

    @property
    def outstanding(self) -> int:
        """Number of slots that it holds or claims."""
        return len(self.loads) + len(self.ready) + len(self.held)


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

    def took(self, demand: Demand) -> None:
        """Note that a demand holds or claims one more slot."""
        self.feed(demand)
        caller = demand.async_caller
        if caller is not None:
            self._deadlines.pop(demand, None)
            if caller.is_full:  # its other demands must not wait behind one that may not take a slot
                for other in caller.demands.values():
                    self.feed(other)

    def gave(self, demand: Demand, slots: int) -> None:
        """Note that an asynchronous demand holds or claims so many slots less."""
        caller = demand.async_caller
        assert caller is not None
        if caller.outstanding < caller.leases <= caller.outstanding + slots:  # it was full
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
        """Drop what is kept of a demand that goes."""
        if demand.pool.starved:
            self.feed(demand)
        if demand.async_caller is not None:
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
                self.recheck(demand)
        self.wake()

    def check_integrity(self, demands: Collection[Demand]) -> None:
        """Assert that no asynchronous demand is lost, and that none waits that could go on."""
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
