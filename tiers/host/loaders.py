"""Loaders: the threads of a host tier that read records into slots."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue

from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.locks import Monitor
from moetier.tiers.source import interruptible_bytes
from moetier.tiers.store.base import Store

from .demands import Load
from .loads import Loads


def most_prefetches(loaders: int, plan: ArenaPlan) -> int:
    """Return the largest number of reads for prefetches that may be in progress at a time.

    If records are large enough to be read in pieces, one of the ``loaders`` threads stays free for demands. Otherwise
    the number is 1, so that a demand waits for one such read at most.
    """
    is_interruptible = all(region.slot_bytes > interruptible_bytes(region.slot_bytes) for region in plan.regions)
    return max(1, loaders - 1) if is_interruptible else 1


class Loaders:
    """Threads that read records. ``Loads`` decides what they read, under the monitor's lock. They read without it."""

    def __init__(
        self,
        store: Store,
        allocate: Callable[[int], None],
        slots: Sequence[memoryview],
        monitor: Monitor,
        loads: Loads,
        bell: SimpleQueue[None],
    ) -> None:
        """Prepare the loaders. ``start`` starts the threads.

        Args:
            store: reads the records.
            allocate: called with the number of a slot before its memory is used; may raise BudgetError.
            slots: a writable view of each slot of the tier, in the order of their numbers.
            monitor: the tier's monitor.
            loads: decides what is read next.
            bell: each item in this queue wakes a loader, which then works until there is nothing to read.
        """
        self._store = store
        self._allocate = allocate
        self._slots = slots
        self._monitor = monitor
        self._loads = loads
        self._bell = bell
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        """Start ``count`` threads."""
        for number in range(count):
            # daemon threads, so that a tier that is never closed does not keep the interpreter from ending
            loader = threading.Thread(target=self._run, name=f"moetier-loader-{number}", daemon=True)
            loader.start()
            self._threads.append(loader)

    def close(self) -> None:
        """Wait for the reads in progress, and end the threads. The caller must have closed the ledger."""
        for _ in self._threads:
            self._bell.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while self._loads.closed_by is None:
            self._bell.get()
            while (load := self._monitor.run(self._loads.next_read)) is not None:
                self._read(load)

    def _read(self, load: Load) -> None:
        slot = load.pool.first + load.slot
        # a read may pause only if there is a second loader, which reads for demands during the pause
        pause = partial(self._pause, load) if load.is_prefetch and len(self._threads) > 1 else None
        began = time.monotonic()
        try:
            self._allocate(slot)
            self._store.read_into(load.key, self._slots[slot], pause)
            self._monitor.run(self._loads.arrive, load, time.monotonic() - began)
        except _CancelledError:
            pass
        except BaseException as error:  # any exception, because the demands that wait for the record must get it
            traceback.clear_frames(error.__traceback__)  # the frames would keep the slot's memory
            self._monitor.run(self._loads.fail, load, error)

    def _pause(self, load: Load) -> bool:
        """Sleep while the read of a prefetch has to yield to demands. Return whether it may have to yield again.

        Once a demand waits for the prefetched record, the read need not yield any more. Raises _CancelledError if the
        load was cancelled.
        """
        if not self._monitor.wait_for(self._loads.go_on, load):
            raise _CancelledError
        return not load.waiters


class _CancelledError(Exception):
    """Ends the read of a load that was cancelled."""
