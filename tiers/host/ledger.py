"""The host tier's books: what each caller wants, what is being loaded, and which slot it goes into.

No I/O, no thread, no lock: its owner calls every method with its lock held. No caller waits for ever, since:

    A caller of acquire sleeps only while it holds no READY slot at all: residents and arrivals are yielded first.
    What it may hold meanwhile are claims on LOADING slots, and loaders never wait for a slot.

So every LOADING slot becomes READY or EMPTY, and every READY slot that is pinned belongs to a caller that is awake and
computes; it gives the slot back when it takes its next lease. A demand that has nothing in flight and finds no slot is
*starved*. It waits for the first slot that is given back, first come, first served; while a demand is starved no other
begins a load.

A caller may be a thread that sleeps until it is woken, or *asynchronous*, such as a session of another process: then
``serve`` takes its steps and delivers events. It may hold several leases at a time, never more than it is granted, and
a demand of it that has nothing for too long fails: what another process does not give back must not stop others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.cache.budget import plan_groups
from moetier.tiers.cache.orders import DEFAULT_ORDER, ORDERS
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import TierCounters

from .demands import AsyncCaller, Demand, Failed, Granted, Pool, Waiting
from .loads import Loads
from .prefetch import PrefetchQueue
from .staging import StagingBuffers


class Ledger:
    """Demands and their slots. ``waiting`` has the demands without one, ``loads`` what is being read for them.

    ``wake`` wakes the callers that sleep, and has ``serve`` called soon; ``ring`` wakes a loader; ``watch`` tells the
    thread that calls ``expire`` that there is a new deadline. At most ``ahead`` loads of one demand are in flight, and
    twice as many of its arrivals wait for it; and at most ``most_prefetches`` reads for prefetches.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: ArenaPlan,
        directory: Directory,
        *,
        order: str = DEFAULT_ORDER,
        buffers: StagingBuffers | None = None,
        wake: Callable[[], None],
        ring: Callable[[], None],
        watch: Callable[[], None],
        ahead: int,
        most_prefetches: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.manifest = manifest
        self.directory = directory
        self.counters = TierCounters("host")
        self.pools: dict[str, Pool] = {}  # by array, in the order of their slots
        for region, first in zip(plan.regions, plan.first_slots, strict=True):
            groups = plan_groups(region.slots, manifest.members[region.array])
            self.pools[region.array] = Pool(groups, ORDERS[order], first=first, slot_bytes=region.slot_bytes)
        self.pool_of = [self.pools[block.array] for block in manifest.blocks]  # the pool of each block's records
        self.prefetches = PrefetchQueue(self.counters, clock, buffers)
        self.waiting = Waiting(wake=wake, ring=ring, watch=watch, clock=clock)
        self.loads = Loads(
            directory,
            self.counters,
            self.prefetches,
            self.waiting,
            ring=ring,
            most_prefetches=most_prefetches,
            clock=clock,
        )
        self._ring = ring
        self._clock = clock
        self._ahead = ahead
        self._demands: set[Demand] = set()
        self._uses: Counter[ExpertKey] | None = None  # how often each record was wanted; None: not counted

    def check_open(self) -> None:
        """Raise the error with which the ledger was closed, if it was."""
        if (error := self.loads.closed_by) is not None:
            raise type(error)(error.cause, error.fix)  # a new one: what was raised holds frames, and these hold slots

    # -- demands ------------------------------------------------------------------------------------------------------

    def look(self, demand: Demand, keys: Sequence[ExpertKey]) -> None:
        """Pin what is READY, join what is being loaded, and begin what can be begun. Raises ClosedError, StoreError."""
        self.check_open()
        self._demands.add(demand)
        pool, caller = demand.pool, demand.async_caller
        if caller is not None:
            caller.demands[demand.number] = demand
        self.prefetches.request(pool, demand.block, (), caller)
        distinct = dict.fromkeys(keys)
        self._count(distinct)
        demand.is_scan = len(distinct) > pool.quota(demand.block)
        hits = []
        for key in distinct:
            slot = None if caller is not None and caller.is_full else pool.pin_ready(key)
            if slot is None:
                demand.pending[key] = None
                continue
            demand.ready.append(slot)
            hits.append(key)
            if caller is not None:
                self.waiting.took(demand)
        demand.residents = len(hits)
        self.counters.hits += len(hits)
        self.counters.misses += len(demand.pending)
        self.prefetches.use(hits)
        if demand.pending:
            self._advance(demand)
        # what is given first is evicted last; what is pending is used when the caller may have it
        pool.touch([key for key in reversed(distinct) if key not in demand.pending], scan=demand.is_scan)
        if caller is not None:
            self.waiting.recheck(demand)

    def next(self, demand: Demand) -> tuple[list[int], bool] | None:
        """End the demand's leases and lease what is ready.

        Return the slots, and whether they are the last; None if the caller has to wait. Raises as ``look``.
        """
        self.release(demand)
        self.check_open()
        if demand.error is not None:
            return [], True
        if demand.pending:
            self.advance(demand)
        is_last = not (demand.pending or demand.loads)
        if not (demand.ready or is_last):
            demand.stands_since = demand.stands_since or self._clock()
            return None
        self._end_wait(demand)
        if demand.is_scan:  # it needs its slots for what it still lacks: each is given back when it is computed
            is_last = is_last and len(demand.ready) <= 1
        return self.take(demand, 1 if demand.is_scan else len(demand.ready)), is_last

    def advance(self, demand: Demand) -> None:
        """Serve the demand's pending keys as far as slots are available.

        A record that is READY is pinned. For another the demand joins the load in progress, or begins a load.
        """
        demand.pool.touch(reversed(self._advance(demand)), scan=demand.is_scan)

    def take(self, demand: Demand, most: int = 1) -> list[int]:
        """Lease the next slots of those that are ready."""
        slots: list[int] = []
        while demand.ready and len(slots) < most:
            slot = demand.ready.popleft()
            demand.held[slot] = None
            slots.append(slot)
        demand.residents = max(demand.residents - len(slots), 0)
        return slots

    def release(self, demand: Demand, slots: Iterable[int] | None = None) -> None:
        """End the demand's leases of ``slots``, or all. Slots that it does not hold are ignored."""
        ended = [slot for slot in dict.fromkeys(demand.held if slots is None else slots) if slot in demand.held]
        for slot in ended:
            del demand.held[slot]
        if ended:
            self._detach(demand, ended)

    def leave(self, demand: Demand) -> None:
        """Give back all that a demand holds and waits for.

        What a loader has begun goes on, and is kept. What no other demand wants is not begun any more: callers that ask
        and go would else fill all slots with what is of no use.
        """
        self.waiting.remove(demand)
        demand.pending.clear()
        loads = list(demand.loads)
        slots = [*demand.held, *demand.ready, *(load.slot for load in loads)]
        demand.held.clear()
        demand.ready.clear()
        demand.loads.clear()
        self._detach(demand, slots)
        for load in loads:
            self.loads.leave(demand, load)
        if demand.async_caller is not None:
            demand.async_caller.demands.pop(demand.number, None)
        self._demands.discard(demand)

    def reclaim(self, caller: Hashable) -> None:
        """Leave all demands of a caller."""
        for demand in [demand for demand in self._demands if demand.caller == caller]:
            self.leave(demand)

    def lend(self, loan: Demand, key: ExpertKey) -> int | None:
        """Lease the key's slot if it is READY and no demand is starved. Nothing is counted. Raises as ``look``."""
        self.check_open()
        slot = None if loan.pool.starved else loan.pool.pin_ready(key)
        if slot is not None:
            self._demands.add(loan)
            loan.held[slot] = None
            self.prefetches.lent.add(key)
        return slot

    def close(self, error: MoetierError) -> None:
        """Fail all demands, and let no loader begin anything any more."""
        self.loads.close(error)
        for demand in self._demands:
            if demand.async_caller is not None:
                demand.error = demand.error or error
                self.waiting.recheck(demand)
        self.waiting.wake()
        self.serve()

    # -- prefetches and uses -------------------------------------------------------------------------------------------

    def prefetch(self, block: int, keys: Sequence[ExpertKey], caller: AsyncCaller | None = None) -> None:
        """Replace a caller's prefetch requests for a block; None is the tier's own process. Raises as ``look``.

        A requested record that is there already is evicted later for that, and no loader is woken for it.
        """
        self.check_open()
        if self.prefetches.request(self.pool_of[block], block, keys, caller):
            self.loads.ring_for_prefetches()

    def used_above(self, keys: Sequence[ExpertKey]) -> None:
        """Count uses of records that demands found in the tier above."""
        self.prefetches.use(keys)
        self._count(keys)

    def use(self, key: ExpertKey) -> None:
        """Count the use of a record that another process found in the directory: a hit."""
        pool = self.pool_of[key.block]
        self.counters.hits += 1
        self._count((key,))
        if pool.find(key) is not None:
            pool.touch((key,))
            self.prefetches.use((key,))

    def counted_uses(self) -> dict[ExpertKey, int]:
        """Return how often each key was wanted since the first call, which begins the counting."""
        if self._uses is None:
            self._uses = Counter()
        return dict(self._uses)

    def _count(self, keys: Iterable[ExpertKey]) -> None:
        if self._uses is not None:
            self._uses.update(list(keys))

    # -- asynchronous callers -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Take the steps of asynchronous demands that can go on, as a thread that acquires takes its own.

        To be called after every ``wake``.
        """
        while True:
            while (demand := self.waiting.take_recheck()) is not None:
                self._serve(demand)
            # a thread whose demand is the first is awake, and comes by itself
            firsts = [pool.starved[0] for pool in self.pools.values() if pool.starved]
            firsts = [demand for demand in firsts if demand.async_caller is not None]
            for demand in firsts:
                self._serve(demand)
            if all(demand.is_idle for demand in firsts):
                return

    def expire(self) -> float | None:
        """Fail asynchronous demands that have waited for too long. Return the next deadline, None if there is none."""
        until = self.waiting.expire()
        self.serve()
        return until

    def _serve(self, demand: Demand) -> None:
        """Advance an asynchronous demand: deliver leases of its ready slots to its caller, or its error."""
        caller = demand.async_caller
        assert caller is not None
        if demand.error is None and demand.pending:
            self.advance(demand)
        if demand.error is not None:
            self.leave(demand)
            caller.deliver(Failed(demand.number, demand.error))
            return
        if demand.ready:
            self._end_wait(demand)
        while demand.ready:
            (slot,) = self.take(demand)
            number = demand.pool.first + slot
            key = demand.pool.key(slot)
            caller.deliver(Granted(demand.number, key, number, self.directory.generation(number)))
        if demand.is_over:
            self.leave(demand)
        elif not demand.held:
            demand.stands_since = demand.stands_since or self._clock()

    def _end_wait(self, demand: Demand) -> None:
        if demand.stands_since is not None:
            self.counters.waited(self._clock() - demand.stands_since)
            demand.stands_since = None

    # -- slots --------------------------------------------------------------------------------------------------------

    def _advance(self, demand: Demand) -> list[ExpertKey]:
        """Return the keys that are not pending any more. Their records are not touched yet."""
        pool, found = demand.pool, list[ExpertKey]()
        caller = demand.async_caller
        full = False  # no slot is to be had
        for key in list(demand.pending):
            if caller is not None and caller.is_full:
                break
            slot = pool.find(key)
            if slot is not None:  # begun by a prefetch, or by another demand since this one looked
                self.counters.joined += 1
                pool.pin(slot)
                if pool.is_ready(slot):
                    demand.ready.append(slot)
                    self.prefetches.use((key,))
                else:
                    self.loads.join(demand, key)
            elif full or not self._may_begin(demand):
                continue
            elif (slot := self._choose(demand)) is not None:
                self.loads.begin(pool, key, slot, is_prefetch=False, is_scan=demand.is_scan)
                pool.pin(slot)
                self.loads.join(demand, key)
                self._ring()
            else:
                full = True
                continue
            del demand.pending[key]
            found.append(key)
            self.waiting.took(demand)
        if demand.pending and demand.is_idle:
            self.waiting.starve(demand)
        return found

    def _may_begin(self, demand: Demand) -> bool:
        starved = demand.pool.starved
        if len(demand.loads) >= self._ahead or (starved and starved[0] is not demand):
            return False
        arrivals = len(demand.ready) - demand.residents
        return demand.async_caller is not None or len(demand.loads) + arrivals < 2 * self._ahead

    def _choose(self, demand: Demand) -> int | None:
        """Return a slot for a load of the demand; that of a requested record only if there is no other."""
        choose = partial(demand.pool.choose, demand.block, may_borrow=demand.is_idle, scan=demand.is_scan)
        slot = choose(keep=self.prefetches.is_requested)
        return choose() if slot is None else slot

    def _detach(self, demand: Demand, slots: Sequence[int]) -> None:
        """Unpin slots that a demand no longer holds or claims."""
        pool = demand.pool
        freed = [slot for slot in slots if not pool.unpin(slot)]
        if freed and pool.starved:
            self.waiting.wake()
        elif self.loads.lacks_slots:
            for _ in freed:
                self._ring()
        if demand.async_caller is not None:
            self.waiting.gave(demand, len(slots))

    # -- repair and checks --------------------------------------------------------------------------------------------

    def repair(self) -> None:
        """Make all agree after a step that an exception has cut anywhere.

        What callers hold and what loaders read stays. What is cached stays, as far as it is known. Prefetch requests
        are dropped.
        """
        self.loads.repair(self._demands)
        for pool in self.pools.values():
            pool.repair(self._pins(pool), {load.slot: load.key for load in self.loads if load.pool is pool})
        self.directory.repair(self._contents())
        self.waiting.repair(self._demands, self.pools.values())

    def check_integrity(self) -> None:
        """Assert that slots, groups, loads, demands and the directory agree."""
        for pool in self.pools.values():
            pool.check_integrity()
            assert self._pins(pool) == [pool.pins(slot) for slot in range(pool.count)]
            loading = {key for key, is_loading in pool.contents() if is_loading}
            assert loading == {load.key for load in self.loads if load.pool is pool}
            assert all(demand in self._demands and demand.is_idle and demand.pending for demand in pool.starved)
        self.directory.check_integrity(self._contents())
        assert {load for demand in self._demands for load in demand.loads} <= set(self.loads)
        self.loads.check_integrity()
        self.waiting.check_integrity(self._demands)

    def _pins(self, pool: Pool) -> list[int]:
        """Return how many demands hold or claim each slot of a pool."""
        pins = [0] * pool.count
        for demand in self._demands:
            if demand.pool is pool:
                for slot in [*demand.held, *demand.ready, *(load.slot for load in demand.loads)]:
                    pins[slot] += 1
        return pins

    def _contents(self) -> list[tuple[ExpertKey | None, bool]]:
        """Return the key of every slot of the tier, and whether it is being loaded."""
        return [content for pool in self.pools.values() for content in pool.contents()]
