"""HostTier: records in shared memory, least recently used per block, filled by a small pool of loaders.

The ledger decides, under the monitor's lock; records are read outside it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from types import TracebackType

from .arena import Arena
from .budget import members
from .errors import ClosedError
from .keys import ExpertKey
from .ledger import Demand, Ledger, Load, Pool
from .monitor import Monitor
from .policy import plan_groups
from .source import Lease, RecordReader
from .stats import TierStats


class HostTier:
    """An ExpertSource over anything that can ``read_into``, which stays its owner's to close.

    One thread must not acquire again inside the loop over an acquire: at the smallest budget it would wait for itself.
    """

    def __init__(self, store: RecordReader, *, slots: Mapping[str, int], loaders: int = 4) -> None:
        """Allocates ``slots`` by array, as ``slots_for`` gives them. Raises BudgetError if the memory can't be had."""
        manifest = store.manifest
        assert loaders > 0
        assert slots.keys() == manifest.layouts.keys()
        self._store = store
        self._manifest = manifest
        self._monitor = Monitor()
        self._bell: SimpleQueue[None] = SimpleQueue()  # wakes one loader a ring, which works until nothing is left
        self._ledger = Ledger(  # ahead: enough to keep every loader busy; prefetches: a demand finds a loader
            wake=self._monitor.wake, ring=self._ring, ahead=2 * loaders, prefetches=max(1, loaders - 1)
        )
        self._closed = False
        self._pools: dict[str, Pool] = {}
        self._arenas: dict[Pool, Arena] = {}
        self._records: list[memoryview] = []  # by slot: always the same object, so that who wraps it knows it again
        self._loaders: list[threading.Thread] = []
        try:
            for array, count in slots.items():
                layout = manifest.layouts[array]
                groups = plan_groups(count, members(manifest, array))
                pool = self._pools[array] = Pool(count, groups, len(self._records), layout.slot_bytes)
                arena = self._arenas[pool] = Arena.create(count, layout.slot_bytes)
                self._records += [arena.view(slot, layout.record_bytes) for slot in range(count)]
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
        self._manifest.check_keys(block, keys)
        demand = Demand(self._pool(block), block)
        try:
            with self._monitor:
                self._check_open()
                self._ledger.look(demand, keys)
            while (lease := self._next(demand)) is not None:
                yield lease
        finally:
            self._monitor.post(partial(self._ledger.leave, demand))

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says. A wish evicts only what is neither held nor wished, and only of its own group."""
        self._manifest.check_keys(block, wishes)
        with self._monitor:
            self._check_open()
            self._ledger.wish(self._pool(block), block, wishes)
        self._ring(min(len(wishes), len(self._loaders)))

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
            self._ring(len(self._loaders))
            for loader in self._loaders:
                loader.join()
        self._records.clear()
        for arena in self._arenas.values():
            arena.close()

    def check_integrity(self) -> None:
        """Asserts that slots, groups, loads and callers agree."""
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
        try:
            self._store.read_into(load.key, self._arenas[load.pool].slot(load.slot))
        except BaseException as error:  # whatever it is: those who wait must learn of it
            traceback.clear_frames(error.__traceback__)  # they hold the slot's buffer
            with self._monitor:
                self._ledger.counters.failures += 1
                self._ledger.fail(load, error)
        else:
            with self._monitor:
                self._ledger.arrive(load)

    def _pool(self, block: int) -> Pool:
        return self._pools[self._manifest.blocks[block].array]

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()


def _closed_error() -> ClosedError:
    return ClosedError("The host tier was closed.", "Load the model again.")
