"""HostTier: records in shared memory, evicted block by block, filled by a small pool of loaders.

The ledger decides, under the monitor's lock; records are read outside it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from types import TracebackType

from moetier.tiers.arena.arena import Arena, intact_slots
from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.cache.budget import members
from moetier.tiers.cache.orders import DEFAULT_ORDER
from moetier.tiers.cache.pool import snapshot
from moetier.tiers.cache.quotas import plan_groups
from moetier.tiers.errors import ClosedError, StoreError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.source import Lease, Pace, RecordReader
from moetier.tiers.stats import TierStats

from .ledger import Ledger
from .loaders import Loaders, prefetches
from .parties import Parties
from .requests import Demand, Pool
from .session import Desk, Event, Session
from .staging import Heads
from .timekeeper import Timekeeper
from .warmup import HotSet

LOADERS = 4  # records that are read at a time
# seconds (with what the system adds about .06 ms): who computes at once would keep Python's lock from the loader
HANDOVER = 1e-5


class HostTier:
    """A Lender over anything that can ``read_into``, which stays its owner's to close.

    One thread must not acquire again inside the loop over an acquire: at the smallest budget it would wait for itself.
    """

    def __init__(
        self,
        store: RecordReader,
        *,
        slots: Mapping[str, int],
        loaders: int = LOADERS,
        arena: Arena | None = None,
        policy: str = DEFAULT_ORDER,
    ) -> None:
        """Allocates ``slots`` by array, as ``slots_for`` gives them. Raises BudgetError if the memory can't be had.

        ``arena`` is one that was taken back, of as many slots: it is the tier's from now on. What is whole in it is
        READY without a read; whoever maps it goes on. ``policy`` is one of ``ORDERS``.
        """
        manifest = store.manifest
        assert loaders > 0
        self.manifest = manifest
        self.plan = ArenaPlan.of(manifest, slots)
        assert arena is None or arena.plan == self.plan
        self.recovered = 0  # slots that were full when it began
        self._monitor = Monitor(self._mend)
        self._closed = False
        self.fault: StoreError | None = None  # for which it serves nothing any more
        self._is_to_serve = False  # the parties, as soon as the lock is let go
        self._arena = arena or Arena.create(self.plan)
        self._loaders = Loaders(store, self._arena, self._monitor)
        self._timekeeper = Timekeeper(self._monitor)
        self._heads: Heads[Pool] | None = None
        if store.parts is not None:
            self._heads = Heads(max(region.slot_bytes for region in self.plan.regions))
        # by slot: always the same object, so that who wraps it knows it again
        self._records = [self._arena.view(slot) for slot in range(self.plan.slots)]
        self._ledger = Ledger(  # ahead: enough to keep every loader busy; prefetches: a demand finds a loader
            self._arena.directory,
            wake=self._wake,
            ring=self._loaders.ring,
            watch=self._timekeeper.watch,
            ahead=2 * loaders,
            prefetches=prefetches(loaders, self.plan),
            heads=self._heads,
        )
        self._parties = Parties(self._ledger)
        self._pools: dict[str, Pool] = {}
        try:
            for region, first in zip(self.plan.regions, self.plan.first_slots, strict=True):
                groups = plan_groups(region.slots, members(manifest, region.array))
                self._pools[region.array] = Pool(region.slots, groups, first, region.slot_bytes, policy)
            self._desk = Desk(manifest, self._monitor, self._ledger, self._parties, self._arena.directory, self._pools)
            if arena is not None:
                self._recover(arena, loaders)
            self._loaders.start(self._ledger, loaders)
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
        block = keys[0].block
        self.manifest.check_keys(block, keys)
        demand = Demand(self._desk.pool(block), block, caller=threading.get_ident())
        try:
            self._monitor.run(self._look, demand, keys)
            if demand.loads and demand.ready:
                time.sleep(HANDOVER)
            while leases := self._monitor.wait_for(self._next, demand):
                while leases:  # whoever waits for the next keeps none of them
                    yield leases.popleft()
                    self._check_open()
            if demand.error is not None:
                raise demand.error
        finally:
            if self._monitor.home.is_here:  # the directory is shared with a forked child, and not the child's to write
                self._monitor.post(partial(self._ledger.leave, demand))

    def reclaim(self) -> None:
        """As ``ExpertSource`` says."""
        self._monitor.run(self._reclaim, threading.get_ident())

    def _reclaim(self, caller: int) -> None:
        for demand in self._ledger.demands_of(caller):
            self._ledger.leave(demand)

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says. A wish is read beside the slots first, unless reads are quick. Then it evicts
        what an earlier one brought in vain, or what is neither held nor wished, of its own group."""
        self.manifest.check_keys(block, wishes)
        self._monitor.run(self._wish, block, wishes)

    def warm(self, hot: HotSet) -> None:
        """Reads each block's hottest into EMPTY slots, in the background, while nothing is read for demands or wishes.
        It evicts nothing, and what is there already is not read. Returns at once."""
        self._monitor.run(self._warm, hot)

    @contextlib.contextmanager
    def borrow(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """As ``Lender`` says; nothing is lent while a demand finds no slot. Raises MissingExpertError."""
        self.manifest.check_keys(key.block, [key])
        pool = self._desk.pool(key.block)
        loan = Demand(pool, key.block, caller=threading.get_ident())
        try:
            yield self._monitor.run(self._lend, loan, key)
        finally:
            if self._monitor.home.is_here:
                self._monitor.post(partial(self._ledger.leave, loan))

    def used(self, keys: Sequence[ExpertKey]) -> None:
        """As ``Lender`` says; counted as uses, where uses are counted."""
        self._monitor.run(self._ledger.used_above, keys)

    def uses(self) -> dict[ExpertKey, int]:
        """How often each record was wanted since the first call, which begins the counting."""
        return self._monitor.run(self._ledger.counted_uses)

    def ready(self, block: int) -> list[int]:
        """The experts of a block whose records are in slots now."""
        find, experts = self._arena.directory.find, self.manifest.blocks[block].experts
        return [expert for expert in range(experts) if find(ExpertKey(block, expert)) is not None]

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says. Takes no lock: it may be otherwise by the time that it is told."""
        self._monitor.home.check()
        return [key for key in keys if not self._desk.pool(key.block).slots.holds(key)]

    def pace(self, block: int) -> Pace | None:
        """As ``ExpertSource`` says: the median of the latest reads."""
        return self._monitor.run(self._ledger.loads.pace, self._desk.pool(block))

    def session(self, deliver: Callable[[Event], None], *, leases: int = 8, patience: float = 10.0) -> Session:
        """For what another process asks for: at most ``leases`` slots are held for it at a time, and a request that
        has none is refused after ``patience`` seconds. Closing it is the caller's."""
        # now: where no thread is to be had, nobody has asked for anything yet
        self._monitor.run(self._start_timekeeper)
        return Session(deliver, self._desk, leases=leases, patience=patience)

    def export(self) -> int:
        """A new read-only descriptor of the arena, the caller's to close; ``plan`` says what is where. Raises
        ClosedError, or the error that condemned the tier."""
        self._check_open()
        return self._arena.export()

    def whole(self, slot: int) -> memoryview:
        """A leased slot with its checksum, read-only: for another host, which proves it there."""
        return self._arena.whole(slot)

    def stats(self) -> TierStats:
        return self._monitor.run(self._stats)

    def close(self) -> None:
        """As ``ExpertSource`` says. Who sleeps in acquire wakes with ClosedError; a lease stays readable while held.

        In a forked child only its own maps and descriptors go.
        """
        if self._monitor.home.is_here:
            self._monitor.run(self._drop)
            self._loaders.close()
            if self._heads is not None:
                self._heads.close()
            self._timekeeper.close()
        self._records.clear()
        self._arena.close()

    def condemn(self, error: StoreError) -> None:
        """What is in the slots is not what the manifest promises: from now on every caller, and every session, gets
        ``error``, and whoever maps the arena finds nothing in it."""
        self._monitor.run(self._condemn, error)

    def check_integrity(self) -> None:
        """Asserts that slots, groups, loads, callers and the directory agree."""
        self._monitor.run(self._ledger.check_integrity, list(self._pools.values()))

    # -- steps --------------------------------------------------------------------------------------------------------

    def _look(self, demand: Demand, keys: Sequence[ExpertKey]) -> None:
        self._check_open()
        self._ledger.look(demand, keys)

    def _next(self, demand: Demand) -> deque[Lease[memoryview]] | None:
        """End the present leases, and give those that are there as soon as there are any; none behind the last, or
        where an error ended the demand. None: wait."""
        self._ledger.release(demand)
        self._check_open()
        if demand.error is not None:
            return deque()
        if demand.pending:
            self._ledger.advance(demand)
        if not (demand.ready or demand.is_over):
            demand.stands_since = demand.stands_since or time.perf_counter()
            return None
        if demand.stands_since is not None:
            self._ledger.counters.waited(time.perf_counter() - demand.stands_since)
            demand.stands_since = None
        # who passes through wants its slots for what it still lacks: each is given back when it is computed
        count = min(len(demand.ready), 1 if demand.passing else len(demand.ready))
        slots = [self._ledger.take(demand) for _ in range(count)]
        return deque([self._lease(demand.pool, slot, more=slot != slots[-1]) for slot in slots])

    def _wish(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        self._check_open()
        self._ledger.loads.wish(self._desk.pool(block), block, wishes)

    def _warm(self, hot: HotSet) -> None:
        self._check_open()
        for block in range(len(self.manifest.blocks)):
            pool = self._desk.pool(block)
            self._ledger.loads.warm(pool, hot.hottest(block, pool.policy.quota(block)))

    def _lend(self, loan: Demand, key: ExpertKey) -> Lease[memoryview] | None:
        self._check_open()
        slot = self._ledger.lend(loan, key)
        return None if slot is None else self._lease(loan.pool, slot)

    def _start_timekeeper(self) -> None:
        self._check_open()
        self._timekeeper.start(self._parties)

    def _stats(self) -> TierStats:
        return snapshot(self._ledger.counters, self._pools.values())

    def _drop(self) -> None:
        self._closed = True
        self._ledger.drop(_closed_error())
        self._parties.serve()

    def _condemn(self, error: StoreError) -> None:
        if self._closed or self.fault is not None:
            return
        self.fault = error
        self._ledger.drop(error)
        self._arena.directory.retire()
        self._parties.serve()

    def _mend(self) -> None:
        self._is_to_serve = False  # what was to serve may not have been posted
        self._ledger.mend(list(self._pools.values()))

    def _lease(self, pool: Pool, slot: int, *, more: bool = False) -> Lease[memoryview]:
        number = pool.first + slot
        return Lease(pool.slots.key(slot), self._records[number], number, None, more)

    def _recover(self, arena: Arena, threads: int) -> None:
        kept = intact_slots(arena, self.manifest, threads)
        arena.directory.reclaim(kept)
        for slot, key in kept.items():
            self._ledger.adopt(self._desk.pool(key.block), key, slot)
        self.recovered = len(kept)

    def _wake(self) -> None:
        self._monitor.wake()
        if self._timekeeper.runs and not self._is_to_serve:
            self._is_to_serve = True
            self._monitor.post(self._serve_parties)  # by who holds the lock now

    def _serve_parties(self) -> None:
        self._is_to_serve = False
        self._parties.serve()

    def _check_open(self) -> None:
        self._monitor.home.check()
        if self._closed:
            raise _closed_error()
        if self.fault is not None:
            raise self.fault.with_traceback(None)


def _closed_error() -> ClosedError:
    return ClosedError("The host tier was closed.", "Load the model again.")
