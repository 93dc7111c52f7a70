"""Watch: a thread that looks at a daemon again and again, and goes on trying while it is away."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from moetier.proto.expert_store_pb2 import DescribeReply, StatsReply
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.probe import DaemonProbe, probe
from moetier.tiers.errors import MoetierError

PATIENCE = 2.0  # seconds for an answer: the longest that an end waits, too
RETRY = 1.0  # seconds at most until one that is away is asked again


@dataclass(frozen=True, slots=True)
class Look:
    """What a daemon is, and what it has counted."""

    described: DescribeReply
    stats: StatsReply


def look(address: Address, credentials: Credentials) -> Look:
    """Once. Raises DaemonError, ConfigError."""
    with probe(address, credentials, patience=PATIENCE) as daemon:
        return _look(daemon)


def _look(daemon: DaemonProbe) -> Look:
    """Both are asked for: another daemon may answer on the same connection, which gRPC makes anew by itself."""
    return Look(daemon.describe(), daemon.stats(details=True))


class Watch:
    """``begin`` it once. ``interval`` (seconds) and ``paused`` may be set meanwhile, by ``change``."""

    def __init__(self, credentials: Credentials, interval: float) -> None:
        self.interval = interval
        self.paused = False
        self._credentials = credentials
        self._changed = threading.Condition()
        self._ending = False
        self._thread: threading.Thread | None = None

    def begin(self, address: Address, tell: Callable[[Look | MoetierError], object]) -> None:
        """``tell`` gets every look, and why there is none; by the watch's thread."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(address, tell), name="moetier-watch", daemon=True)
        self._thread.start()

    def change(self, *, interval: float | None = None, paused: bool | None = None) -> None:
        """From now on."""
        with self._changed:
            self.interval = self.interval if interval is None else interval
            self.paused = self.paused if paused is None else paused
            self._changed.notify_all()

    def end(self) -> None:
        """Idempotent; waits for a look that is under way."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self, address: Address, tell: Callable[[Look | MoetierError], object]) -> None:
        while True:
            try:
                with probe(address, self._credentials, patience=PATIENCE) as daemon:
                    while True:
                        tell(_look(daemon))
                        if not self._wait(self.interval):
                            return
            except MoetierError as error:
                tell(error)
            if not self._wait(min(self.interval, RETRY)):
                return

    def _wait(self, seconds: float) -> bool:
        """Until the next look is due; False at the end. A new interval begins at once."""
        with self._changed:
            while not self._ending:
                was = self.interval
                changed = self._changed.wait_for(
                    lambda was=was: self._ending or self.paused or self.interval != was,  # type: ignore[misc]
                    seconds,
                )
                if not changed:
                    return True
                if self.paused:
                    self._changed.wait_for(lambda: self._ending or not self.paused)
                    seconds = 0.0  # whoever goes on wants to see
                else:
                    seconds = self.interval
            return False
