"""Session: the interface of the host tier to another process, and the thread that fails demands at their deadlines.

A session has no thread of its own. Any thread that changes the ledger's state also advances the sessions' demands that
can go on, and delivers their events.
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
    """An asynchronous caller of the host tier, made by ``HostTier.session``.

    Thread-safe. Every method returns at once. Events are delivered in the order in which they happen.
    """

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
        """Demand the records of distinct keys of one block.

        A Granted event is delivered for each key, or a Failed event that ends the request.

        Args:
            request: number of the request, which no request in progress has.
            keys: the keys.
            patience: the request fails with ExhaustedError if it holds no lease and no record is being read for it for
                this many seconds; None for the session's own value.

        Raises:
            MissingExpertError: the model does not have one of the keys.
            ProtocolError: a request with this number is not over.
            ClosedError: the session or the tier was closed.
            StoreError: the tier was condemned (``HostTier.condemn``).
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
        """End the leases of ``keys``. Without ``keys``, end the request: its leases, and its wait for other records.

        Keys without a lease are ignored, since their request may have failed in the meantime.
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
        """Count hits of the other process: it has found ``keys`` in the directory and used them, the latest last.

        Raises MissingExpertError for a key that the model does not have.
        """
        for key in keys:
            self._ledger.manifest.check_keys(key.block, (key,))
        if self._takes_hints():
            for key in keys:
                self._ledger.use(key)

    @step
    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Prefetch as ``ExpertSource`` specifies. Only requests of this session are replaced."""
        self._ledger.manifest.check_keys(block, keys)
        if self._takes_hints():
            self._ledger.prefetch(block, keys, self)

    @step
    def close(self) -> None:
        """End all demands with their leases, and cancel all prefetch requests. Loads that have begun go on. Idempotent.

        No more events are delivered.
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
        """Return False if the tier was condemned, which the next ``acquire`` reports. Raises ClosedError."""
        if isinstance(self._ledger.loads.closed_by, StoreError):
            return False
        self._check_open()
        return True


class Timekeeper:
    """A thread that fails asynchronous demands at their deadlines. ``runs`` is true once it was started."""

    def __init__(self, monitor: Monitor) -> None:
        self.runs = False
        self._monitor = monitor
        self._alarm: SimpleQueue[None] = SimpleQueue()  # an item wakes the thread
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, ledger: Ledger) -> None:
        """Start the thread. The caller holds the tier's lock. Idempotent.

        Raises ClosedError, or StoreError if the tier was condemned.
        """
        ledger.check_open()
        if not self.runs:
            thread = threading.Thread(target=self._run, args=(ledger,), name="moetier-timekeeper", daemon=True)
            thread.start()
            self._thread, self.runs = thread, True

    def watch(self) -> None:
        """Make the thread look at the deadlines again."""
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
