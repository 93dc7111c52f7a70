"""HostTier: records in shared memory, evicted block by block, filled by a small pool of loaders.

The ledger decides, under the monitor's lock; records are read outside it.
"""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType

from .arena import Arena
from .budget import members
from .errors import ClosedError
from .hotset import HotSet
from .keys import ExpertKey
from .ledger import Demand, Ledger, Load, Pool
from .monitor import Monitor
from .order import DEFAULT_ORDER
from .plan import ArenaPlan
from .policy import plan_groups
from .recovery import intact_slots
from .session import Desk, Event, Session
from .source import Lease, RecordReader
from .stats import TierStats


class HostTier:
    """An ExpertSource over anything that can ``read_into``, which stays its owner's to close.

    One thread must not acquire again inside the loop over an acquire: at the smallest budget it would wait for itself.
    """

    def __init__(
        self,
        store: RecordReader,
        *,
        slots: Mapping[str, int],
        loaders: int = 4,
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
        self._store = store
        self._monitor = Monitor()
        self._bell: SimpleQueue[None] = SimpleQueue()  # wakes one loader a ring, which works until nothing is left
        self._alarm: SimpleQueue[None] = SimpleQueue()  # for the timekeeper: somebody waits, or all is over
        self._timekeeper: threading.Thread | None = None
        self._closed = False
        self._is_to_serve = False  # the parties, as soon as the lock is let go
        self._loaders: list[threading.Thread] = []
        self._arena = arena or Arena.create(self.plan)
        # by slot: always the same object, so that who wraps it knows it again
        self._records = [self._arena.view(slot) for slot in range(self.plan.slots)]
        self._ledger = Ledger(  # ahead: enough to keep every loader busy; prefetches: a demand finds a loader
            self._arena.directory,
            wake=self._wake,
            ring=self._ring,
            watch=partial(self._alarm.put, None),
            ahead=2 * loaders,
            prefetches=max(1, loaders - 1),
        )
        self._pools: dict[str, Pool] = {}
        try:
            for region, first in zip(self.plan.regions, self.plan.first_slots, strict=True):
                groups = plan_groups(region.slots, members(manifest, region.array))
                self._pools[region.array] = Pool(region.slots, groups, first, region.slot_bytes, policy)
            self._desk = Desk(manifest, self._monitor, self._ledger, self._arena.directory, self._pools)
            if arena is not None:
                self._recover(arena, loaders)
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
        block = keys[0].block
        self.manifest.check_keys(block, keys)
        demand = Demand(self._desk.pool(block), block, caller=threading.get_ident())
        try:
            with self._monitor:
                self._check_open()
                self._ledger.look(demand, keys)
            while (lease := self._next(demand)) is not None:
                yield lease
        finally:
            if self._monitor.home.is_here:  # the directory is shared with a forked child, and not the child's to write
                self._monitor.post(partial(self._ledger.leave, demand))

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says. A wish evicts only what is neither held nor wished, and only of its own group."""
        self.manifest.check_keys(block, wishes)
        with self._monitor:
            self._check_open()
            self._ledger.wish(self._desk.pool(block), block, wishes)

    def warm(self, hot: HotSet) -> None:
        """Reads each block's hottest into EMPTY slots, in the background, while nothing is read for demands or wishes.
        It evicts nothing, and what is there already is not read. Returns at once."""
        with self._monitor:
            self._check_open()
            for block in range(len(self.manifest.blocks)):
                pool = self._desk.pool(block)
                self._ledger.warm(pool, hot.hottest(block, pool.policy.quota(block)))

    def count(self, keys: Iterable[ExpertKey]) -> None:
        """Uses that this tier does not hear of by itself, where a tier above has the records. No order of eviction
        changes."""
        with self._monitor:
            self._ledger.count(keys)

    def take_uses(self) -> dict[ExpertKey, int]:
        """How often each record was wanted since the last call. The first call begins the counting."""
        with self._monitor:
            uses, self._ledger.uses = self._ledger.uses, {}
            return uses or {}

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says."""
        with self._monitor:
            return [key for key in keys if self._desk.pool(key.block).slots.find(key) is None]

    def session(self, deliver: Callable[[Event], None], *, leases: int = 8, patience: float = 10.0) -> Session:
        """For what another process asks for: at most ``leases`` slots are held for it at a time, and a request that
        has none is refused after ``patience`` seconds. Closing it is the caller's."""
        with self._monitor:
            self._check_open()
            if self._timekeeper is None:  # now: where no thread is to be had, nobody has asked for anything yet
                timekeeper = threading.Thread(target=self._keep_time, name="moetier-timekeeper", daemon=True)
                timekeeper.start()
                self._timekeeper = timekeeper
        return Session(deliver, self._desk, leases=leases, patience=patience)

    def export(self) -> int:
        """A new read-only descriptor of the arena, the caller's to close; ``plan`` says what is where."""
        return self._arena.export()

    def whole(self, slot: int) -> memoryview:
        """A leased slot with its checksum, read-only: for another host, which proves it there."""
        return self._arena.whole(slot)

    def stats(self) -> TierStats:
        with self._monitor:
            pools = self._pools.values()
            return self._ledger.counters.snapshot(
                slots=sum(pool.slots.count for pool in pools),
                ready=sum(pool.slots.ready for pool in pools),
                slot_bytes=sum(pool.slots.count * pool.slot_bytes for pool in pools),
            )

    def close(self) -> None:
        """As ``ExpertSource`` says. Who sleeps in acquire wakes with ClosedError; a lease stays readable while held.

        In a forked child only its own maps and descriptors go.
        """
        if self._monitor.home.is_here:
            with self._monitor:
                self._closed = True
                self._ledger.drop(_closed_error())
                self._ledger.serve()
            self._ring(len(self._loaders))
            self._alarm.put(None)
            for thread in (*self._loaders, *([self._timekeeper] if self._timekeeper else [])):
                thread.join()
        self._records.clear()
        self._arena.close()

    def check_integrity(self) -> None:
        """Asserts that slots, groups, loads, callers and the directory agree."""
        with self._monitor:
            self._ledger.check_integrity(list(self._pools.values()))

    def _next(self, demand: Demand) -> Lease[memoryview] | None:
        """Ends the present lease; gives the next as soon as there is one, None behind the last."""
        began = 0.0
        with self._monitor:
            self._ledger.release(demand)
            while True:
                self._check_open()
                if demand.error is not None:
                    raise demand.error
                if demand.pending:
                    self._ledger.advance(demand)
                if demand.ready or demand.is_over:
                    break
                began = began or time.perf_counter()
                self._monitor.sleep()
            if began:
                self._ledger.counters.waited(time.perf_counter() - began)
            if demand.is_over:
                return None
            slot = self._ledger.take(demand)
            number = demand.pool.first + slot
            return Lease(demand.pool.slots.key(slot), self._records[number], number)

    def _recover(self, arena: Arena, threads: int) -> None:
        kept = intact_slots(arena, self.manifest, threads)
        arena.directory.reclaim(kept)
        for slot, key in kept.items():
            self._ledger.adopt(self._desk.pool(key.block), key, slot)
        self.recovered = len(kept)

    def _wake(self) -> None:
        self._monitor.wake()
        if self._timekeeper is not None and not self._is_to_serve:
            self._is_to_serve = True
            self._monitor.post(self._serve_parties)  # by who holds the lock now

    def _serve_parties(self) -> None:
        self._is_to_serve = False
        self._ledger.serve()

    def _keep_time(self) -> None:
        """Of who waits for slots in other processes' name."""
        until: float | None = None
        while not self._closed:
            with contextlib.suppress(Empty):
                self._alarm.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
            with self._monitor:
                until = self._ledger.expire()
                self._ledger.serve()

    def _ring(self, times: int = 1) -> None:
        for _ in range(times):
            self._bell.put(None)  # reentrant, as it promises: a finalizer may come by here

    def _serve(self) -> None:
        """A loader's life."""
        while not self._closed:
            self._bell.get()
            while (load := self._next_load()) is not None:
                self._read(load)

    def _next_load(self) -> Load | None:
        with self._monitor:
            return self._ledger.next_load()

    def _read(self, load: Load) -> None:
        # while it stands back, another loader must be there for the demands
        pause = partial(self._stand_back, load) if load.wished and len(self._loaders) > 1 else None
        try:
            self._store.read_into(load.key, self._arena.slot(load.pool.first + load.slot), pause)
        except _UnwantedError:
            with self._monitor:
                self._ledger.cancel(load)
        except BaseException as error:  # whatever it is: those who wait must learn of it
            traceback.clear_frames(error.__traceback__)  # they hold the slot's buffer
            with self._monitor:
                self._ledger.counters.failures += 1
                self._ledger.fail(load, error)
        else:
            with self._monitor:
                self._ledger.arrive(load)

    def _stand_back(self, load: Load) -> bool:
        """Of a load that a wish began; whether no demand has joined it yet."""
        with self._monitor:
            while not self._closed and self._ledger.stands_back(load):
                self._monitor.sleep()
            if self._ledger.is_unwanted(load):
                raise _UnwantedError
            return not load.waiters

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()


class _UnwantedError(Exception):
    """Ends the read of a record that nobody wants any more."""


def _closed_error() -> ClosedError:
    return ClosedError("The host tier was closed.", "Load the model again.")
