"""Session: the interface through which another process uses the host tier; and a thread that enforces deadlines.

A session has no thread of its own. Each thread that changes the ledger's state also advances the demands of sessions
that can go on, and delivers their events.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from queue import Empty, SimpleQueue

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import ClosedError, ProtocolError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, transition
from moetier.tiers.threads import start_thread

from .demands import AsyncCaller, SessionEvent
from .ledger import Ledger

MAX_USES = 1024  # most uses that are noted in one transition: one message of another process may have a million


class Session(AsyncCaller, Closeable):
    """An asynchronous caller of the host tier. ``HostTier.session`` makes it.

    Thread-safe. No method waits for a record. Events are delivered in the order in which they happen.
    """

    def __init__(
        self,
        deliver: Callable[[SessionEvent], None],
        monitor: Monitor,
        ledger: Ledger,
        *,
        max_leases: int,
        timeout: float,
    ) -> None:
        super().__init__(deliver, max_leases)
        self._monitor = monitor
        self._ledger = ledger
        self._manifest, self._uses = ledger.manifest, ledger.uses
        self._timeout = timeout
        self._is_closed = False

    @property
    def open_requests(self) -> int:
        """Number of requests that are not over."""
        return len(self.demands)

    def block_of(self, request: int) -> int | None:
        """Return the block of the request of this number; None once the request is over."""
        return None if (demand := self.demands.get(request)) is None else demand.block

    def acquire(self, request: int, keys: Sequence[ExpertKey], timeout: float | None = None, of_total: int = 0) -> None:
        """Demand the records of ``keys``.

        A Granted event is delivered for each key. If the request fails, a Failed event is delivered instead of those
        that are missing.

        Args:
            request: the number of the request. No other request that is not over may have it.
            keys: distinct keys of one block.
            timeout: seconds after which the request fails with ExhaustedError if during this time it holds no lease
                and no record is read for it; None for the session's own value.
            of_total: as in ``ExpertSource.acquire``.

        Raises:
            MissingExpertError: the model does not have one of the experts.
            ProtocolError: another request has the same number and is not over.
            ClosedError: the session or the tier was closed.
            StoreError: the tier was condemned (``HostTier.condemn``).
        """
        if keys:
            self._manifest.check_keys(keys[0].block, keys)
            self._acquire(request, keys, self._timeout if timeout is None else timeout, of_total)

    @transition
    def _acquire(self, request: int, keys: Sequence[ExpertKey], timeout: float, of_total: int) -> None:
        self._check_open()
        if request in self.demands:
            raise ProtocolError(
                f"A request with the number {request} is not over yet.", "Give each request a number of its own."
            )
        self._ledger.begin(self._ledger.new_demand(keys[0].block, self, request, timeout), keys, of_total)

    @transition
    def release(self, request: int, keys: Sequence[ExpertKey]) -> None:
        """Release the leases of ``keys`` that the request of this number holds.

        Keys without a lease are ignored, because the request may have failed since the caller decided to release them.
        """
        if (demand := self.demands.get(request)) is not None:
            self._ledger.release(demand, keys)

    @transition
    def end(self, request: int) -> None:
        """End the request of this number: release its leases, and cancel its loads. No effect once it is over."""
        if (demand := self.demands.get(request)) is not None:
            self._ledger.end(demand)

    def note_uses(self, keys: Sequence[ExpertKey]) -> int:
        """Note uses by the other process, which has found ``keys`` in the directory. Return the number of hits.

        Each use is a hit, unless the tier was condemned. ``keys`` are in the order of use. Raises MissingExpertError if
        the model does not have one of the experts.
        """
        for key in keys:
            self._manifest.check_keys(key.block, (key,))
        return sum([self._note_some_uses(keys[at : at + MAX_USES]) for at in range(0, len(keys), MAX_USES)])

    @transition
    def _note_some_uses(self, keys: Sequence[ExpertKey]) -> int:
        if not self._takes_hints():
            return 0
        self._uses.note_client(keys)
        return len(keys)

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches as ``ExpertSource`` specifies. Only requests of the same session are replaced.

        Raises MissingExpertError if the model does not have one of the experts.
        """
        self._manifest.check_keys(block, keys)
        self._prefetch(block, dict.fromkeys(keys))  # the other process may name a key many times

    @transition
    def _prefetch(self, block: int, keys: Collection[ExpertKey]) -> None:
        if self._takes_hints():
            self._ledger.prefetch(block, keys, self)

    @transition
    def close(self) -> None:
        """End all demands and their leases, and cancel all prefetch requests. Idempotent.

        Loads that a loader has begun go on. No more events are delivered.
        """
        self._is_closed = True
        self._ledger.end_caller(self)

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("The session was closed.", "Open a new session.")
        self._ledger.check_open()

    def _takes_hints(self) -> bool:
        """Return False if the tier was condemned: uses and requests are then ignored, and ``acquire`` raises the error.

        Raises ClosedError if the session or the tier was closed.
        """
        if self._ledger.fault is not None:
            return False
        self._check_open()
        return True


class Timekeeper(Closeable):
    """A thread that fails asynchronous demands at their deadlines."""

    def __init__(
        self,
        monitor: Monitor,
        ledger: Ledger,
        alarm: SimpleQueue[None],
        run_or_condemn: Callable[[Callable[[], None]], None],
    ) -> None:
        """``alarm``: an item makes the thread look at the deadlines again. ``run_or_condemn`` runs the thread."""
        self._monitor = monitor
        self._ledger = ledger
        self._alarm = alarm
        self._run_or_condemn = run_or_condemn
        self._is_closed = False
        self._thread: threading.Thread | None = None

    @transition
    def start(self) -> None:
        """Start the thread, and serve asynchronous demands from now on. Idempotent.

        Raises ClosedError if the tier was closed, StoreError if it was condemned.
        """
        self._ledger.check_open()
        if self._thread is None:
            self._thread = start_thread("moetier-timekeeper", self._run_or_condemn, self._run)
            self._monitor.run_after_mark(self._ledger.serve)

    def close(self) -> None:
        """End the thread. Idempotent."""
        self._is_closed = True
        self._alarm.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        deadline: float | None = None
        while not self._is_closed:
            with contextlib.suppress(Empty):
                self._alarm.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0.0))
            deadline = self._expire()

    @transition
    def _expire(self) -> float | None:
        return self._ledger.expire()
