"""HostTier: records in shared memory, least recently used per block, filled by a small pool of loaders.

Nobody waits for ever. One lock guards the bookkeeping; records are read outside it. The invariant:

    A caller of acquire sleeps only while it holds no READY slot at all: residents and arrivals are yielded first.
    What it may hold meanwhile are claims on LOADING slots, and loaders never wait for a slot.

So every LOADING slot becomes READY or EMPTY, and every READY slot that is pinned belongs to a caller that is awake and
computes; it gives the slot back when it takes its next lease. A caller that has nothing in flight and finds no slot is
*hungry*. It waits for the first slot that anybody gives back, in order of arrival, and while somebody is hungry nobody
reads ahead. (One thread must not acquire again inside the loop over an acquire of the same tier.)
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from queue import SimpleQueue
from types import TracebackType

from .arena import Arena
from .errors import BudgetError, ClosedError, MissingExpertError
from .keys import ExpertKey
from .manifest import Block, Manifest
from .policy import BlockLru, plan_groups
from .slots import Slots, State
from .source import Lease, RecordReader
from .stats import TierCounters, TierStats


def smallest_budget(manifest: Manifest) -> int:
    """Bytes for one token's experts of one block, in every record geometry."""
    return sum(manifest.layouts[name].slot_bytes * least for name, (least, _) in _ranges(manifest).items())


def largest_budget(manifest: Manifest) -> int:
    """Bytes for all records."""
    return manifest.stored_bytes


def slots_for(manifest: Manifest, budget_bytes: int) -> Mapping[str, int]:
    """How many slots of each record geometry (zarr array) a budget pays for; at most one for each record.

    Raises BudgetError when not even one block's top-k records fit.
    """
    smallest, largest = smallest_budget(manifest), largest_budget(manifest)
    if budget_bytes < smallest:
        raise BudgetError(
            f"{budget_bytes:,} bytes can't hold the experts that one token needs in one block.",
            f"Give from {smallest:,} to {largest:,} bytes.",
        )
    sizes = {name: manifest.layouts[name].slot_bytes for name in manifest.layouts}
    ranges = _ranges(manifest)
    slots = {name: least for name, (least, _) in ranges.items()}
    if len(slots) > 1 and (above := largest - smallest):  # what is left over, in proportion to what is not held yet
        extra = min(budget_bytes, largest) - smallest
        for name, (least, most) in ranges.items():
            slots[name] += (most - least) * extra // above
    left = budget_bytes - sum(sizes[name] * count for name, count in slots.items())
    for name, (_, most) in ranges.items():
        more = min(left // sizes[name], most - slots[name])
        slots[name] += more
        left -= more * sizes[name]
    return slots


def _ranges(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """The fewest and the most slots that make sense, by array."""
    members = {name: _members(manifest, name).values() for name in manifest.layouts}
    return {
        name: (max(block.top_k for block in blocks), sum(block.experts for block in blocks))
        for name, blocks in members.items()
    }


def _members(manifest: Manifest, array: str) -> dict[int, Block]:
    return {index: block for index, block in enumerate(manifest.blocks) if block.array == array}


class _Pool:
    """Everything of one record geometry."""

    def __init__(self, manifest: Manifest, array: str, count: int, first: int) -> None:
        layout = manifest.layouts[array]
        self.slots = Slots(count)
        self.policy = BlockLru(self.slots, plan_groups(count, _members(manifest, array)))
        self.first = first  # leases number the slots of all pools on
        self.hungry: deque[_Demand] = deque()
        self.arena = Arena.create(count, layout.slot_bytes)
        # the same object each time, so that who wraps a record can know it again
        self.records = [self.arena.view(slot, layout.record_bytes) for slot in range(count)]

    def close(self) -> None:
        self.records.clear()
        self.arena.close()


class _Load:
    """A record on its way into a slot, and who waits for it."""

    __slots__ = ("key", "pool", "slot", "waiters", "wished")

    def __init__(self, pool: _Pool, key: ExpertKey, slot: int, *, wished: bool) -> None:
        self.pool = pool
        self.key = key
        self.slot = slot
        self.wished = wished
        self.waiters: list[_Demand] = []


class _Demand:
    """One call of acquire. Each of its keys is in one of pending, loads, ready, current, or has been yielded."""

    __slots__ = ("block", "current", "error", "loads", "pending", "pool", "ready")

    def __init__(self, pool: _Pool, block: int) -> None:
        self.pool = pool
        self.block = block
        self.pending: dict[ExpertKey, None] = {}  # no slot yet
        self.loads: list[_Load] = []  # claims
        self.ready: deque[int] = deque()  # pinned, not yielded yet
        self.current: int | None = None  # pinned, leased
        self.error: BaseException | None = None

    @property
    def is_idle(self) -> bool:
        """Nothing to yield, and nothing in flight that will be."""
        return not self.ready and not self.loads


class HostTier:
    """An ExpertSource over anything that can ``read_into``, which stays its owner's to close."""

    def __init__(self, store: RecordReader, *, slots: Mapping[str, int], loaders: int = 4) -> None:
        """Allocates ``slots`` by array, as ``slots_for`` gives them. Raises BudgetError if the memory can't be had."""
        assert loaders > 0
        assert slots.keys() == store.manifest.layouts.keys()
        self._store = store
        self._blocks = store.manifest.blocks
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # for callers that wait
        self._bell: SimpleQueue[None] = SimpleQueue()  # wakes one loader a ring, which then works until nothing is left
        self._left: deque[_Demand] = deque()  # callers that are gone, and could not give back themselves
        self._queue: deque[_Load] = deque()  # demands that no loader has begun
        self._wishes: dict[int, deque[ExpertKey]] = {}  # by block, those not begun
        self._wished: dict[int, frozenset[ExpertKey]] = {}  # by block, all of its latest wishes: not evicted for others
        self._loads: dict[ExpertKey, _Load] = {}
        self._demands: set[_Demand] = set()
        self._counters = TierCounters("host")
        self._prefetching = 0
        self._prefetches = max(1, loaders - 1)  # at most, so that a demand finds a loader
        self._ahead = 2 * loaders  # loads that one caller has in flight: enough to keep every loader busy
        self._closed = False
        self._pools: dict[str, _Pool] = {}
        self._loaders: list[threading.Thread] = []
        try:
            for array, count in slots.items():
                first = sum(pool.slots.count for pool in self._pools.values())
                self._pools[array] = _Pool(store.manifest, array, count, first)
            for number in range(loaders):
                # daemon: a tier that nobody closes must not keep the interpreter from ending
                loader = threading.Thread(target=self._serve, name=f"moetier-loader-{number}", daemon=True)
                loader.start()
                self._loaders.append(loader)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> HostTier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[memoryview], None, None]:
        """As ``ExpertSource`` says. Raises MissingExpertError for a key that the model does not have."""
        if not keys:
            return
        self._check_keys(keys[0].block, keys)
        demand = _Demand(self._pool(keys[0].block), keys[0].block)
        try:
            with self._lock:
                self._look(demand, keys)
            while (lease := self._next(demand)) is not None:
                yield lease
        finally:
            self._leave(demand)

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says. A wish evicts only what is neither held nor wished, and only of its own group."""
        self._check_keys(block, wishes)
        with self._lock:
            self._check_open()
            self._forget_wishes(block)
            if wishes:
                self._wishes[block] = deque(dict.fromkeys(wishes))
                self._wished[block] = frozenset(wishes)
        self._ring(min(len(wishes), len(self._loaders)))

    def stats(self) -> TierStats:
        with self._lock:
            pools = self._pools.values()
            return self._counters.snapshot(
                slots=sum(pool.slots.count for pool in pools),
                ready=sum(pool.slots.ready for pool in pools),
                slot_bytes=sum(pool.slots.count * pool.arena.slot_bytes for pool in pools),
            )

    def close(self) -> None:
        """As ``ExpertSource`` says. Who sleeps in acquire wakes with ClosedError; a lease stays readable while held."""
        with self._lock:
            self._closed = True
            self._wishes.clear()
            self._wished.clear()
            while self._queue:
                self._fail(self._queue.popleft(), _closed_error())
            self._changed.notify_all()
        self._ring(len(self._loaders))
        for loader in self._loaders:
            loader.join()
        for pool in self._pools.values():
            pool.close()

    def check_integrity(self) -> None:
        """Asserts that slots, groups, loads and callers agree."""
        with self._lock:
            for pool in self._pools.values():
                pool.slots.check_integrity()
                pool.policy.check_integrity()
                held = [0] * pool.slots.count
                for demand in self._demands:
                    if demand.pool is pool:
                        own = [*demand.ready, *(load.slot for load in demand.loads)]
                        for slot in own if demand.current is None else [*own, demand.current]:
                            held[slot] += 1
                assert held == [pool.slots.pins(slot) for slot in range(pool.slots.count)]
                loading = {pool.slots.key(s) for s in range(len(held)) if pool.slots.state(s) is State.LOADING}
                assert loading == {key for key, load in self._loads.items() if load.pool is pool}
                assert all(demand in self._demands and demand.is_idle for demand in pool.hungry)
            assert all(load in demand.loads for load in self._loads.values() for demand in load.waiters)
            assert all(self._loads[load.key] is load for demand in self._demands for load in demand.loads)
            assert all(self._loads[load.key] is load for load in self._queue)
            assert self._prefetching == sum(load.wished for load in self._loads.values())

    # -- callers of acquire; the lock is held -------------------------------------------------------------------------

    def _look(self, demand: _Demand, keys: Sequence[ExpertKey]) -> None:
        """Pins the residents, joins what is under way, begins what can be begun."""
        self._check_open()
        self._demands.add(demand)
        self._forget_wishes(demand.block)
        slots = demand.pool.slots
        distinct = dict.fromkeys(keys)
        for key in distinct:
            slot = slots.find(key)
            if slot is not None and slots.is_ready(slot):
                slots.pin(slot)
                demand.ready.append(slot)
            else:
                demand.pending[key] = None
        self._counters.hits += len(demand.ready)
        self._counters.misses += len(demand.pending)
        self._advance(demand)
        for key in reversed(distinct):  # what is given first is evicted last
            slot = slots.find(key)
            if slot is not None:
                demand.pool.policy.touch(slot)

    def _next(self, demand: _Demand) -> Lease[memoryview] | None:
        """Ends the present lease; gives the next as soon as there is one, None behind the last."""
        with self._lock:
            self._release(demand)
            began = 0.0
            while True:
                self._check_open()
                if demand.error is not None:
                    raise demand.error
                if demand.pending:
                    self._advance(demand)
                if demand.ready or (demand.is_idle and not demand.pending):
                    break
                began = began or time.perf_counter()
                self._changed.wait()
            if began:
                self._counters.waited(time.perf_counter() - began)
            if not demand.ready:
                return None
            slot = demand.current = demand.ready.popleft()
            pool = demand.pool
            return Lease(pool.slots.key(slot), pool.records[slot], pool.first + slot)

    def _advance(self, demand: _Demand) -> None:
        """Joins the loads of pending keys, and begins more of them as far as slots can be had."""
        pool = demand.pool
        full = False
        for key in list(demand.pending):
            slot = pool.slots.find(key)
            if slot is not None:  # since this caller looked, or by a wish: somebody else has begun it
                self._counters.joined += 1
                pool.slots.pin(slot)
                if pool.slots.is_ready(slot):
                    demand.ready.append(slot)
                else:
                    self._join(demand, self._loads[key])
            elif full or len(demand.loads) >= self._ahead or (pool.hungry and pool.hungry[0] is not demand):
                continue
            elif (slot := pool.policy.choose(demand.block, borrow=demand.is_idle)) is not None:
                load = self._begin(pool, key, slot, wished=False)
                pool.slots.pin(slot)
                self._join(demand, load)
                self._queue.append(load)
                self._ring()
            else:
                full = True
                continue
            del demand.pending[key]
            self._no_longer_hungry(demand)
        if demand.pending and demand.is_idle and demand not in pool.hungry:
            pool.hungry.append(demand)

    def _join(self, demand: _Demand, load: _Load) -> None:
        load.waiters.append(demand)
        demand.loads.append(load)

    def _no_longer_hungry(self, demand: _Demand) -> None:
        hungry = demand.pool.hungry
        if demand in hungry:
            hungry.remove(demand)
            self._changed.notify_all()  # the next in the row may find a slot too
            self._ring()  # wishes stand back while somebody is hungry

    def _release(self, demand: _Demand) -> None:
        slot, demand.current = demand.current, None
        if slot is not None:
            self._unpin(demand.pool, slot)

    def _unpin(self, pool: _Pool, slot: int) -> None:
        if not pool.slots.unpin(slot) and pool.hungry:
            self._changed.notify_all()

    def _leave(self, demand: _Demand) -> None:
        """Gives back all that a caller holds and waits for. Loads that it began go on: what they read is kept.

        An iterator that is lost in a cycle is closed by the garbage collector, and that may run anywhere, even while
        this thread holds the lock. So this never waits for it, and leaves the work to a loader if it has to.
        """
        if self._lock.acquire(blocking=False):
            try:
                self._give_back(demand)
            finally:
                self._lock.release()
        else:
            self._left.append(demand)
            self._ring()

    def _give_back(self, demand: _Demand) -> None:
        self._release(demand)
        while demand.ready:
            self._unpin(demand.pool, demand.ready.popleft())
        while demand.loads:
            load = demand.loads.pop()
            load.waiters.remove(demand)
            self._unpin(demand.pool, load.slot)
        self._no_longer_hungry(demand)
        self._demands.discard(demand)

    # -- loads; the lock is held but in the first three ---------------------------------------------------------------

    def _serve(self) -> None:
        """A loader's life."""
        while not self._closed:
            self._bell.get()
            while (load := self._take()) is not None:
                self._read(load)

    def _read(self, load: _Load) -> None:
        try:
            self._store.read_into(load.key, load.pool.arena.slot(load.slot))
        except BaseException as error:  # whatever it is: those who wait must learn of it
            traceback.clear_frames(error.__traceback__)  # they hold the slot's buffer
            with self._lock:
                self._counters.failures += 1
                self._fail(load, error)
        else:
            with self._lock:
                self._arrive(load)

    def _take(self) -> _Load | None:
        """The next load to be done, demands first; None if there is nothing to do."""
        with self._lock:
            while self._left:
                self._give_back(self._left.popleft())
            if self._queue:
                return self._queue.popleft()
            return self._begin_wish()

    def _begin_wish(self) -> _Load | None:
        for block, wishes in list(self._wishes.items()):
            pool = self._pool(block)
            while wishes and not pool.hungry and self._prefetching < self._prefetches:
                key = wishes.popleft()
                if pool.slots.find(key) is None:
                    slot = pool.policy.choose(block, keep=self._is_wished)
                    if slot is not None:
                        self._counters.prefetched += 1
                        return self._begin(pool, key, slot, wished=True)
            if not wishes:
                del self._wishes[block]
        return None

    def _begin(self, pool: _Pool, key: ExpertKey, slot: int, *, wished: bool) -> _Load:
        if pool.slots.is_ready(slot):
            pool.policy.forget(slot)
            pool.slots.evict(slot)
            self._counters.evictions += 1
        pool.slots.begin(slot, key)
        pool.policy.admit(key.block, slot)
        load = self._loads[key] = _Load(pool, key, slot, wished=wished)
        self._prefetching += wished
        return load

    def _arrive(self, load: _Load) -> None:
        self._end(load)
        load.pool.slots.fill(load.slot)
        self._counters.bytes_in += load.pool.arena.slot_bytes
        for demand in load.waiters:
            demand.loads.remove(load)
            demand.ready.append(load.slot)

    def _fail(self, load: _Load, error: BaseException) -> None:
        self._end(load)
        load.pool.policy.forget(load.slot)
        load.pool.slots.fail(load.slot)
        for demand in load.waiters:
            demand.loads.remove(load)
            demand.error = demand.error or error

    def _end(self, load: _Load) -> None:
        del self._loads[load.key]
        self._prefetching -= load.wished
        self._changed.notify_all()

    def _ring(self, times: int = 1) -> None:
        for _ in range(times):
            self._bell.put(None)  # reentrant, as SimpleQueue's documentation promises

    # -- small things -------------------------------------------------------------------------------------------------

    def _pool(self, block: int) -> _Pool:
        return self._pools[self._blocks[block].array]

    def _is_wished(self, key: ExpertKey) -> bool:
        return key in self._wished.get(key.block, ())

    def _forget_wishes(self, block: int) -> None:
        self._wishes.pop(block, None)
        self._wished.pop(block, None)

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()

    def _check_keys(self, block: int, keys: Sequence[ExpertKey]) -> None:
        if not 0 <= block < len(self._blocks):
            raise MissingExpertError(f"There is no block {block}.", f"Blocks are 0 to {len(self._blocks) - 1}.")
        experts = self._blocks[block].experts
        for key in keys:
            assert key.block == block, "keys of one block"
            if not 0 <= key.expert < experts:
                raise MissingExpertError(f"There is no {key}.", f"Its experts are 0 to {experts - 1}.")


def _closed_error() -> ClosedError:
    return ClosedError("The host tier was closed.", "Load the model again.")
