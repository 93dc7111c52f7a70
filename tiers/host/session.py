"""Session: what another process acquires from the host tier, and the thread that fails its demands in time.

A session has no thread. Whatever thread changes the ledger's state takes the steps of the demands that can go on, and
delivers their events.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from moetier.tiers.errors import ClosedError, ProtocolError, StoreError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, step

from .demands import AsyncCaller, Demand, Event
from .ledger import Ledger


class Session(AsyncCaller):
    """``HostTier.session`` makes it. Thread-safe; every method returns at once. Events come in their order."""

    def __init__(
        self, deliver: Callable[[Event], None], monitor: Monitor, ledger: Ledger, *, leases: int, patience: float
    ) -> None:
        super().__init__(deliver, leases)
        self._monitor = monitor
        self._ledger = ledger
        self._patience = patience
        self._closed = False

    @step
    def acquire(self, request: int, keys: Sequence[ExpertKey], patience: float | None = None) -> None:
        """Ask for distinct keys of one block. Each is answered by a Granted, or all together by a Failed.

        It fails with ExhaustedError when no lease of it was granted or on its way for ``patience`` seconds.

        Raises MissingExpertError for a key that the model does not have, ProtocolError for a request that is not over.
        """
        if not keys:
            return
        block = keys[0].block
        self._ledger.manifest.check_keys(block, keys)
        self._check_open()
        if request in self.demands:
            raise ProtocolError(f"Request {request} is not over yet.", "Number requests one by one.")
        patience = self._patience if patience is None else patience
        self._ledger.look(Demand(self._ledger.pool_of[block], block, self, self, request, patience), keys)
        self._ledger.serve()

    @step
    def release(self, request: int, keys: Sequence[ExpertKey] = ()) -> None:
        """End leases. Without ``keys`` the request is over, and what it waits for is cancelled.

        Keys that are not held are ignored, since their request may have failed meanwhile.
        """
        demand = self.demands.get(request)
        if demand is None:
            return
        if keys:
            slots = [demand.pool.find(key) for key in keys]
            self._ledger.release(demand, [slot for slot in slots if slot is not None])
            self._ledger.waiting.recheck(demand)
        else:
            self._ledger.leave(demand)
        self._ledger.serve()

    @step
    def used(self, keys: Sequence[ExpertKey]) -> None:
        """Count hits: keys that were found in the directory and computed with, least recently used first.

        Raises MissingExpertError for one that the model does not have.
        """
        for key in keys:
            self._ledger.manifest.check_keys(key.block, (key,))
        if self._takes_hints():
            for key in keys:
                self._ledger.use(key)

    @step
    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Prefetch as ``ExpertSource`` says; replaces this session's requests alone."""
        self._ledger.manifest.check_keys(block, keys)
        if self._takes_hints():
            self._ledger.prefetch(block, keys, self)

    @step
    def close(self) -> None:
        """Give back all leases and claims, and cancel all requests; loads that have begun go on. Idempotent.

        Nothing is delivered any more.
        """
        self._closed = True
        for demand in list(self.demands.values()):
            self._ledger.leave(demand)
        self._ledger.prefetches.cancel(self)
        self._ledger.serve()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The session was closed.", "Open a new one.")
        self._ledger.check_open()

    def _takes_hints(self) -> bool:
        """Return False for a tier that was condemned: the next acquire says why. Raises ClosedError."""
        if isinstance(self._ledger.loads.closed_by, StoreError):
            return False
        self._check_open()
        return True


class Timekeeper:
    """A thread that fails asynchronous demands at their deadlines. ``runs`` once there may be any."""

    def __init__(self, monitor: Monitor) -> None:
        self.runs = False
        self._monitor = monitor
        self._alarm: SimpleQueue[None] = SimpleQueue()  # there is a new deadline, or the thread is to end
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, ledger: Ledger) -> None:
        """Start the thread, with the lock held. Idempotent. Raises ClosedError, StoreError."""
        ledger.check_open()
        if not self.runs:
            thread = threading.Thread(target=self._run, args=(ledger,), name="moetier-timekeeper", daemon=True)
            thread.start()
            self._thread, self.runs = thread, True

    def watch(self) -> None:
        """Look at the deadlines again."""
        self._alarm.put(None)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._closed = True
        self._alarm.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, ledger: Ledger) -> None:
        until: float | None = None
        while not self._closed:
            with contextlib.suppress(Empty):
                self._alarm.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
            until = self._monitor.run(ledger.expire)
