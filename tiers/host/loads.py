"""Loads: the records that are being read into slots, and the record that a loader reads next.

This module is a part of the ledger: callers hold the tier's lock, and it does no I/O. Demands are served first. While
no record is being read for a demand, records are read for prefetch requests, and after these for the warm-up. Pages of
keys and values, which others read and write on the same disk, come between: behind demands, before prefetches; and they
are written while nothing is read (``tiers.disk_order``).

A load goes through ``begin_for``, ``take`` by a loader, and ``complete`` or ``fail``. It ends early in ``withdraw``, if
no loader has taken it and no demand waits for it, and in ``continue_or_cancel``, if it is a prefetch that is no longer
wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from moetier.tiers.arena.directory import Directory
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import MoetierError
from moetier.tiers.layout import ExpertKey, PoolSlot
from moetier.tiers.manifest import Block
from moetier.tiers.source import interruptible_bytes
from moetier.tiers.stats import TierCounters

from .demands import Demand, Load, LoadState, Pool, Purpose
from .prefetch import PrefetchQueue
from .waiting import Notifier, WaitingDemands


class LoadLimits(NamedTuple):
    """Limits of the numbers of loads in progress."""

    # loads that one demand waits for at a time. A thread's demand has at most twice as many records under way: being
    # loaded, or arrived and not leased yet.
    ahead: int
    prefetches: int  # reads for prefetches in progress

    @classmethod
    def of(cls, loaders: int, layout: ArenaLayout) -> LoadLimits:
        """Return the limits of a tier with so many loaders, and slots as ``layout`` has them.

        Demands keep every loader busy. If records are large enough to be read in pieces, prefetches leave one loader
        free for demands. Otherwise there is one prefetch at a time, so that a demand waits for one such read at most.
        """
        is_interruptible = all(region.slot_bytes > interruptible_bytes(region.slot_bytes) for region in layout.regions)
        return cls(ahead=2 * loaders, prefetches=max(1, loaders - 1) if is_interruptible else 1)


class FairQueue:
    """Loads that demands have begun and no loader has taken yet, in one queue for each caller.

    Callers are served in turn, so many loads of one caller don't delay the few loads of another.
    """

    def __init__(self) -> None:
        # A dictionary from caller to queue; the caller that was served last comes last. It is no OrderedDict, whose
        # iterators make a KeyError of an exception that comes from outside while they hash a key.
        self._queues: dict[Hashable, deque[Load]] = {}

    def add(self, caller: Hashable, load: Load) -> None:
        """Add a load to the queue of a caller. The same load may be in the queues of several callers."""
        if (queue := self._queues.get(caller)) is None:
            # Callers with empty queues at the front are removed: they would be first again anyway. Callers with empty
            # queues behind a waiting one stay: if they were removed, they would be new when they come back, and so go
            # before the one that waits.
            for first in list(takewhile(lambda each: not self._queues[each], self._queues)):
                del self._queues[first]
            queue = deque()
            self._queues = {caller: queue, **self._queues}
        queue.append(load)

    def pop(self) -> Load | None:
        """Take the first load of the caller whose latest turn is longest ago. Return None if no load is queued."""
        for caller, queue in self._queues.items():
            while queue:
                load = queue.popleft()
                # it may have been taken for another caller, which waits for the same record
                if load.state is LoadState.QUEUED:
                    load.state = LoadState.TAKEN
                    self._queues[caller] = self._queues.pop(caller)
                    return load
        return None

    def clear(self) -> None:
        """Remove all queued loads and callers."""
        self._queues.clear()


class Loads:
    """All loads, whether or not a loader has begun to read the record.

    Args:
        directory: the directory of the arena that has the slots.
        counters: the tier's counters.
        prefetches: the queue of prefetches.
        waiting: the queues of demands.
        notifier: wakes threads that can go on.
        limits: how many loads may be in progress.
        rest: from each pool that ``_load_rest`` may read to its blocks.
    """

    def __init__(
        self,
        directory: Directory,
        counters: TierCounters,
        prefetches: PrefetchQueue,
        waiting: WaitingDemands,
        notifier: Notifier,
        limits: LoadLimits,
        rest: Mapping[Pool, Mapping[int, Block]],
    ) -> None:
        self.closed_by: MoetierError | None = None  # the error with which the tier was closed; None while it is open
        self._rest = dict(rest)  # without pools that ``_load_rest`` has read
        self._directory = directory
        self._counters = counters
        self._prefetches = prefetches
        self._waiting = waiting
        self._notifier = notifier
        self._limits = limits
        self._queue = FairQueue()
        self._loads: dict[ExpertKey, Load] = {}
        # reads of pages, in progress or waiting for reads for demands (``disk_order``); no prefetch begins meanwhile
        self._kv_reads = set[object]()

    def __iter__(self) -> Iterator[Load]:
        return iter(self._loads.values())

    # -- demands ------------------------------------------------------------------------------------------------------

    def begin_for(self, demand: Demand, key: ExpertKey) -> bool:
        """Begin the load of a record for a demand, which waits for it. Return False if it may not begin one now."""
        if not self._may_begin(demand) or (slot := self._choose(demand)) is None:
            return False
        self._begin(demand.pool, key, slot, is_scan=demand.is_scan)
        self.join(demand, key)
        self._notifier.wake_loader()
        self._load_rest(demand.pool)
        return True

    def _may_begin(self, demand: Demand) -> bool:
        starved, ahead = demand.pool.starved, self._limits.ahead
        if len(demand.loads) >= ahead or (starved and starved[0] is not demand):
            return False
        return demand.caller.is_asynchronous or len(demand.loads) + len(demand.arrived) < 2 * ahead

    def _choose(self, demand: Demand) -> PoolSlot | None:
        """Return a slot for a load of the demand; None if there is no slot.

        Records that are requested for a prefetch are evicted only if no other record can be.
        """
        choose = partial(demand.pool.choose, demand.block, may_borrow=demand.is_idle, is_scan=demand.is_scan)
        slot = choose(keep=self._prefetches.is_requested)
        return choose() if slot is None else slot

    def _begin(
        self,
        pool: Pool,
        key: ExpertKey,
        slot: PoolSlot,
        purpose: Purpose = Purpose.DEMAND,
        *,
        is_scan: bool = False,
    ) -> Load:
        """Begin the load of a record into a slot that is EMPTY or evictable, and return the load."""
        load = Load(pool, key, slot, purpose)
        if (evicted := pool.begin_fill(slot, key, is_scan=is_scan, is_prefetch=load.is_prefetch)) is not None:
            self._counters.count(evictions=1)
            self._prefetches.note_eviction(evicted)
        self._prefetches.forget_copy(key)  # the record is needed again, so the tier above no longer has its copy
        self._directory.begin_fill(pool.number(slot), evicted)
        self._loads[key] = load
        if load.is_prefetch:
            load.state = LoadState.TAKEN  # by the loader that calls this
            self._prefetches.note_begun(key, purpose)
        return load

    def join(self, demand: Demand, key: ExpertKey) -> None:
        """Let a demand wait for the load of ``key``, which exists, and claim the load's slot."""
        load = self._loads[key]
        load.pool.pin(load.slot)
        if load.is_prefetch:
            self._prefetches.note_uses((key,))
            # The loader of this record may have paused (``continue_or_cancel``). Wake it for every demand that joins,
            # not only for the first: the first may have left before the loader looked.
            self._notifier.wake_sleepers()
        load.waiters.append(demand)
        demand.wait_for(load)
        if load.state is LoadState.QUEUED:
            self._queue.add(demand.caller, load)

    def withdraw(self, demand: Demand, load: Load) -> None:
        """End the wait of a demand for a load. The caller has already removed the demand's claim on the slot.

        The load is cancelled if no loader has taken it and no other demand waits for it.
        """
        load.waiters.remove(demand)
        if load.waiters:
            return
        if load.state is LoadState.QUEUED:
            load.state = LoadState.CANCELLED
            self._abort(load)
        if not self.has_demand_loads:  # prefetches that yielded to the load may go on
            self._notifier.wake_sleepers()
            self.wake_loaders_for_prefetches()

    # -- prefetches ---------------------------------------------------------------------------------------------------

    def warm(self, pool: Pool, keys: Sequence[ExpertKey]) -> None:
        """Queue records for the warm-up. They are read after all prefetch requests, and only into EMPTY slots."""
        self._prefetches.queue_warmup(pool, keys)
        self.wake_loaders_for_prefetches()

    def _load_rest(self, pool: Pool) -> None:
        """Queue all other records of a pool for the warm-up, if it has a slot for each and half of them are taken.

        After so many demands, the other records will soon be needed, too. So of a model that is hardly used, only what
        demands need is read; of any other, at most twice as much.
        """
        if pool in self._rest and 2 * len(pool.keys) >= pool.slot_count:
            blocks = self._rest.pop(pool)
            keys = [ExpertKey(number, expert) for number, block in blocks.items() for expert in range(block.experts)]
            if len(keys) == pool.slot_count:
                self.warm(pool, keys)

    def continue_or_cancel(self, load: Load) -> bool | None:
        """Decide whether the read of a prefetch goes on.

        Returns True if the read goes on, None while it has to yield to reads for demands or of pages, and False if the
        load is cancelled. A load is cancelled if its record is no longer requested, or if the load is for the warm-up
        and a demand is starved. The decision and the cancellation are in one transition, so no demand can join the load
        in between.
        """
        if load.waiters:
            return True
        if self.closed_by is None and (self.has_demand_loads or self.is_reading_kv):
            load.has_yielded = True
            return None
        if load.purpose is Purpose.WARMUP:
            is_wanted = self.closed_by is None and not load.pool.starved
        else:
            is_wanted = self._prefetches.is_requested(load.key)
        if not is_wanted:
            self._abort(load, is_cancelled=True)
            self._notifier.wake_sleepers()
        return is_wanted

    def _begin_prefetch(self) -> Load | None:
        """Begin the load of the next prefetch, and return it.

        Returns None if there is no prefetch, if a record is being read for a demand, if pages are read, or if enough
        prefetches are being read.
        """
        if self.has_demand_loads or self.is_reading_kv or self._prefetching >= self._limits.prefetches:
            return None
        if (read := self._prefetches.next_read()) is None:
            return None
        return self._begin(read.pool, read.key, read.slot, read.purpose, is_scan=read.is_scan)

    def wake_loaders_for_prefetches(self) -> None:
        """Wake as many loaders as there are prefetches that can now be read."""
        if (unbegun := self._prefetches.unbegun) and not (self.has_demand_loads or self.is_reading_kv):
            for _ in range(min(unbegun, self._limits.prefetches - self._prefetching)):
                self._notifier.wake_loader()

    @property
    def has_demand_loads(self) -> bool:
        """Whether a load for a demand is in progress or waits for a loader."""
        return any(load.is_for_demands for load in self._loads.values())

    @property
    def _prefetching(self) -> int:
        """Number of reads for prefetches in progress."""
        return sum([load.is_prefetch for load in self._loads.values()])

    # -- pages --------------------------------------------------------------------------------------------------------

    @property
    def is_reading_kv(self) -> bool:
        """Whether pages are read, or their reads wait for reads for demands."""
        return bool(self._kv_reads)

    def begin_kv_read(self, read: object) -> None:
        """Begin no prefetch until the read of a page has ended. ``read`` is its own object, which identifies it."""
        self._kv_reads.add(read)

    def end_kv_read(self, read: object) -> None:
        """Note that the read of a page has ended. Prefetches that yielded to it may go on. Idempotent."""
        self._kv_reads.discard(read)
        self._notifier.wake_sleepers()
        self.wake_loaders_for_prefetches()

    # -- loaders ------------------------------------------------------------------------------------------------------

    def take(self) -> Load | None:
        """Return the load whose record the calling loader reads next; None if there is nothing to read now.

        The loader calls ``complete`` or ``fail`` with it.
        """
        return self._queue.pop() or self._begin_prefetch()

    def complete(self, load: Load, seconds: float | None = None) -> None:
        """End a load whose record is in its slot. ``seconds`` is the duration of the read, if it was measured."""
        if seconds is not None and not load.has_yielded:
            self._counters.count_load(seconds)
        self._counters.count(bytes_in=load.pool.slot_bytes, warmed=load.purpose is Purpose.WARMUP)
        del self._loads[load.key]
        load.pool.complete_fill(load.slot)
        self._directory.complete_fill(load.pool.number(load.slot), load.key)
        if load.is_prefetch:
            self._prefetches.note_arrived(load.key)
        for demand in load.waiters:
            demand.complete(load)
            self._waiting.recheck(demand)
        self._notifier.wake_sleepers()
        if load.is_for_demands:
            self.wake_loaders_for_prefetches()  # this may have been the last read for a demand

    def fail(self, load: Load, error: BaseException) -> None:
        """End a load that has failed. Its slot becomes EMPTY, and all demands that wait for the record get ``error``.

        The error is not kept, so the next demand reads the record again. If no demand waits, the failure is only
        counted.
        """
        if self._loads.get(load.key) is not load:
            return  # ``complete`` was interrupted, and ``repair`` has made the key pending again in all demands
        self._counters.count(failures=self.closed_by is None)
        self._abort(load)
        for demand in load.waiters:
            demand.lose(load, error)
            self._waiting.note_released(demand, 1)
            self._waiting.recheck(demand)
        self._notifier.wake_sleepers()

    def close(self, error: MoetierError) -> None:
        """Begin no more reads. The loads that no loader has taken fail with ``error``."""
        self.closed_by = error
        self._prefetches.clear()
        while (load := self._queue.pop()) is not None:
            self.fail(load, error)

    def _abort(self, load: Load, *, is_cancelled: bool = False) -> None:
        """Remove a load whose record will not arrive. The slot becomes EMPTY. ``is_cancelled``: it is a prefetch."""
        del self._loads[load.key]
        self._prefetches.note_aborted(load.key, is_cancelled=is_cancelled)
        load.pool.abort_fill(load.slot)
        self._directory.abort_fill(load.pool.number(load.slot))

    # -- repair -------------------------------------------------------------------------------------------------------

    def repair(self, demands: Collection[Demand]) -> None:
        """Make the loads agree with ``demands`` after an interrupted transition.

        A load stays if a loader has taken it or a demand waits for it. Other loads are removed.
        """
        for demand in demands:
            for load in [load for load in demand.loads if self._loads.get(load.key) is not load]:
                demand.look_up_again(load)  # ``complete`` was interrupted
        self._queue.clear()
        for load in list(self._loads.values()):
            load.waiters = [demand for demand in demands if load in demand.loads]
            if load.state is LoadState.TAKEN:
                continue
            if not load.waiters:
                del self._loads[load.key]
            else:
                for demand in load.waiters:
                    self._queue.add(demand.caller, load)
                self._notifier.wake_loader()
