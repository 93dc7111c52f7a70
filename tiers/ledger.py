"""The host tier's bookkeeping: who wants what, what is under way, and which slot it goes into.

No I/O, no thread, no lock: its owner calls every method with its lock held. Nobody waits for ever, by this invariant:

    A caller of acquire sleeps only while it holds no READY slot at all: residents and arrivals are yielded first.
    What it may hold meanwhile are claims on LOADING slots, and loaders never wait for a slot.

So every LOADING slot becomes READY or EMPTY, and every READY slot that is pinned belongs to a caller that is awake and
computes; it gives the slot back when it takes its next lease. A caller that has nothing in flight and finds no slot is
*hungry*. It waits for the first slot that anybody gives back, first come, first served; while somebody is hungry nobody
else begins a load.

A caller may be a thread that sleeps until it is woken, or a *party*: one that is told, such as a session of another
process. A party's demands go on in ``serve``. It may hold several leases at a time, never more than it is granted, and
a demand of it that has nothing for too long fails: what another process does not give back must not stop others.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial

from .directory import Directory
from .errors import ExhaustedError
from .keys import ExpertKey
from .order import DEFAULT_ORDER, ORDERS
from .policy import BlockPolicy, Group
from .slots import Slots, State
from .stats import TierCounters
from .wishes import Wishes


class Pool:
    """The slots of one record geometry. ``first`` is the number of its first slot in the tier."""

    def __init__(
        self, count: int, groups: Sequence[Group], first: int, slot_bytes: int, order: str = DEFAULT_ORDER
    ) -> None:
        self.slots = Slots(count)
        self.policy = BlockPolicy(self.slots, groups, ORDERS[order])
        self.first = first
        self.slot_bytes = slot_bytes
        self.hungry: deque[Demand] = deque()


class Load:
    """A record on its way into a slot, and who waits for it."""

    __slots__ = ("began", "is_taken", "key", "pool", "slot", "waiters", "warmed", "was_late", "wished")

    def __init__(
        self, pool: Pool, key: ExpertKey, slot: int, *, wished: bool, began: float, warmed: bool = False
    ) -> None:
        self.pool = pool
        self.key = key
        self.slot = slot
        self.wished = wished  # a wish began it, or
        self.warmed = warmed  # the warm-up, which stands back as wishes do
        self.began = began  # seconds, of the ledger's clock
        self.was_late = False  # a demand came while a wish's was under way
        self.is_taken = wished  # by a loader: a wish is begun by the loader that reads it
        self.waiters: list[Demand] = []


class Party(ABC):
    """A caller that is told instead of woken. ``leases`` slots are held for it at most, claims counted."""

    def __init__(self, leases: int) -> None:
        assert leases > 0
        self.leases = leases
        self.outstanding = 0  # slots that its demands hold or claim; the ledger counts
        self.demands: dict[Demand, None] = {}

    @abstractmethod
    def grant(self, demand: Demand, slot: int) -> None:
        """A slot is the demand's, until it is released."""

    @abstractmethod
    def refuse(self, demand: Demand, error: BaseException) -> None:
        """The demand has failed; it holds nothing any more."""

    @property
    def is_full(self) -> bool:
        return self.outstanding >= self.leases


class Demand:
    """One call of acquire. Each of its keys is in one of pending, loads, ready, held, or is done with."""

    __slots__ = (
        *("block", "caller", "error", "held", "loads", "party", "passing", "patience", "pending", "pool", "ready"),
        "residents",
    )

    def __init__(
        self, pool: Pool, block: int, *, caller: Hashable, party: Party | None = None, patience: float = 0.0
    ) -> None:
        self.pool = pool
        self.block = block
        self.caller = caller  # whose turn it is in
        self.party = party
        self.patience = patience  # seconds that a party's demand waits while it has nothing
        self.passing = False  # a passage: wants more than its block can keep
        self.pending: dict[ExpertKey, None] = {}  # no slot yet
        self.loads: list[Load] = []  # claims
        self.ready: deque[int] = deque()  # pinned, not leased yet
        self.residents = 0  # of those that are ready: how many were when it came
        self.held: dict[int, None] = {}  # pinned, leased
        self.error: BaseException | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing to compute with, and nothing in flight that will be."""
        return not self.ready and not self.loads and not self.held

    @property
    def is_over(self) -> bool:
        return not self.pending and self.is_idle

    @property
    def outstanding(self) -> int:
        """Slots that it holds or claims."""
        return len(self.loads) + len(self.ready) + len(self.held)


class Ledger:
    """``wake`` wakes the callers that sleep, and has ``serve`` called soon; ``ring`` wakes a loader, ``watch`` whoever
    calls ``expire`` in time. ``ahead`` loads of one caller are in flight at most, and twice as many of its arrivals
    wait for it; ``prefetches`` loads that wishes began."""

    def __init__(
        self,
        directory: Directory,
        *,
        wake: Callable[[], None],
        ring: Callable[[], None],
        watch: Callable[[], None],
        ahead: int,
        prefetches: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = TierCounters("host")
        self.is_dropped = False
        self.uses: dict[ExpertKey, int] | None = None  # how often each was wanted; None: not counted
        self._directory = directory
        self._wake = wake
        self._ring = ring
        self._watch = watch
        self._ahead = ahead
        self._prefetches = prefetches
        self._clock = clock
        self._turns: OrderedDict[Hashable, deque[Load]] = OrderedDict()  # by caller, last served last: not taken yet
        self._wishes: Wishes[Pool] = Wishes()
        self._warming: deque[tuple[Pool, ExpertKey]] = deque()  # not begun
        self._warmed: set[ExpertKey] = set()  # brought by the warm-up, READY, not wanted yet
        self._unused: dict[ExpertKey, float] = {}  # brought by wishes, READY: seconds that each read took
        self._loads: dict[ExpertKey, Load] = {}
        self._demands: set[Demand] = set()
        self._stirred: dict[Demand, None] = {}  # of parties: those that may go on
        self._deadlines: dict[Demand, float] = {}  # of parties: those that have nothing
        self._hungry_parties: dict[Pool, None] = {}  # where some of the hungry may be a party's

    # -- callers ------------------------------------------------------------------------------------------------------

    def look(self, demand: Demand, keys: Sequence[ExpertKey]) -> None:
        """Pins the residents, joins what is under way, begins what can be begun."""
        self._demands.add(demand)
        if demand.party is not None:
            demand.party.demands[demand] = None
        self.wish(demand.pool, demand.block, (), wisher=demand.party)
        slots = demand.pool.slots
        distinct = dict.fromkeys(keys)
        self.count(distinct)
        demand.passing = demand.pool.policy.is_passage(demand.block, len(distinct))
        for key in distinct:
            slot = slots.find(key)
            is_full = demand.party is not None and demand.party.is_full
            if slot is not None and slots.is_ready(slot) and not is_full:
                self._attach(demand, slot)
                demand.ready.append(slot)
                self._was_used(key)
            else:
                demand.pending[key] = None
        demand.residents = len(demand.ready)
        self.counters.hits += len(demand.ready)
        self.counters.misses += len(demand.pending)
        self.advance(demand)
        for key in reversed(distinct):  # what is given first is evicted last
            slot = slots.find(key)
            if slot is not None:
                demand.pool.policy.touch(slot, passing=demand.passing)
        if demand.party is not None:
            self.stir(demand)

    def advance(self, demand: Demand) -> None:
        """Joins the loads of pending keys, and begins more of them as far as slots can be had."""
        pool = demand.pool
        party = demand.party
        full = False  # no slot is to be had
        for key in list(demand.pending):
            if party is not None and party.is_full:
                break
            slot = pool.slots.find(key)
            if slot is not None:  # a wish, or somebody else since this caller looked
                self.counters.joined += 1
                self._attach(demand, slot)
                if pool.slots.is_ready(slot):
                    demand.ready.append(slot)
                    self._was_used(key)
                else:
                    self._join(demand, self._loads[key])
            elif full or not self._may_begin(demand):
                continue
            elif (slot := self._choose(demand)) is not None:
                load = self._begin(pool, key, slot, wished=False, passing=demand.passing)
                self._attach(demand, slot)
                self._join(demand, load)
                self._ring()
            else:
                full = True
                continue
            del demand.pending[key]
            self._no_longer_hungry(demand)
        if demand.pending and demand.is_idle:
            if party is not None:
                self._set_deadline(demand)
                self._hungry_parties[pool] = None
            if demand not in pool.hungry and not (party is not None and party.is_full):
                pool.hungry.append(demand)

    def take(self, demand: Demand) -> int:
        """Leases the next slot of those that are ready."""
        slot = demand.ready.popleft()
        demand.residents = max(demand.residents - 1, 0)
        demand.held[slot] = None
        return slot

    def release(self, demand: Demand, slots: Sequence[int] | None = None) -> None:
        """Ends leases: those of ``slots`` that the demand holds, or all."""
        for slot in list(demand.held) if slots is None else slots:
            if slot in demand.held:
                del demand.held[slot]
                self._detach(demand, slot)

    def leave(self, demand: Demand) -> None:
        """Gives back all that a caller holds and waits for. What a loader has begun goes on, and is kept; what nobody
        else wants is not begun any more: who asks and goes would else fill all slots with what is of no use."""
        self._no_longer_hungry(demand)
        demand.pending.clear()
        self.release(demand)
        while demand.ready:
            self._detach(demand, demand.ready.popleft())
        while demand.loads:
            load = demand.loads.pop()
            load.waiters.remove(demand)
            self._detach(demand, load.slot)
            if not load.waiters and not load.is_taken:
                load.is_taken = True
                self._void(load)
        self._demands.discard(demand)
        self._stirred.pop(demand, None)
        self._deadlines.pop(demand, None)
        if demand.party is not None:
            demand.party.demands.pop(demand, None)

    def use(self, pool: Pool, key: ExpertKey) -> None:
        """A record was used by somebody who found it in the directory."""
        self.counters.hits += 1
        self.count((key,))
        slot = pool.slots.find(key)
        if slot is not None:
            pool.policy.touch(slot)
            self._was_used(key)

    def count(self, keys: Iterable[ExpertKey]) -> None:
        """Uses, where they are counted."""
        if self.uses is not None:
            for key in keys:
                self.uses[key] = self.uses.get(key, 0) + 1

    # -- parties ------------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Goes on with every demand of a party that can: grants what is ready, refuses what has failed."""
        while True:
            while self._stirred:
                demand = next(iter(self._stirred))
                del self._stirred[demand]
                self._go_on(demand)
            if not any(self._feed(pool) for pool in list(self._hungry_parties)):
                return

    def stir(self, demand: Demand) -> None:
        """``serve`` looks whether a party's demand can go on."""
        self._stirred[demand] = None

    def expire(self) -> float | None:
        """Fails the demands that have waited for too long, of which ``serve`` tells their parties. Returns the time of
        the next, None if nobody waits."""
        now = self._clock()
        for demand in [demand for demand, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[demand]
            demand.error = _exhausted(demand)
            self.stir(demand)
        return min(self._deadlines.values(), default=None)

    def _go_on(self, demand: Demand) -> None:
        party = demand.party
        assert party is not None
        if demand.error is None and demand.pending:
            self.advance(demand)
        if demand.error is not None:
            self.leave(demand)
            party.refuse(demand, demand.error)
            return
        while demand.ready:
            party.grant(demand, self.take(demand))
        if demand.is_over:
            self.leave(demand)

    def _feed(self, pool: Pool) -> bool:
        """Whether the first of the hungry, a party's, is fed now."""
        head = pool.hungry[0] if pool.hungry else None
        if head is None or not any(demand.party for demand in pool.hungry):
            del self._hungry_parties[pool]
            return False
        if head.party is None:
            return False  # woken, it comes by itself
        self._go_on(head)
        return not head.is_idle

    # -- wishes -------------------------------------------------------------------------------------------------------

    def wish(self, pool: Pool, block: int, wishes: Sequence[ExpertKey], *, wisher: Party | None = None) -> None:
        """Replaces a wisher's wishes for a block; the tier's own are nobody's. What is there already stays the longer
        for being wished, and wakes nobody."""
        absent = [key for key in wishes if pool.slots.find(key) is None]
        self.counters.cancelled += self._wishes.replace(wisher, block, pool, wishes, absent)
        if absent:
            self._ring_for_wishes()

    def withdraw_wishes(self, wisher: Party) -> None:
        """All of a wisher's."""
        self._wishes.withdraw(wisher)

    def warm(self, pool: Pool, keys: Sequence[ExpertKey]) -> None:
        """Reads these beforehand, behind all wishes, each into an EMPTY slot of its group or not at all."""
        self._warming.extend((pool, key) for key in keys)
        self._ring_for_wishes()

    def _begin_wish(self) -> Load | None:
        """None while anything is read for a demand: wishes have what demands leave of the disk."""
        if self._is_reading_for_demands or self._prefetching >= self._prefetches:
            return None
        for wisher, pool, key in self._wishes.take(lambda pool: not pool.hungry):
            if pool.slots.find(key) is None:
                slot = pool.policy.choose(key.block, keep=self._wishes.__contains__)
                if slot is not None:
                    self._wishes.served(wisher)
                    self.counters.prefetched += 1
                    return self._begin(pool, key, slot, wished=True)
        while self._warming:
            pool, key = self._warming.popleft()
            if pool.slots.find(key) is None and not pool.hungry:
                slot = pool.policy.vacancy(key.block)
                if slot is not None:
                    return self._begin(pool, key, slot, wished=True, warmed=True)
        return None

    def _ring_for_wishes(self) -> None:
        waiting = len(self._wishes) + len(self._warming)
        if waiting and not self._is_reading_for_demands:
            for _ in range(min(waiting, self._prefetches - self._prefetching)):
                self._ring()

    @property
    def _is_reading_for_demands(self) -> bool:
        return any(load.waiters or not load.wished for load in self._loads.values())

    @property
    def _prefetching(self) -> int:
        return sum(load.wished for load in self._loads.values())

    def _was_used(self, key: ExpertKey) -> None:
        """By a demand: if a wish brought it, or the warm-up, that was right."""
        if key in self._warmed:
            self._warmed.remove(key)
            self.counters.recalled += 1
        if (seconds := self._unused.pop(key, None)) is not None:
            self.counters.useful += 1
            self.counters.saved_seconds += seconds

    # -- loaders ------------------------------------------------------------------------------------------------------

    def next_load(self) -> Load | None:
        """What a loader does next; None if there is nothing to do. Demands first, and of those one of the caller who
        was served the longest ago: somebody's hundred are not before another's one."""
        for caller, queue in self._turns.items():
            while queue:
                load = queue.popleft()
                if not load.is_taken:  # in the turn of another, who wants it too
                    load.is_taken = True
                    self._turns.move_to_end(caller)
                    return load
        return self._begin_wish()

    def arrive(self, load: Load) -> None:
        """Its record is in the slot."""
        del self._loads[load.key]
        load.pool.slots.fill(load.slot)
        self._directory.publish(load.key, load.pool.first + load.slot)
        self.counters.bytes_in += load.pool.slot_bytes
        if load.warmed:
            self.counters.warmed += 1
            if load.was_late:
                self.counters.recalled += 1
            else:
                self._warmed.add(load.key)
        elif load.wished and not load.was_late:
            self._unused[load.key] = self._clock() - load.began
        for demand in load.waiters:
            demand.loads.remove(load)
            demand.ready.append(load.slot)
            if demand.party is not None:
                self.stir(demand)
        self._wake()
        if load.waiters or not load.wished:
            self._ring_for_wishes()  # perhaps it was the last for a demand

    def stands_back(self, load: Load) -> bool:
        """Whether a load that nobody but wishes wants is to wait, as others are read for demands."""
        return not load.waiters and self._is_reading_for_demands

    def is_unwanted(self, load: Load) -> bool:
        """Whether a load that a wish began is for nobody any more; of the warm-up, whether it is in anybody's way."""
        if load.warmed and not load.waiters:
            return self.is_dropped or bool(load.pool.hungry)
        return not load.waiters and load.key not in self._wishes

    def cancel(self, load: Load) -> None:
        """It was unwanted, and is not read to its end."""
        self.counters.cancelled += not load.warmed
        self._void(load)
        self._wake()

    def fail(self, load: Load, error: BaseException) -> None:
        """Its record won't come. The slot is EMPTY again, and everyone who waits for it gets the error."""
        self._void(load)
        for demand in load.waiters:
            demand.loads.remove(load)
            demand.error = demand.error or error
            self._count(demand, -1)
            if demand.party is not None:
                self.stir(demand)
        self._wake()

    def drop(self, error: BaseException) -> None:
        """No loader will begin anything any more, and nobody is to ask."""
        self.is_dropped = True
        self._wishes.clear()
        self._warming.clear()
        queued = [load for queue in self._turns.values() for load in queue]
        self._turns.clear()
        for load in queued:
            if not load.is_taken:
                load.is_taken = True
                self.fail(load, error)
        for demand in self._demands:
            if demand.party is not None:
                demand.error = demand.error or error
                self.stir(demand)
        self._wake()

    def adopt(self, pool: Pool, key: ExpertKey, slot: int) -> None:
        """A record that is in a slot of the tier from the beginning, as the directory says already."""
        pool.slots.begin(slot - pool.first, key)
        pool.slots.fill(slot - pool.first)
        pool.policy.admit(key.block, slot - pool.first)

    # -- common -------------------------------------------------------------------------------------------------------

    def _may_begin(self, demand: Demand) -> bool:
        hungry = demand.pool.hungry
        if len(demand.loads) >= self._ahead or (hungry and hungry[0] is not demand):
            return False
        arrivals = len(demand.ready) - demand.residents
        return demand.party is not None or len(demand.loads) + arrivals < 2 * self._ahead

    def _choose(self, demand: Demand) -> int | None:
        choose = partial(demand.pool.policy.choose, demand.block, borrow=demand.is_idle, passing=demand.passing)
        slot = choose(keep=self._wishes.__contains__)
        return choose() if slot is None else slot

    def _begin(
        self, pool: Pool, key: ExpertKey, slot: int, *, wished: bool, passing: bool = False, warmed: bool = False
    ) -> Load:
        old = None
        if pool.slots.is_ready(slot):
            old = pool.slots.key(slot)
            pool.policy.forget(slot)
            pool.slots.evict(slot)
            self.counters.evictions += 1
            if self._unused.pop(old, None) is not None:
                self.counters.wasted += 1
            self._warmed.discard(old)
        self._directory.withdraw(old, pool.first + slot)
        pool.slots.begin(slot, key)
        pool.policy.admit(key.block, slot, passing=passing, early=wished)
        load = self._loads[key] = Load(pool, key, slot, wished=wished, began=self._clock(), warmed=warmed)
        return load

    def _void(self, load: Load) -> None:
        del self._loads[load.key]
        load.pool.policy.forget(load.slot)
        load.pool.slots.fail(load.slot)
        self._directory.void(load.pool.first + load.slot)

    def _join(self, demand: Demand, load: Load) -> None:
        if load.wished and not load.was_late:
            load.was_late = True
            if not load.warmed:
                self.counters.late += 1
                self.counters.saved_seconds += self._clock() - load.began
            self._wake()  # it may stand back
        load.waiters.append(demand)
        demand.loads.append(load)
        if not load.is_taken:  # it comes in the turn of whoever is first
            self._queue(demand.caller).append(load)

    def _queue(self, caller: Hashable) -> deque[Load]:
        queue = self._turns.get(caller)
        if queue is None:
            # Whoever wants nothing and was served before all who wait may be forgotten: he would come back to the same
            # place. Anybody else would overtake those who wait, again and again.
            while self._turns and not next(iter(self._turns.values())):
                self._turns.popitem(last=False)
            queue = self._turns[caller] = deque()
            self._turns.move_to_end(caller, last=False)
        return queue

    def _attach(self, demand: Demand, slot: int) -> None:
        demand.pool.slots.pin(slot)
        self._count(demand, 1)

    def _detach(self, demand: Demand, slot: int) -> None:
        pool = demand.pool
        if not pool.slots.unpin(slot) and pool.hungry:
            self._wake()
        self._count(demand, -1)

    def _count(self, demand: Demand, change: int) -> None:
        """One slot more or less that a party's demand holds or claims."""
        party = demand.party
        if party is None:
            return
        was_full = party.is_full
        party.outstanding += change
        if change > 0:
            self._deadlines.pop(demand, None)
        if party.is_full and not was_full:  # nobody is to wait behind who may not take
            for other in party.demands:
                self._no_longer_hungry(other)
        elif was_full and not party.is_full:
            # whoever has nothing first, and of those who has waited the longest: a request for many keys holds up none
            for other in sorted(party.demands, key=lambda other: self._deadlines.get(other, math.inf)):
                if other.pending:
                    self.stir(other)
            self._wake()

    def _set_deadline(self, demand: Demand) -> None:
        if demand not in self._deadlines:
            self._deadlines[demand] = self._clock() + demand.patience
            self._watch()

    def _no_longer_hungry(self, demand: Demand) -> None:
        hungry = demand.pool.hungry
        if demand in hungry:
            hungry.remove(demand)
            self._wake()  # the next in the row may find a slot too
            self._ring()  # wishes stand back while somebody is hungry

    def check_integrity(self, pools: Sequence[Pool]) -> None:
        """Asserts that slots, groups, loads, callers and the directory agree; ``pools`` are all, in their order."""
        states: list[tuple[ExpertKey | None, bool]] = []
        for pool in pools:
            pool.slots.check_integrity()
            pool.policy.check_integrity()
            assert pool.first == len(states)
            pins = [0] * pool.slots.count
            for demand in self._demands:
                if demand.pool is pool:
                    for slot in [*demand.held, *demand.ready, *(load.slot for load in demand.loads)]:
                        pins[slot] += 1
            assert pins == [pool.slots.pins(slot) for slot in range(pool.slots.count)]
            loading = {pool.slots.key(slot) for slot in range(len(pins)) if pool.slots.state(slot) is State.LOADING}
            assert loading == {key for key, load in self._loads.items() if load.pool is pool}
            assert all(demand in self._demands and demand.is_idle and demand.pending for demand in pool.hungry)
            for slot in range(pool.slots.count):
                state = pool.slots.state(slot)
                states.append((None if state is State.EMPTY else pool.slots.key(slot), state is State.LOADING))
        self._directory.check_integrity(states)
        for key, load in self._loads.items():
            assert load.key == key
            assert load.waiters == [demand for demand in load.waiters if load in demand.loads]
        assert all(self._loads[load.key] is load for demand in self._demands for load in demand.loads)
        queued = [load for queue in self._turns.values() for load in queue if not load.is_taken]
        assert all(self._loads[load.key] is load for load in queued)
        assert {load.key for load in queued} == {key for key, load in self._loads.items() if not load.is_taken}
        self._check_parties()

    def _check_parties(self) -> None:
        parties = {demand.party for demand in self._demands if demand.party is not None}
        for party in parties:
            assert party.demands.keys() == {demand for demand in self._demands if demand.party is party}
            assert party.outstanding == sum(demand.outstanding for demand in party.demands) <= party.leases
            for demand in party.demands:
                stirred = demand in self._stirred
                assert stirred or not demand.ready, "who is told does not have to ask"
                assert stirred or not demand.is_over
                waits = bool(demand.pending) and demand.is_idle
                assert stirred or waits == (demand in self._deadlines)
                assert not party.is_full or demand not in demand.pool.hungry
                assert stirred or party.is_full or not waits or demand in demand.pool.hungry
        assert all(demand in self._demands for demand in (*self._stirred, *self._deadlines))


def _exhausted(demand: Demand) -> ExhaustedError:
    party = demand.party
    if party is not None and party.is_full:
        return ExhaustedError(
            f"The client holds all {party.leases} leases that it may: none was given back in {demand.patience:g} s.",
            "Release some, or give it more (moetier daemon --leases).",
        )
    return ExhaustedError(
        f"All slots of the host tier are leased: none came free in {demand.patience:g} seconds.",
        "Try again, give the daemon more memory, or have fewer clients at a time.",
    )
