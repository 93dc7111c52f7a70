"""Loaders: a small pool of threads that read records into slots."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue

from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.locks import Monitor
from moetier.tiers.source import RecordReader, interruptible_bytes

from .demands import Load
from .loads import Loads


def most_prefetches(loaders: int, plan: ArenaPlan) -> int:
    """Return how many reads for prefetches may be in progress at a time, so that a loader is free for demands.

    If reads can't be interrupted this is 1, so that a demand waits for at most one of them. ``loaders`` is the number
    of threads.
    """
    is_interruptible = all(region.slot_bytes > interruptible_bytes(region.slot_bytes) for region in plan.regions)
    return max(1, loaders - 1) if is_interruptible else 1


class Loaders:
    """Threads that read records. ``Loads`` decides which, under the monitor's lock; the reads take place without it."""

    def __init__(
        self,
        store: RecordReader,
        slots: Sequence[memoryview],
        monitor: Monitor,
        loads: Loads,
        bell: SimpleQueue[None],
    ) -> None:
        """Prepare the loaders; ``start`` starts them.

        Args:
            store: what they read from.
            slots: writable views of the tier's slots, by number.
            monitor: the tier's monitor.
            loads: decides what is read next.
            bell: an item in this queue wakes a loader, which then works until there is nothing to read.
        """
        self._store = store
        self._slots = slots
        self._monitor = monitor
        self._loads = loads
        self._bell = bell
        self._threads: list[threading.Thread] = []

    def start(self, count: int) -> None:
        """Start ``count`` threads."""
        for number in range(count):
            # daemon threads, as a tier that is never closed must not keep the interpreter from ending
            loader = threading.Thread(target=self._run, name=f"moetier-loader-{number}", daemon=True)
            loader.start()
            self._threads.append(loader)

    def close(self) -> None:
        """Wait for reads that have begun, and end the threads. The ledger must have been closed before."""
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
        # pausing needs a second loader, which reads for the demands meanwhile
        pause = partial(self._pause, load) if load.is_prefetch and len(self._threads) > 1 else None
        began = time.monotonic()
        try:
            self._store.read_into(load.key, self._slots[slot], pause)
            self._monitor.run(self._loads.arrive, load, time.monotonic() - began)
        except _CancelledError:
            pass
        except BaseException as error:  # of any kind, since the demands that wait must get it
            traceback.clear_frames(error.__traceback__)  # the frames keep the slot's memory
            self._monitor.run(self._loads.fail, load, error)

    def _pause(self, load: Load) -> bool:
        """Sleep while a prefetch has to yield to demands. Return False once a demand waits for the prefetch itself.

        Raises _CancelledError if the prefetch was cancelled.
        """
        if not self._monitor.wait_for(self._loads.go_on, load):
            raise _CancelledError
        return not load.waiters


class _CancelledError(Exception):
    """Exception that ends the read of a load that was cancelled."""
