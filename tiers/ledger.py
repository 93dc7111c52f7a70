"""The host tier's bookkeeping: who wants what, what is under way, and which slot it goes into.

No I/O, no thread, no lock: its owner calls every method with its lock held. Nobody waits for ever, by this invariant:

    A caller of acquire sleeps only while it holds no READY slot at all: residents and arrivals are yielded first.
    What it may hold meanwhile are claims on LOADING slots, and loaders never wait for a slot.

So every LOADING slot becomes READY or EMPTY, and every READY slot that is pinned belongs to a caller that is awake and
computes; it gives the slot back when it takes its next lease. A caller that has nothing in flight and finds no slot is
*hungry*. It waits for the first slot that anybody gives back, first come, first served; while somebody is hungry nobody
else begins a load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from .keys import ExpertKey
from .policy import BlockLru, Group
from .slots import Slots, State
from .stats import TierCounters


class Pool:
    """The slots of one record geometry. ``first`` is the number of its first slot in the tier."""

    def __init__(self, count: int, groups: Sequence[Group], first: int, slot_bytes: int) -> None:
        self.slots = Slots(count)
        self.policy = BlockLru(self.slots, groups)
        self.first = first
        self.slot_bytes = slot_bytes
        self.hungry: deque[Demand] = deque()


class Load:
    """A record on its way into a slot, and who waits for it."""

    __slots__ = ("key", "pool", "slot", "waiters", "wished")

    def __init__(self, pool: Pool, key: ExpertKey, slot: int, *, wished: bool) -> None:
        self.pool = pool
        self.key = key
        self.slot = slot
        self.wished = wished  # a wish began it
        self.waiters: list[Demand] = []


class Demand:
    """One call of acquire. Each of its keys is in one of pending, loads, ready, current, or has been yielded."""

    __slots__ = ("block", "current", "error", "loads", "pending", "pool", "ready")

    def __init__(self, pool: Pool, block: int) -> None:
        self.pool = pool
        self.block = block
        self.pending: dict[ExpertKey, None] = {}  # no slot yet
        self.loads: list[Load] = []  # claims
        self.ready: deque[int] = deque()  # pinned, not yielded yet
        self.current: int | None = None  # pinned, leased
        self.error: BaseException | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing to yield, and nothing in flight that will be."""
        return not self.ready and not self.loads

    @property
    def is_over(self) -> bool:
        return not self.pending and self.is_idle


class Ledger:
    """``wake`` wakes the callers that sleep, ``ring`` a loader; ``ahead`` loads of one caller are in flight at most,
    ``prefetches`` loads that wishes began."""

    def __init__(self, *, wake: Callable[[], None], ring: Callable[[], None], ahead: int, prefetches: int) -> None:
        self.counters = TierCounters("host")
        self._wake = wake
        self._ring = ring
        self._ahead = ahead
        self._prefetches = prefetches
        self._queue: deque[Load] = deque()  # demands that no loader has taken
        self._wishes: dict[Pool, dict[int, deque[ExpertKey]]] = {}  # those not begun, by block
        self._wished: dict[int, frozenset[ExpertKey]] = {}  # all of a block's latest wishes: not evicted for others
        self._loads: dict[ExpertKey, Load] = {}
        self._demands: set[Demand] = set()

    # -- callers ------------------------------------------------------------------------------------------------------

    def look(self, demand: Demand, keys: Sequence[ExpertKey]) -> None:
        """Pins the residents, joins what is under way, begins what can be begun."""
        self._demands.add(demand)
        self.wish(demand.pool, demand.block, ())
        slots = demand.pool.slots
        distinct = dict.fromkeys(keys)
        for key in distinct:
            slot = slots.find(key)
            if slot is not None and slots.is_ready(slot):
                slots.pin(slot)
                demand.ready.append(slot)
            else:
                demand.pending[key] = None
        self.counters.hits += len(demand.ready)
        self.counters.misses += len(demand.pending)
        self.advance(demand)
        for key in reversed(distinct):  # what is given first is evicted last
            slot = slots.find(key)
            if slot is not None:
                demand.pool.policy.touch(slot)

    def advance(self, demand: Demand) -> None:
        """Joins the loads of pending keys, and begins more of them as far as slots can be had."""
        pool = demand.pool
        full = False
        for key in list(demand.pending):
            slot = pool.slots.find(key)
            if slot is not None:  # a wish, or somebody else since this caller looked
                self.counters.joined += 1
                pool.slots.pin(slot)
                if pool.slots.is_ready(slot):
                    demand.ready.append(slot)
                else:
                    _join(demand, self._loads[key])
            elif full or len(demand.loads) >= self._ahead or (pool.hungry and pool.hungry[0] is not demand):
                continue
            elif (slot := pool.policy.choose(demand.block, borrow=demand.is_idle)) is not None:
                load = self._begin(pool, key, slot, wished=False)
                pool.slots.pin(slot)
                _join(demand, load)
                self._queue.append(load)
                self._ring()
            else:
                full = True
                continue
            del demand.pending[key]
            self._no_longer_hungry(demand)
        if demand.pending and demand.is_idle and demand not in pool.hungry:
            pool.hungry.append(demand)

    def take(self, demand: Demand) -> int:
        """Leases the next slot of those that are ready."""
        assert demand.current is None
        slot = demand.current = demand.ready.popleft()
        return slot

    def release(self, demand: Demand) -> None:
        """Ends the present lease, if there is one."""
        slot, demand.current = demand.current, None
        if slot is not None:
            self._unpin(demand.pool, slot)

    def leave(self, demand: Demand) -> None:
        """Gives back all that a caller holds and waits for. Loads that it began go on: what they read is kept."""
        self.release(demand)
        while demand.ready:
            self._unpin(demand.pool, demand.ready.popleft())
        while demand.loads:
            load = demand.loads.pop()
            load.waiters.remove(demand)
            self._unpin(demand.pool, load.slot)
        self._no_longer_hungry(demand)
        self._demands.discard(demand)

    # -- wishes -------------------------------------------------------------------------------------------------------

    def wish(self, pool: Pool, block: int, wishes: Sequence[ExpertKey]) -> None:
        """Replaces a block's wishes."""
        if block in self._wished:
            del self._wished[block]
            self._wishes[pool].pop(block, None)
        if wishes:
            self._wished[block] = frozenset(wishes)
            self._wishes.setdefault(pool, {})[block] = deque(dict.fromkeys(wishes))

    def _begin_wish(self) -> Load | None:
        for pool, blocks in self._wishes.items():
            for block, wishes in list(blocks.items()):
                while wishes and not pool.hungry and self._prefetching < self._prefetches:
                    key = wishes.popleft()
                    if pool.slots.find(key) is None:
                        slot = pool.policy.choose(block, keep=self._is_wished)
                        if slot is not None:
                            self.counters.prefetched += 1
                            return self._begin(pool, key, slot, wished=True)
                if not wishes:
                    del blocks[block]
        return None

    def _is_wished(self, key: ExpertKey) -> bool:
        return key in self._wished.get(key.block, ())

    @property
    def _prefetching(self) -> int:
        return sum(load.wished for load in self._loads.values())

    # -- loaders ------------------------------------------------------------------------------------------------------

    def next_load(self) -> Load | None:
        """What a loader does next, demands first; None if there is nothing to do."""
        return self._queue.popleft() if self._queue else self._begin_wish()

    def arrive(self, load: Load) -> None:
        """Its record is in the slot."""
        del self._loads[load.key]
        load.pool.slots.fill(load.slot)
        self.counters.bytes_in += load.pool.slot_bytes
        for demand in load.waiters:
            demand.loads.remove(load)
            demand.ready.append(load.slot)
        self._wake()

    def fail(self, load: Load, error: BaseException) -> None:
        """Its record won't come. The slot is EMPTY again, and everyone who waits for it gets the error."""
        del self._loads[load.key]
        load.pool.policy.forget(load.slot)
        load.pool.slots.fail(load.slot)
        for demand in load.waiters:
            demand.loads.remove(load)
            demand.error = demand.error or error
        self._wake()

    def drop(self, error: BaseException) -> None:
        """No loader will begin anything any more."""
        self._wishes.clear()
        self._wished.clear()
        while self._queue:
            self.fail(self._queue.popleft(), error)
        self._wake()

    # -- common -------------------------------------------------------------------------------------------------------

    def _begin(self, pool: Pool, key: ExpertKey, slot: int, *, wished: bool) -> Load:
        if pool.slots.is_ready(slot):
            pool.policy.forget(slot)
            pool.slots.evict(slot)
            self.counters.evictions += 1
        pool.slots.begin(slot, key)
        pool.policy.admit(key.block, slot)
        load = self._loads[key] = Load(pool, key, slot, wished=wished)
        return load

    def _unpin(self, pool: Pool, slot: int) -> None:
        if not pool.slots.unpin(slot) and pool.hungry:
            self._wake()

    def _no_longer_hungry(self, demand: Demand) -> None:
        hungry = demand.pool.hungry
        if demand in hungry:
            hungry.remove(demand)
            self._wake()  # the next in the row may find a slot too
            self._ring()  # wishes stand back while somebody is hungry

    def check_integrity(self, pools: Sequence[Pool]) -> None:
        """Asserts that slots, groups, loads and callers agree."""
        for pool in pools:
            pool.slots.check_integrity()
            pool.policy.check_integrity()
            pins = [0] * pool.slots.count
            for demand in self._demands:
                if demand.pool is pool:
                    current = [] if demand.current is None else [demand.current]
                    for slot in [*current, *demand.ready, *(load.slot for load in demand.loads)]:
                        pins[slot] += 1
            assert pins == [pool.slots.pins(slot) for slot in range(pool.slots.count)]
            loading = {pool.slots.key(slot) for slot in range(len(pins)) if pool.slots.state(slot) is State.LOADING}
            assert loading == {key for key, load in self._loads.items() if load.pool is pool}
            assert all(demand in self._demands and demand.is_idle and demand.pending for demand in pool.hungry)
        for key, load in self._loads.items():
            assert load.key == key
            assert load.waiters == [demand for demand in load.waiters if load in demand.loads]
        assert all(self._loads[load.key] is load for demand in self._demands for load in demand.loads)
        assert all(self._loads[load.key] is load for load in self._queue)


def _join(demand: Demand, load: Load) -> None:
    load.waiters.append(demand)
    demand.loads.append(load)
