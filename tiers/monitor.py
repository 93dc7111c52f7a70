"""Monitor: a lock to sleep under, and into which a finalizer may post work.

An iterator that is lost in a cycle is closed by the garbage collector, and that runs anywhere: even in a thread that
holds the very lock which the iterator needs to give back what it holds. So nothing that a finalizer calls may wait.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType

from .errors import ClosedError


class Home:
    """The process in which something was made. Threads don't survive a fork, and a lock may stay held for ever."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_here(self) -> bool:
        return self._process == os.getpid()

    def check(self) -> None:
        """Raises ClosedError in a forked child."""
        if not self.is_here:
            raise ClosedError(
                f"This is another process's tier: it was opened in process {self._process}, and this is a fork of it.",
                "Load the model in the process that uses it, or start children by spawn.",
            )


class Monitor:
    """``with monitor:`` holds the lock. Raises ClosedError in a forked child, instead of waiting for ever."""

    def __init__(self) -> None:
        self.home = Home()
        self._lock = threading.Lock()
        self._sleepers: list[threading.Lock] = []
        self._posted: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self.home.check()
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()
        self._settle()

    def sleep(self) -> None:
        """Lets go of the lock until the next ``wake``, and holds it again."""
        bed = threading.Lock()
        bed.acquire()
        self._sleepers.append(bed)
        self._lock.release()
        try:
            self._settle()
            bed.acquire()
        finally:
            self._lock.acquire()

    def wake(self) -> None:
        """Wakes everyone who sleeps; the lock is held."""
        sleepers, self._sleepers = self._sleepers, []
        for bed in sleepers:
            bed.release()

    def post(self, work: Callable[[], None]) -> None:
        """Does ``work`` under the lock: now, or when whoever holds it lets go. Never waits."""
        self._posted.append(work)
        self._settle()

    def _settle(self) -> None:
        # What is posted while the lock is held is seen here by its holder, who comes by when it has let go.
        while self._posted and self._lock.acquire(blocking=False):
            try:
                while self._posted:
                    self._posted.popleft()()
            finally:
                self._lock.release()
