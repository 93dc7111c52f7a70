"""Timekeeper: a thread that tells those who have waited for too long."""

from __future__ import annotations

import contextlib
import threading
import time
from queue import Empty, SimpleQueue

from moetier.tiers.locks import Monitor

from .parties import Parties


class Timekeeper:
    """Of who waits for slots in other processes' name. ``runs`` once there may be any."""

    def __init__(self, monitor: Monitor) -> None:
        self.runs = False
        self._monitor = monitor
        self._alarm: SimpleQueue[None] = SimpleQueue()  # somebody waits, or all is over
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, parties: Parties) -> None:
        """With the lock held. Idempotent."""
        if not self.runs:
            thread = threading.Thread(target=self._run, args=(parties,), name="moetier-timekeeper", daemon=True)
            thread.start()
            self._thread, self.runs = thread, True

    def watch(self) -> None:
        """Somebody waits."""
        self._alarm.put(None)

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._alarm.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self, parties: Parties) -> None:
        until: float | None = None
        while not self._closed:
            with contextlib.suppress(Empty):
                self._alarm.get(timeout=None if until is None else max(until - time.monotonic(), 0.0))
            until = self._monitor.run(parties.expire)
