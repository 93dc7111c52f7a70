"""HostTier: a cache of records in shared memory. A few threads, the loaders, read records into it.

The ledger decides, under the monitor's lock, which records are read and evicted. Records are read without the lock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from queue import SimpleQueue

from moetier.tiers.arena.arena import Arena, intact_slots
from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.cache.pool import snapshot
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, StoreError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, step
from moetier.tiers.source import LOADERS, Lease, Residents
from moetier.tiers.stats import TierStats
from moetier.tiers.store.base import Store

from .demands import Demand, Event, Pool
from .ledger import Ledger
from .loaders import Loaders, most_prefetches
from .session import Session, Timekeeper

# seconds to sleep so that a loader can take the GIL and begin its read; the system makes the sleep about 6e-5 longer
HANDOVER = 1e-5


class HostTier(Closeable):
    """The tier in host memory: a ``Lender`` that caches the records of a store. ``close`` does not close the store.

    A thread that iterates over ``acquire`` must not call ``acquire`` again inside the loop: with the smallest budget,
    the inner call would wait for slots that the outer call holds.
    """

    def __init__(
        self,
        store: Store,
        *,
        slots: Mapping[str, int],
        loaders: int = LOADERS,
        arena: Arena | None = None,
        policy: str = DEFAULT_POLICY,
        fills: bool = False,
    ) -> None:
        """Allocate the memory, and start the loaders.

        Args:
            store: reads the records.
            slots: a dictionary from the name of each zarr array to a number of slots, as ``slots_for`` returns it.
            loaders: number of threads that read records.
            arena: a reclaimed arena with the same numbers of slots; None to create an arena. The intact records of a
                reclaimed arena are READY without a read, and processes that have mapped the arena can go on using it.
            policy: the policy of eviction, a key of ``POLICIES``.
            fills: whether a tier with room for all records of one layout reads them all, in the background, once half
                of them are there or on their way.

        Raises:
            BudgetError: the system does not have enough memory.
        """
        assert loaders > 0
        self.manifest = store.manifest
        self.plan = ArenaPlan.of(self.manifest, slots)
        assert arena is None or arena.plan == self.plan
        self.recovered = 0  # number of intact records in the reclaimed arena
        self._monitor = Monitor(lambda: self._ledger.repair())
        with contextlib.ExitStack() as undo:
            self._arena = arena or Arena.create(self.plan)
            undo.callback(self._arena.close)
            bell: SimpleQueue[None] = SimpleQueue()
            self._timekeeper = Timekeeper(self._monitor)
            self._slots = [self._arena.slot(slot) for slot in range(self.plan.slots)]  # writable views, for the loaders
            # a read-only view of each slot; always the same objects, for which the device tier can cache tensors
            self._records = [self._arena.view(slot) for slot in range(self.plan.slots)]
            self._residents: dict[int, Residents | None] = {}  # a dictionary from block to what ``residents`` returns
            self._ledger = Ledger(
                self.manifest,
                self.plan,
                self._arena.directory,
                policy=policy,
                fills=fills,
                wake=self._wake,
                ring=partial(bell.put, None),  # documented to be reentrant, which matters as a finalizer may call it
                watch=self._timekeeper.watch,
                ahead=2 * loaders,  # enough to keep every loader busy
                most_prefetches=most_prefetches(loaders, self.plan),
            )
            self._loaders = Loaders(store, self._arena.allocate, self._slots, self._monitor, self._ledger.loads, bell)
            undo.callback(self.close)
            if arena is not None:
                self._recover(arena, loaders)
            self._loaders.start(loaders)
            undo.pop_all()

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[memoryview], None, None]:
        """Yield leases as ``ExpertSource`` specifies.

        Raises MissingExpertError if the model lacks one of the experts.
        """
        if not keys:
            return
        block = keys[0].block
        self.manifest.check_keys(block, keys)
        demand = Demand(self._ledger.pool_of[block], block, threading.get_ident())
        try:
            found = self._monitor.run(self._look, demand, keys)
            if found is not None and demand.loads:
                time.sleep(HANDOVER)
            is_last = False
            while not is_last:
                leases, is_last = found or self._monitor.wait_for(self._next, demand)
                found = None
                while leases:  # popped one by one, so that this generator keeps no lease alive
                    yield leases.popleft()
                    self._check_open()
            if demand.error is not None:
                raise demand.error
        finally:
            self._monitor.post(partial(self._ledger.leave, demand))

    def residents(self, block: int) -> Residents | None:
        """Return the addresses of the block's records, as ``ExpertSource`` specifies."""
        self._check_open()
        if block not in self._residents:
            self._residents[block] = self._arena.residents(block, self.manifest.blocks[block].array)
        return self._residents[block]

    def note_uses(self, block: int, experts: Sequence[int]) -> None:
        """Count a demand, as ``ExpertSource`` specifies, when the next step of the monitor begins."""
        self._monitor.defer(partial(self._ledger.uses.found, block, experts))

    def take_back_uses(self, block: int, experts: Sequence[int]) -> None:
        """Count the hits of an earlier ``note_uses`` as discarded, as ``ExpertSource`` specifies."""
        self._monitor.defer(partial(self._ledger.uses.take_back, experts))

    @step
    def reclaim(self) -> None:
        """End the calling thread's leases, as ``ExpertSource`` specifies."""
        self._ledger.reclaim(threading.get_ident())

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches as ``ExpertSource`` specifies. ``PrefetchQueue.next_place`` says which slots they take.

        Raises MissingExpertError if the model lacks one of the experts.
        """
        self.manifest.check_keys(block, keys)
        self._monitor.run(self._ledger.prefetch, block, dict.fromkeys(keys))

    def warm(self, hottest: Callable[[int, int], Sequence[ExpertKey]]) -> None:
        """Begin the warm-up: read the most used records of each block into EMPTY slots, in the background.

        ``hottest`` is called with a block and a number, and returns at most that many keys of the block. Demands and
        prefetch requests go first. The warm-up evicts no record, and does not read a record that already has a slot.
        Returns at once.
        """
        pools = list(enumerate(self._ledger.pool_of))
        self._monitor.run(self._warm, [(pool, hottest(block, pool.quota(block))) for block, pool in pools])

    @contextlib.contextmanager
    def borrow(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """Lend a record as ``Lender`` specifies. While a demand of the same pool waits for a slot, give None instead.

        Raises MissingExpertError if the model does not have the expert.
        """
        self.manifest.check_keys(key.block, [key])
        loan = Demand(self._ledger.pool_of[key.block], key.block, threading.get_ident())
        try:
            yield self._monitor.run(self._lend, loan, key)
        finally:
            self._monitor.post(partial(self._ledger.leave, loan))

    @step
    def used(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses in the tier above, as ``Lender`` specifies. The result of ``uses`` includes them."""
        self._ledger.uses.above(keys)

    @step
    def uses(self) -> dict[ExpertKey, int]:
        """Return a dictionary from each key to the number of demands for it. Counting begins with the first call."""
        return self._ledger.uses.by_key()

    def ready(self, block: int) -> list[int]:
        """Return the experts of a block whose records are READY now."""
        find, experts = self._arena.directory.find, self.manifest.blocks[block].experts
        return [expert for expert in range(experts) if find(ExpertKey(block, expert)) is not None]

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the absent keys, as ``ExpertSource`` specifies.

        This takes no lock, so the result may be out of date when the caller gets it.
        """
        self._monitor.fork_guard.check()
        pool_of = self._ledger.pool_of
        return [key for key in keys if not pool_of[key.block].holds(key)]

    def session(self, deliver: Callable[[Event], None], *, leases: int = 8, patience: float = 10.0) -> Session:
        """Open a session for another process. The caller has to close the session.

        Args:
            deliver: called with each event, as ``AsyncCaller`` specifies.
            leases: the largest number of slots that the session may hold or claim at a time.
            patience: seconds without a slot after which a request fails.

        Raises:
            ClosedError: the tier was closed.
            StoreError: the tier was condemned (see ``condemn``).
        """
        # start the thread before there are requests, in case it can't be started
        self._monitor.run(self._timekeeper.start, self._ledger)
        return Session(deliver, self._monitor, self._ledger, leases=leases, patience=patience)

    def export(self) -> int:
        """Return a new read-only file descriptor of the arena, which the caller has to close.

        The arena has the layout ``plan``. Raises ClosedError if the tier was closed, StoreError if it was condemned.
        """
        self._check_open()
        return self._arena.export()

    def whole(self, slot: int) -> memoryview:
        """Return a read-only view of the record in a leased slot and its checksum, to send to another host."""
        return self._arena.whole(slot)

    @step
    def stats(self) -> TierStats:
        """Return a snapshot of the counters and of the state of the slots."""
        return snapshot(self._ledger.counters, self._ledger.pools.values())

    @step
    def count_failure(self) -> None:
        """Count a read that failed, but succeeded from a mirror."""
        self._ledger.counters.failures += 1

    @property
    def fault(self) -> StoreError | None:
        """The error with which the tier was condemned, or None."""
        error = self._ledger.loads.closed_by
        return error if isinstance(error, StoreError) else None

    @step
    def condemn(self, error: StoreError) -> None:
        """Stop serving for good, because the records are not those of the manifest.

        All callers and sessions get ``error``. Processes that have mapped the arena find no records in it any more.
        """
        if self._ledger.loads.closed_by is None:
            self._ledger.close(error)
            self._arena.directory.retire()

    def close(self) -> None:
        """Close the tier, as ``ExpertSource`` specifies.

        Callers that sleep in ``acquire`` wake up and get ClosedError. The record of a lease stays readable as long as
        the lease object exists. In a forked child, this only closes the child's mappings and file descriptors.
        """
        if self._monitor.fork_guard.is_owner:
            self._monitor.run(self._ledger.close, ClosedError("The host tier was closed.", "Load the model again."))
            self._loaders.close()
            self._timekeeper.close()
        self._slots.clear()
        self._records.clear()
        self._residents.clear()
        self._arena.close()

    @step
    def check_integrity(self) -> None:
        """For tests: assert that slots, groups, loads, callers and the directory agree."""
        self._ledger.check_integrity()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _look(self, demand: Demand, keys: Sequence[ExpertKey]) -> tuple[deque[Lease[memoryview]], bool] | None:
        self._ledger.look(demand, keys)
        return self._next(demand)

    def _next(self, demand: Demand) -> tuple[deque[Lease[memoryview]], bool] | None:
        """End the demand's leases. Return the next leases, and whether they are the last; None if the caller waits."""
        found = self._ledger.next(demand)
        if found is None:
            return None
        slots, is_last = found
        return self._leases(demand, slots), is_last

    def _warm(self, wanted: Sequence[tuple[Pool, Sequence[ExpertKey]]]) -> None:
        self._ledger.check_open()
        for pool, keys in wanted:
            self._ledger.loads.warm(pool, keys)

    def _lend(self, loan: Demand, key: ExpertKey) -> Lease[memoryview] | None:
        slot = self._ledger.lend(loan, key)
        return None if slot is None else self._leases(loan, [slot]).pop()

    def _leases(self, demand: Demand, slots: Sequence[int]) -> deque[Lease[memoryview]]:
        pool, leases = demand.pool, deque[Lease[memoryview]]()
        for slot in slots:
            number = pool.first + slot
            leases.append(Lease(pool.key(slot), self._records[number], number, None, slot != slots[-1]))
        return leases

    def _recover(self, arena: Arena, threads: int) -> None:
        kept = intact_slots(arena, self.manifest, threads)
        arena.directory.repair([(kept.get(slot), False) for slot in range(self.plan.slots)])
        for slot, key in kept.items():
            pool = self._ledger.pool_of[key.block]
            pool.begin_fill(slot - pool.first, key)
            pool.fill(slot - pool.first)
        self.recovered = len(kept)

    def _wake(self) -> None:
        self._monitor.wake()
        if self._timekeeper.runs:
            self._monitor.post(self._ledger.serve)  # the thread that holds the lock will run this as a step

    def _check_open(self) -> None:
        self._monitor.fork_guard.check()
        if self._ledger.loads.closed_by is not None:
            self._ledger.check_open()
