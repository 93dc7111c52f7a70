"""Thread that queries a daemon's state at intervals, and retries while the daemon can't be reached."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from moetier.proto.expert_store_pb2 import DescribeReply, StatsReply
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.probe import DaemonProbe, probe
from moetier.tiers.errors import MoetierError
from moetier.tiers.threads import start_thread

REPLY_SECONDS = 2.0  # longest wait for a reply, in seconds; ``end`` may take as long
RETRY = 1.0  # longest time, in seconds, until a daemon that can't be reached is tried again


@dataclass(frozen=True, slots=True)
class DaemonReading:
    """Description and counters of a daemon, from one query."""

    described: DescribeReply
    stats: StatsReply


def look(address: Address, credentials: Credentials) -> DaemonReading:
    """Query a daemon once. Raises DaemonError if it does not answer, ConfigError if the credentials can't be used."""
    with probe(address, credentials, timeout=REPLY_SECONDS) as daemon:
        return _look(daemon)


def _look(daemon: DaemonProbe) -> DaemonReading:
    """Query description and counters one right after the other.

    gRPC reconnects by itself, so a new daemon may answer; the description shows whether it is the same one.
    """
    return DaemonReading(daemon.describe(), daemon.stats(details=True))


class Watch:
    """Thread that queries a daemon every ``interval`` seconds, unless ``is_paused``; ``change`` sets both."""

    def __init__(self, credentials: Credentials, interval: float) -> None:
        self.interval = interval
        self.is_paused = False
        self._credentials = credentials
        self._changed = threading.Condition()  # guards: ``interval``, ``is_paused`` and ``_is_ending``
        self._is_ending = False
        self._thread: threading.Thread | None = None

    def begin(self, address: Address, tell: Callable[[DaemonReading | MoetierError], object]) -> None:
        """Start the thread. It calls ``tell`` with the result or the error of each query. Must be called only once."""
        assert self._thread is None
        self._thread = start_thread("moetier-watch", self._run, address, tell)

    def change(self, *, interval: float | None = None, paused: bool | None = None) -> None:
        """Set the interval in seconds, pause the thread, or let it continue, with immediate effect."""
        with self._changed:
            self.interval = self.interval if interval is None else interval
            self.is_paused = self.is_paused if paused is None else paused
            self._changed.notify_all()

    def end(self) -> None:
        """End the thread, and wait until a query that is under way has ended. Idempotent."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self, address: Address, tell: Callable[[DaemonReading | MoetierError], object]) -> None:
        while True:
            try:
                with probe(address, self._credentials, timeout=REPLY_SECONDS) as daemon:
                    while True:
                        tell(_look(daemon))
                        if not self._wait(self.interval):
                            return
            except MoetierError as error:
                tell(error)
            if not self._wait(min(self.interval, RETRY)):
                return

    def _wait(self, seconds: float) -> bool:
        """Wait until the next query is due, and return True; return False once ``end`` is called.

        A change of the interval starts the wait again.
        """
        with self._changed:
            while not self._is_ending:
                if self.is_paused:
                    self._changed.wait()
                    seconds = 0.0  # query at once when the pause ends
                elif self._changed.wait(seconds):
                    seconds = self.interval
                else:
                    return True
            return False
