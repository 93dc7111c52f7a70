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
from queue import SimpleQueue

from moetier.tiers.arena.arena import Arena, intact_slots
from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.cache.orders import DEFAULT_ORDER
from moetier.tiers.cache.pool import snapshot
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, StoreError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, step
from moetier.tiers.source import Lease, Pace, RecordReader
from moetier.tiers.stats import TierStats

from .demands import Demand, Event, Pool
from .ledger import Ledger
from .loaders import Loaders, most_prefetches
from .session import Session, Timekeeper
from .staging import StagingBuffers

LOADERS = 4  # records that are read at a time
HANDOVER = 1e-5  # seconds to sleep, to which the system adds about 6e-5, so that a loader can take the GIL and begin


class HostTier(Closeable):
    """The tier in host memory: a Lender that caches records of a RecordReader. It does not close the reader.

    A thread that iterates over ``acquire`` must not call it again inside the loop: with the smallest budget the inner
    call would wait for slots that the outer one holds.
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
        """Allocate ``slots`` by array, as ``slots_for`` gives them. Raises BudgetError if the memory can't be had.

        ``arena`` is one with as many slots that a former owner left: it is the tier's from now on. Its records that are
        whole are READY without a read, and processes that map it go on. ``policy`` is one of ``ORDERS``.
        """
        assert loaders > 0
        self.manifest = store.manifest
        self.plan = ArenaPlan.of(self.manifest, slots)
        assert arena is None or arena.plan == self.plan
        self.recovered = 0  # slots that were full when it began
        self._monitor = Monitor(lambda: self._ledger.repair())
        with contextlib.ExitStack() as undo:
            self._arena = arena or Arena.create(self.plan)
            undo.callback(self._arena.close)
            bell: SimpleQueue[None] = SimpleQueue()
            self._timekeeper = Timekeeper(self._monitor)
            self._buffers: StagingBuffers | None = None
            if store.parts is not None:
                self._buffers = StagingBuffers(max(region.slot_bytes for region in self.plan.regions))
            self._slots = [self._arena.slot(slot) for slot in range(self.plan.slots)]  # to fill them
            # by slot: always the same object, so that code that wraps it knows it again
            self._records = [self._arena.view(slot) for slot in range(self.plan.slots)]
            self._ledger = Ledger(
                self.manifest,
                self.plan,
                self._arena.directory,
                order=policy,
                buffers=self._buffers,
                wake=self._wake,
                ring=partial(bell.put, None),  # reentrant, as it promises: a finalizer may come by here
                watch=self._timekeeper.watch,
                ahead=2 * loaders,  # enough to keep every loader busy
                most_prefetches=most_prefetches(loaders, self.plan),
            )
            self._loaders = Loaders(store, self._slots, self._monitor, self._ledger.loads, bell)
            undo.callback(self.close)
            if arena is not None:
                self._recover(arena, loaders)
            self._loaders.start(loaders)
            undo.pop_all()

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[memoryview], None, None]:
        """Acquire as ``ExpertSource`` says. Raises MissingExpertError for a key that the model does not have."""
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
                while leases:  # a caller that waits for the next keeps none of them
                    yield leases.popleft()
                    self._check_open()
            if demand.error is not None:
                raise demand.error
        finally:
            # the directory is shared with a forked child, and not the child's to write
            if self._monitor.fork_guard.is_owner:
                self._monitor.post(partial(self._ledger.leave, demand))

    @step
    def reclaim(self) -> None:
        """Reclaim as ``ExpertSource`` says."""
        self._ledger.reclaim(threading.get_ident())

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Prefetch as ``ExpertSource`` says.

        A record is read beside the slots first, unless reads are quick. Then it evicts what an earlier prefetch brought
        in vain, or what is neither held nor requested, of its own group.
        """
        self.manifest.check_keys(block, keys)
        self._monitor.run(self._ledger.prefetch, block, keys)

    def warm(self, hottest: Callable[[int, int], Sequence[ExpertKey]]) -> None:
        """Read each block's most used records into EMPTY slots, in the background. Returns at once.

        ``hottest`` gives them for a block, at most as many as its second argument says.

        Nothing is read while there is anything to read for demands or prefetch requests, nothing is evicted, and what
        is there already is not read.
        """
        pools = list(enumerate(self._ledger.pool_of))
        self._monitor.run(self._warm, [(pool, hottest(block, pool.quota(block))) for block, pool in pools])

    @contextlib.contextmanager
    def borrow(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """Lend as ``Lender`` says; nothing is lent while a demand finds no slot. Raises MissingExpertError."""
        self.manifest.check_keys(key.block, [key])
        loan = Demand(self._ledger.pool_of[key.block], key.block, threading.get_ident())
        try:
            yield self._monitor.run(self._lend, loan, key)
        finally:
            if self._monitor.fork_guard.is_owner:
                self._monitor.post(partial(self._ledger.leave, loan))

    @step
    def used(self, keys: Sequence[ExpertKey]) -> None:
        """Note uses as ``Lender`` says; they are counted where uses are."""
        self._ledger.used_above(keys)

    @step
    def uses(self) -> dict[ExpertKey, int]:
        """Return how often each record was wanted since the first call, which begins the counting."""
        return self._ledger.counted_uses()

    def ready(self, block: int) -> list[int]:
        """Return the experts of a block whose records are in slots now."""
        find, experts = self._arena.directory.find, self.manifest.blocks[block].experts
        return [expert for expert in range(experts) if find(ExpertKey(block, expert)) is not None]

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return absent keys as ``ExpertSource`` says. Takes no lock: the answer may be outdated at once."""
        self._monitor.fork_guard.check()
        pool_of = self._ledger.pool_of
        return [key for key in keys if not pool_of[key.block].holds(key)]

    def pace(self, block: int) -> Pace | None:
        """Return the pace as ``ExpertSource`` says, by the median of the latest reads."""
        return self._monitor.run(self._ledger.prefetches.pace, self._ledger.pool_of[block])

    def session(self, deliver: Callable[[Event], None], *, leases: int = 8, patience: float = 10.0) -> Session:
        """Open a session for another process. Closing it is the caller's.

        ``deliver`` gets its events, as ``AsyncCaller`` says. At most ``leases`` slots are held for it at a time, and a
        request that has none fails after ``patience`` seconds. Raises ClosedError, StoreError.
        """
        # now: where no thread is to be had, nothing has been asked for yet
        self._monitor.run(self._timekeeper.start, self._ledger)
        return Session(deliver, self._monitor, self._ledger, leases=leases, patience=patience)

    def export(self) -> int:
        """Return a new read-only descriptor of the arena, the caller's to close; ``plan`` says what is where.

        Raises ClosedError, or the error that condemned the tier.
        """
        self._check_open()
        return self._arena.export()

    def whole(self, slot: int) -> memoryview:
        """Return a leased slot with its checksum, read-only, for another host that checks it there."""
        return self._arena.whole(slot)

    @step
    def stats(self) -> TierStats:
        """Return a snapshot of the counters."""
        return snapshot(self._ledger.counters, self._ledger.pools.values())

    @property
    def fault(self) -> StoreError | None:
        """The error that condemned the tier, if one did."""
        error = self._ledger.loads.closed_by
        return error if isinstance(error, StoreError) else None

    @step
    def condemn(self, error: StoreError) -> None:
        """Serve nothing any more, since slots do not hold what the manifest promises.

        Every caller and every session gets ``error``, and processes that map the arena find nothing in it.
        """
        if self._ledger.loads.closed_by is None:
            self._ledger.close(error)
            self._arena.directory.retire()

    def close(self) -> None:
        """Close as ``ExpertSource`` says.

        Callers that sleep in acquire wake with ClosedError; a lease stays readable while it is held. In a forked child
        only its own maps and descriptors go.
        """
        if self._monitor.fork_guard.is_owner:
            self._monitor.run(self._ledger.close, ClosedError("The host tier was closed.", "Load the model again."))
            self._loaders.close()
            if self._buffers is not None:
                self._buffers.close()
            self._timekeeper.close()
        self._slots.clear()
        self._records.clear()
        self._arena.close()

    @step
    def check_integrity(self) -> None:
        """Assert that slots, groups, loads, callers and the directory agree."""
        self._ledger.check_integrity()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _look(self, demand: Demand, keys: Sequence[ExpertKey]) -> tuple[deque[Lease[memoryview]], bool] | None:
        self._ledger.look(demand, keys)
        return self._next(demand)

    def _next(self, demand: Demand) -> tuple[deque[Lease[memoryview]], bool] | None:
        """End the present leases. Return those that are ready, and whether they are the last; None: wait."""
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
            pool.begin(slot - pool.first, key)
            pool.fill(slot - pool.first)
        self.recovered = len(kept)

    def _wake(self) -> None:
        self._monitor.wake()
        if self._timekeeper.runs:
            self._monitor.post(self._ledger.serve)  # is done by the thread that holds the lock now

    def _check_open(self) -> None:
        self._monitor.fork_guard.check()
        if self._ledger.loads.closed_by is not None:
            self._ledger.check_open()
