"""HostTier: a cache of records in shared memory.

The ledger decides, in transitions (``tiers.locks``), which records are read and evicted. Loaders read without the lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

from moetier.tiers.arena.arena import Arena, recover
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, StoreError
from moetier.tiers.layout import ExpertKey, PoolSlot, TierSlot
from moetier.tiers.locks import Monitor, posted, transition, waiting
from moetier.tiers.source import LEASES, LOADERS, SLOT_TIMEOUT, Lease, Residents
from moetier.tiers.stats import TierStats
from moetier.tiers.store.base import Pause, Store

from .demands import Demand, Load, SessionEvent, ThreadCaller
from .disk_order import HostDiskOrder
from .ledger import Ledger
from .loaders import Loaders
from .loads import LoadLimits
from .session import Session, Timekeeper
from .uses import HostUses
from .waiting import Notifier

# seconds to sleep so that a loader can take the GIL and begin its read; the system makes the sleep about 6e-5 longer
HANDOVER = 1e-5


class LeaseBatch(NamedTuple):
    """Leases that are valid at the same time."""

    leases: deque[Lease[memoryview]]
    is_last: bool  # whether the demand has no further ones


_log = logging.getLogger(__name__)


class HostTier(Closeable):
    """The tier in host memory: a ``CopySource`` that caches the records of a store. ``close`` does not close the store.

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
        loads_rest: bool = False,
    ) -> None:
        """Allocate the memory, and start the loaders.

        The tier is condemned if the store finds that records are not those of the manifest, and it counts failed reads
        that succeed from another copy.

        Args:
            store: reads the records.
            slots: a dictionary from the name of each zarr array to a number of slots, as ``slots_for`` returns it.
            loaders: number of threads that read records.
            arena: a reclaimed arena with the same numbers of slots, which the tier closes, also if this fails; None to
                create an arena. The intact records of a reclaimed arena are READY without a read, and processes that
                have mapped the arena can go on using it.
            policy: the policy of eviction, a key of ``POLICIES``.
            loads_rest: whether a tier with room for all records of one layout reads them all, in the background, once
                half of them are there or on their way. Give ``store.is_local``, as these reads must need no requests.

        Raises:
            BudgetError: the system does not have enough memory.
        """
        assert loaders > 0
        self.manifest = store.manifest
        self.recovered = 0  # number of intact records in the reclaimed arena
        self._store = store
        self._monitor = Monitor(lambda: self._ledger.repair())
        self._notifier = Notifier(self._monitor)
        with contextlib.ExitStack() as undo:
            if arena is not None:
                undo.callback(arena.close)
            self.layout = ArenaLayout.of(self.manifest, slots)
            assert arena is None or arena.layout == self.layout
            self._arena = arena or Arena.create(self.layout)
            undo.callback(self._arena.close)
            # writable views, for the loaders
            self._writable = [self._arena.slot(TierSlot(slot)) for slot in range(self.layout.slots)]
            # a read-only view of each slot; always the same objects, for which the device tier can cache tensors
            self._records = [self._arena.view(TierSlot(slot)) for slot in range(self.layout.slots)]
            self._residents: dict[int, Residents | None] = {}  # a dictionary from block to what ``residents`` returns
            self._ledger = Ledger(
                self.manifest,
                self.layout,
                self._arena.directory,
                self._notifier,
                LoadLimits.of(loaders, self.layout),
                policy=policy,
                loads_rest=loads_rest,
            )
            self.uses = HostUses(self._monitor, self._ledger.uses)
            self.disk_order = HostDiskOrder(self._monitor, self._ledger.loads)
            self._timekeeper = Timekeeper(self._monitor, self._ledger, self._notifier.timekeeper, self._run_or_condemn)
            self._loaders = Loaders(self._monitor, self._ledger.loads, self._notifier, self._read, self._run_or_condemn)
            undo.callback(self.close)
            if arena is not None:
                kept = recover(arena, self.manifest, loaders)
                self._ledger.recover(kept)
                self.recovered = len(kept)
            self._loaders.start(loaders)
            store.on_fault(self.condemn)
            store.on_failover(self._note_failover)
            undo.pop_all()

    def _read(self, load: Load, pause: Pause | None) -> None:
        """Read the record of a load into its slot, in a loader."""
        slot = load.pool.number(load.slot)
        self._arena.allocate(slot)
        self._store.read_into(load.key, self._writable[slot], pause)

    def _run_or_condemn(self, run: Callable[[], None]) -> None:
        """Call ``run`` in a thread of the tier. If it raises, condemn the tier, as callers would wait for ever."""
        try:
            run()
        except BaseException as error:
            _log.exception("A thread of the host tier has failed.")
            cause = f"A thread that serves the experts of {self.manifest.model} has failed ({type(error).__name__})."
            self.condemn(StoreError(cause, "See the log, and report this bug. Load the model again."))

    # -- demands ------------------------------------------------------------------------------------------------------

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[memoryview], None, None]:
        """Yield leases as ``ExpertSource`` specifies.

        Raises MissingExpertError if the model lacks one of the experts.
        """
        if not keys:
            return
        block = keys[0].block
        self.manifest.check_keys(block, keys)
        demand = self._ledger.new_demand(block, ThreadCaller(threading.get_ident()))
        try:
            at_once = self._begin(demand, keys, of_total)
            if at_once is not None and demand.loads:
                time.sleep(HANDOVER)
            is_last = False
            while not is_last:
                leases, is_last = at_once or self._next_leases(demand)
                at_once = None
                while leases:  # popped one by one, so that this generator keeps no lease alive
                    yield leases.popleft()
                    self._check_open()
            if demand.error is not None:
                raise demand.error
        finally:
            self._end(demand)

    @transition
    def _begin(self, demand: Demand, keys: Sequence[ExpertKey], of_total: int) -> LeaseBatch | None:
        """Begin a demand. Return the leases that are available at once; None if the caller has to wait."""
        self._ledger.begin(demand, keys, of_total)
        return self._ready(demand)

    @waiting
    def _next_leases(self, demand: Demand) -> LeaseBatch | None:
        """Release the demand's leases, wait for the next ones, and return them."""
        return self._ready(demand)

    @posted
    def _end(self, demand: Demand) -> None:
        self._ledger.end(demand)

    def _ready(self, demand: Demand) -> LeaseBatch | None:
        batch = self._ledger.next_leases(demand)
        return None if batch is None else LeaseBatch(self._leases(demand, batch.slots), batch.is_last)

    def _leases(self, demand: Demand, slots: Sequence[PoolSlot]) -> deque[Lease[memoryview]]:
        pool, leases = demand.pool, deque[Lease[memoryview]]()
        for slot in slots:
            number = pool.number(slot)
            leases.append(Lease(pool.key(slot), self._records[number], number, None, slot != slots[-1]))
        return leases

    @transition
    def release_leases(self) -> None:
        """End the calling thread's leases, as ``ExpertSource`` specifies."""
        self._ledger.end_caller(ThreadCaller(threading.get_ident()))

    @contextlib.contextmanager
    def pin(self, key: ExpertKey) -> Iterator[Lease[memoryview] | None]:
        """Pin a record as ``CopySource`` specifies. While a demand of the same pool waits for a slot, give None.

        Raises MissingExpertError if the model does not have the expert.
        """
        self.manifest.check_keys(key.block, [key])
        demand = self._ledger.new_demand(key.block, ThreadCaller(threading.get_ident()))
        try:
            yield self._lease_for_copy(demand, key)
        finally:
            self._end(demand)

    @transition
    def _lease_for_copy(self, demand: Demand, key: ExpertKey) -> Lease[memoryview] | None:
        slot = self._ledger.lease_for_copy(demand, key)
        return None if slot is None else self._leases(demand, [slot]).pop()

    def residents(self, block: int) -> Residents | None:
        """Return the addresses of the block's records, as ``ExpertSource`` specifies."""
        self._check_open()
        if block not in self._residents:
            self._residents[block] = self._arena.residents(block, self.manifest.blocks[block].array)
        return self._residents[block]

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches as ``ExpertSource`` specifies. ``PrefetchQueue.next_read`` says which slots they take.

        Raises MissingExpertError if the model lacks one of the experts.
        """
        self.manifest.check_keys(block, keys)
        self._prefetch(block, dict.fromkeys(keys))

    @transition
    def _prefetch(self, block: int, keys: Collection[ExpertKey]) -> None:
        self._ledger.prefetch(block, keys)

    def warm(self, hottest: Callable[[int, int], Sequence[ExpertKey]]) -> None:
        """Begin the warm-up: read the most used records of each block into EMPTY slots, in the background.

        ``hottest`` is called with a block and a number, and returns at most that many keys of the block. Demands and
        prefetch requests go first. The warm-up evicts no record, and does not read a record that already has a slot.
        Returns at once.
        """
        self._warm([hottest(block, quota) for block, quota in enumerate(self._ledger.slots.quotas())])

    @transition
    def _warm(self, hottest: Sequence[Sequence[ExpertKey]]) -> None:
        self._ledger.warm(hottest)

    def ready_experts(self, block: int) -> list[int]:
        """Return the experts of a block whose records are READY now."""
        find, experts = self._arena.directory.find, self.manifest.blocks[block].experts
        return [expert for expert in range(experts) if find(ExpertKey(block, expert)) is not None]

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the absent keys, as ``ExpertSource`` specifies.

        This takes no lock, so the result may be out of date when the caller gets it.
        """
        self._monitor.fork_guard.check()
        return self._ledger.absent(keys)

    # -- other processes, statistics, the end --------------------------------------------------------------------------

    def session(
        self, deliver: Callable[[SessionEvent], None], *, max_leases: int = LEASES, timeout: float = SLOT_TIMEOUT
    ) -> Session:
        """Open a session for another process. The caller has to close the session.

        Args:
            deliver: called with each event, as ``AsyncCaller`` specifies.
            max_leases: the largest number of slots that the session may hold or claim at a time.
            timeout: seconds without a slot after which a request fails.

        Raises:
            ClosedError: the tier was closed.
            StoreError: the tier was condemned (see ``condemn``).
        """
        self._timekeeper.start()  # before there are requests, in case the thread can't be started
        return Session(deliver, self._monitor, self._ledger, max_leases=max_leases, timeout=timeout)

    def export(self) -> int:
        """Return a new read-only file descriptor of the arena, which the caller has to close.

        The arena's layout is ``layout``. Raises ClosedError if the tier was closed, StoreError if it was condemned.
        """
        self._check_open()
        return self._arena.export()

    def record_and_checksum(self, slot: TierSlot) -> memoryview:
        """Return a read-only view of the record in a leased slot and its checksum, to send to another host."""
        return self._arena.record_and_checksum(slot)

    @transition
    def stats(self) -> TierStats:
        """Return a snapshot of the counters and of the state of the slots."""
        return self._ledger.stats()

    @transition
    def _note_failover(self) -> None:
        """Count a read that failed, but succeeded from a mirror."""
        self._ledger.note_failover()

    @property
    def fault(self) -> StoreError | None:
        """The error with which the tier was condemned, or None."""
        return self._ledger.fault

    @transition
    def condemn(self, error: StoreError) -> None:
        """Stop serving for good: the records are not those of the manifest, or a thread of the tier has failed.

        All callers and sessions get ``error``. Processes that have mapped the arena find no records in it any more.
        """
        self._ledger.condemn(error)

    def close(self) -> None:
        """Close the tier, as ``ExpertSource`` specifies.

        Callers that sleep in ``acquire`` wake up and get ClosedError. The record of a lease stays readable as long as
        the lease object exists. In a forked child, this only closes the child's mappings and file descriptors.
        """
        with self._arena:
            if self._monitor.fork_guard.is_owner:
                self._close_ledger()
                self._loaders.close()
                self._timekeeper.close()
            self._writable.clear()
            self._records.clear()
            self._residents.clear()

    @transition
    def _close_ledger(self) -> None:
        self._ledger.close(ClosedError("The host tier was closed.", "Load the model again."))

    def _check_open(self) -> None:
        self._monitor.fork_guard.check()
        self._ledger.check_open()
