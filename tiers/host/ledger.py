"""The host tier's bookkeeping: who wants what, what is under way, and which slot it goes into.

No I/O, no thread, no lock: its owner calls every method with its lock held. Nobody waits for ever, by this invariant:

    A caller of acquire sleeps only while it holds no READY slot at all: residents and arrivals are yielded first.
    What it may hold meanwhile are claims on LOADING slots, and loaders never wait for a slot.

So every LOADING slot becomes READY or EMPTY, and every READY slot that is pinned belongs to a caller that is awake and
computes; it gives the slot back when it takes its next lease. A caller that has nothing in flight and finds no slot is
*hungry*. It waits for the first slot that anybody gives back, first come, first served; while somebody is hungry nobody
else begins a load.

A caller may be a thread that sleeps until it is woken, or a *party*: one that is told, such as a session of another
process. Somebody else takes a party's steps (``parties.py``). It may hold several leases at a time, never more than it
is granted, and a demand of it that has nothing for too long fails: what another process does not give back must not
stop others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial

from moetier.tiers.arena.directory import Directory
from moetier.tiers.cache.slots import State
from moetier.tiers.layout import ExpertKey
from moetier.tiers.stats import TierCounters

from .loads import Loads
from .prefetch import Early
from .requests import Demand, Pool
from .staging import Heads
from .waiting import Waiting


class Ledger:
    """Callers and their slots. ``waiting`` are those who have none yet, ``loads`` what is under way for them.

    ``wake`` wakes the callers that sleep, and has the parties served soon; ``ring`` wakes a loader, ``watch`` whoever
    sees to it that parties ``expire`` in time. ``ahead`` loads of one caller are in flight at most, and twice as many
    of its arrivals wait for it; ``prefetches`` reads for wishes, which begin in ``heads``, where there are any."""

    def __init__(
        self,
        directory: Directory,
        *,
        wake: Callable[[], None],
        ring: Callable[[], None],
        watch: Callable[[], None],
        ahead: int,
        prefetches: int,
        heads: Heads[Pool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = TierCounters("host")
        self.uses: dict[ExpertKey, int] | None = None  # how often each was wanted; None: not counted
        self._directory = directory
        self._early = Early(self.counters, heads)
        self.waiting = Waiting(wake=wake, ring=ring, watch=watch, clock=clock)
        self.loads = Loads(
            directory,
            self.counters,
            self._early,
            self.waiting,
            ring=ring,
            prefetches=prefetches,
            clock=clock,
        )
        self._ring = ring
        self._ahead = ahead
        self._demands: set[Demand] = set()

    def look(self, demand: Demand, keys: Sequence[ExpertKey]) -> None:
        """Pins the residents, joins what is under way, begins what can be begun."""
        self._demands.add(demand)
        if demand.party is not None:
            demand.party.demands[demand] = None
        self.loads.wish(demand.pool, demand.block, (), wisher=demand.party)
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
                self._early.use(key)
            else:
                demand.pending[key] = None
        demand.residents = len(demand.ready)
        self.counters.hits += len(demand.ready)
        self.counters.misses += len(demand.pending)
        self._advance(demand)
        for key in reversed(distinct):  # what is given first is evicted last
            slot = slots.find(key)
            if slot is not None and key not in demand.pending:  # else it is used when the party may have it
                demand.pool.policy.touch(slot, passing=demand.passing)
        if demand.party is not None:
            self.waiting.stir(demand)

    def advance(self, demand: Demand) -> None:
        """Joins the loads of pending keys, and begins more of them as far as slots can be had."""
        for slot in reversed(self._advance(demand)):
            demand.pool.policy.touch(slot, passing=demand.passing)

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
        self.waiting.feed(demand)
        demand.pending.clear()
        self.release(demand)
        while demand.ready:
            self._detach(demand, demand.ready.popleft())
        while demand.loads:
            load = demand.loads.pop()
            self._detach(demand, load.slot)
            self.loads.leave(demand, load)
        self._demands.discard(demand)
        self.waiting.forget(demand)
        if demand.party is not None:
            demand.party.demands.pop(demand, None)

    def lend(self, loan: Demand, key: ExpertKey) -> int | None:
        """Leases a slot to who wants nothing that is not READY, while nobody is hungry. Nothing is counted."""
        pool = loan.pool
        slot = pool.slots.find(key)
        if slot is None or not pool.slots.is_ready(slot) or pool.hungry:
            return None
        self._demands.add(loan)
        self._attach(loan, slot)
        loan.held[slot] = None
        self._early.lend(key)
        return slot

    def used_above(self, keys: Iterable[ExpertKey]) -> None:
        """By demands that the tier above met."""
        for key in keys:
            self._early.use(key)
        self.count(keys)

    def use(self, pool: Pool, key: ExpertKey) -> None:
        """A record was used by somebody who found it in the directory."""
        self.counters.hits += 1
        self.count((key,))
        slot = pool.slots.find(key)
        if slot is not None:
            pool.policy.touch(slot)
            self._early.use(key)

    def counted_uses(self) -> dict[ExpertKey, int]:
        """How often each key was wanted since the first call, which begins the counting."""
        if self.uses is None:
            self.uses = {}
        return dict(self.uses)

    def count(self, keys: Iterable[ExpertKey]) -> None:
        """Uses, where they are counted."""
        if self.uses is not None:
            for key in keys:
                self.uses[key] = self.uses.get(key, 0) + 1

    def demands_of(self, caller: Hashable) -> list[Demand]:
        """What a thread has not left."""
        return [demand for demand in self._demands if demand.party is None and demand.caller == caller]

    def drop(self, error: BaseException) -> None:
        """No loader will begin anything any more, and nobody is to ask."""
        self.loads.drop(error)
        for demand in self._demands:
            if demand.party is not None:
                demand.error = demand.error or error
                self.waiting.stir(demand)
        self.waiting.wake()

    def adopt(self, pool: Pool, key: ExpertKey, slot: int) -> None:
        """A record that is in a slot of the tier from the beginning, as the directory says already."""
        pool.slots.begin(slot - pool.first, key)
        pool.slots.fill(slot - pool.first)
        pool.policy.admit(key.block, slot - pool.first)

    def _advance(self, demand: Demand) -> list[int]:
        """The slots of what is pending no more, which are not touched yet."""
        pool, found = demand.pool, list[int]()
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
                    self._early.use(key)
                else:
                    self.loads.join(demand, key)
            elif full or not self._may_begin(demand):
                continue
            elif (slot := self._choose(demand)) is not None:
                self.loads.begin(pool, key, slot, wished=False, passing=demand.passing)
                self._attach(demand, slot)
                self.loads.join(demand, key)
                self._ring()
            else:
                full = True
                continue
            del demand.pending[key]
            found.append(slot)
            self.waiting.feed(demand)
        if demand.pending and demand.is_idle:
            self.waiting.starve(demand)
        return found

    def _may_begin(self, demand: Demand) -> bool:
        hungry = demand.pool.hungry
        if len(demand.loads) >= self._ahead or (hungry and hungry[0] is not demand):
            return False
        arrivals = len(demand.ready) - demand.residents
        return demand.party is not None or len(demand.loads) + arrivals < 2 * self._ahead

    def _choose(self, demand: Demand) -> int | None:
        choose = partial(demand.pool.policy.choose, demand.block, borrow=demand.is_idle, passing=demand.passing)
        slot = choose(keep=self._early.is_wished)
        return choose() if slot is None else slot

    def _attach(self, demand: Demand, slot: int) -> None:
        demand.pool.slots.pin(slot)
        self.waiting.count(demand, 1)

    def _detach(self, demand: Demand, slot: int) -> None:
        pool = demand.pool
        if not pool.slots.unpin(slot):
            if pool.hungry:
                self.waiting.wake()
            elif self.loads.lacks_slots:
                self._ring()
        self.waiting.count(demand, -1)

    def mend(self, pools: Sequence[Pool]) -> None:
        """Make all agree after a step that an exception has cut anywhere; ``pools`` are all, in their order.

        What callers hold and what loaders read stays. What is cached stays, as far as it is known. Prefetch requests
        are forgotten.
        """
        self.loads.mend(self._demands)
        states: list[tuple[ExpertKey | None, bool]] = []
        for pool in pools:
            pins = [0] * pool.slots.count
            for demand in self._demands:
                if demand.pool is pool:
                    for slot in [*demand.held, *demand.ready, *(load.slot for load in demand.loads)]:
                        pins[slot] += 1
            pool.mend(pins, {load.slot: load.key for load in self.loads if load.pool is pool})
            states += pool.slots.contents()
        self._directory.mend(states)
        self.waiting.mend(self._demands, pools)

    def check_integrity(self, pools: Sequence[Pool]) -> None:
        """Asserts that slots, groups, loads, callers and the directory agree; ``pools`` are all, in their order."""
        states: list[tuple[ExpertKey | None, bool]] = []
        for pool in pools:
            pool.check_integrity()
            assert pool.first == len(states)
            pins = [0] * pool.slots.count
            for demand in self._demands:
                if demand.pool is pool:
                    for slot in [*demand.held, *demand.ready, *(load.slot for load in demand.loads)]:
                        pins[slot] += 1
            assert pins == [pool.slots.pins(slot) for slot in range(pool.slots.count)]
            loading = {pool.slots.key(slot) for slot in range(len(pins)) if pool.slots.state(slot) is State.LOADING}
            assert loading == {load.key for load in self.loads if load.pool is pool}
            assert all(demand in self._demands and demand.is_idle and demand.pending for demand in pool.hungry)
            states += pool.slots.contents()
        self._directory.check_integrity(states)
        assert {load for demand in self._demands for load in demand.loads} <= set(self.loads)
        self.loads.check_integrity()
        self.waiting.check_integrity(self._demands)
