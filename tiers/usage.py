"""Usage: what is in use stays open."""

from __future__ import annotations

import threading
from types import TracebackType

from .errors import ClosedError
from .locks import Home


class Usage:
    """Of something that threads use for a while each: ``with usage:``, which raises ClosedError once it is closed."""

    def __init__(self, name: str) -> None:
        """``name`` is what errors call it."""
        self._name = name
        self._home = Home()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._users = 0
        self._closed = False

    def __enter__(self) -> None:
        self._home.check()
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self._name} was closed.", "Open it again.")
            self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            if self._closed:
                self._idle.notify_all()

    def close(self) -> None:
        """Nobody may use it any more; waits for those who do. Idempotent. In a forked child there is nobody."""
        if self._home.is_here:
            with self._lock:
                self._closed = True
                self._idle.wait_for(lambda: not self._users)
