"""What is done ahead, by one thread, while its owner does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable

GRACE = 15.0  # seconds for what was told to end: a hub that is silent is given up after ten


class Halted(BaseException):
    """Who did it was told to end."""


class Ahead:
    """One thing at a time. Used by one thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._halted = threading.Event()

    def begin(self, work: Callable[[], None]) -> None:
        """``work`` calls ``check`` now and then. Waits for what is under way; raises what that raised."""
        self.wait()
        # a process ends without it, as if it had been killed
        self._thread = threading.Thread(target=self._run, args=(work,), name="ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is under way. Raises what was raised in doing it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def check(self) -> None:
        """Raises Halted in what is to end."""
        if self._halted.is_set():
            raise Halted

    def halt(self) -> None:
        """Ends what is under way, whose errors are nobody's any more."""
        if self._thread is not None:
            self._halted.set()
            self._thread.join(GRACE)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
