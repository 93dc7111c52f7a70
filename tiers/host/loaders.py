"""Loaders: a small pool of threads that read records into slots."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

import numpy as np

from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.plan import ArenaPlan
from moetier.tiers.locks import Monitor
from moetier.tiers.source import Beginning, RecordReader, interruptible_bytes
from moetier.tiers.stats import TierCounters

from .ledger import Ledger
from .loads import Loads
from .requests import Load, Pool
from .staging import Head


def prefetches(loaders: int, plan: ArenaPlan) -> int:
    """Reads for wishes at a time. A demand waits for no more than one that can't stand back, and finds a loader."""
    is_patient = all(region.slot_bytes > interruptible_bytes(region.slot_bytes) for region in plan.regions)
    return max(1, loaders - 1) if is_patient else 1


class Loaders:
    """What they read is decided under the monitor's lock, and read outside it."""

    def __init__(self, store: RecordReader, arena: Arena, monitor: Monitor) -> None:
        self._store = store
        self._parts = store.parts
        self._arena = arena
        self._monitor = monitor
        self._bell: SimpleQueue[None] = SimpleQueue()  # wakes one loader a ring, which works until nothing is left
        self._threads: list[threading.Thread] = []
        self._loads: Loads
        self._counters: TierCounters

    def start(self, ledger: Ledger, count: int) -> None:
        self._loads, self._counters = ledger.loads, ledger.counters
        for number in range(count):
            # daemon: a tier that nobody closes must not keep the interpreter from ending
            loader = threading.Thread(target=self._serve, name=f"moetier-loader-{number}", daemon=True)
            loader.start()
            self._threads.append(loader)

    def ring(self) -> None:
        """There is something to read."""
        self._bell.put(None)  # reentrant, as it promises: a finalizer may come by here

    def close(self) -> None:
        """When the ledger has been dropped; waits for reads under way."""
        for _ in self._threads:
            self.ring()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """A loader's life."""
        while not self._loads.is_dropped:
            self._bell.get()
            while (task := self._next_task()) is not None:
                if isinstance(task, Load):
                    self._read(task)
                else:
                    self._read_piece(task)

    def _next_task(self) -> Load | Head[Pool] | None:
        return self._monitor.run(self._loads.take)

    def _read(self, load: Load) -> None:
        # while it stands back, another loader must be there for the demands
        pause = partial(self._stand_back, load) if load.wished and len(self._threads) > 1 else None
        began = time.monotonic()
        try:
            self._fill(load, self._arena.slot(load.pool.first + load.slot), pause)
            self._monitor.run(self._arrive, load, began)
        except _UnwantedError:
            pass
        except BaseException as error:  # whatever it is: those who wait must learn of it
            traceback.clear_frames(error.__traceback__)  # they hold the slot's buffer
            self._monitor.run(self._fail, load, error)

    def _fail(self, load: Load, error: BaseException) -> None:
        self._counters.failures += 1
        self._loads.fail(load, error)

    def _arrive(self, load: Load, began: float) -> None:
        if not load.has_stood_back and load.head is None:
            seconds = time.monotonic() - began
            load.pool.note_read(seconds)
            self._counters.loaded(seconds)
        self._loads.arrive(load)

    def _fill(self, load: Load, slot: memoryview, pause: Callable[[], bool] | None) -> None:
        if load.head is None:
            self._store.read_into(load.key, slot, pause)
        else:
            assert self._parts is not None
            beginning = Beginning(load.head.end, partial(self._copy, load.head))
            self._parts.read_rest(load.key, slot, beginning, pause)

    def _read_piece(self, head: Head[Pool]) -> None:
        assert self._parts is not None
        try:
            self._parts.read_part(head.key, head.filled, head.buffer[head.filled : head.end])
        except BaseException as error:  # whatever it is: its demand meets it again
            traceback.clear_frames(error.__traceback__)
            self._monitor.run(self._loads.grown, head, error)
        else:
            self._monitor.run(self._loads.grown, head, None)

    def _copy(self, head: Head[Pool], slot: memoryview) -> None:
        """What was read before its load began, or is being read still."""
        over = threading.Lock()
        over.acquire()
        self._monitor.run(head.tell, over.release)
        over.acquire()
        if head.error is not None:
            raise head.error
        # numpy lets go of Python's lock meanwhile
        np.frombuffer(slot, np.uint8)[: head.filled] = np.frombuffer(head.buffer, np.uint8)[: head.filled]

    def _stand_back(self, load: Load) -> bool:
        """Of a load that a wish began; whether no demand has joined it yet."""
        if not self._monitor.wait_for(self._is_wanted, load):
            raise _UnwantedError
        return not load.waiters

    def _is_wanted(self, load: Load) -> bool | None:
        """None while it is to wait. Else it is wanted, or it is cancelled."""
        if not self._loads.is_dropped and self._loads.stands_back(load):
            load.has_stood_back = True
            return None
        if self._loads.is_unwanted(load):
            self._loads.cancel(load)
            return False
        return True


class _UnwantedError(Exception):
    """Ends the read of a load that was cancelled."""
