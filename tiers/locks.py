"""Locks of a tier: a monitor that survives interrupts, a guard against use after fork, and a count of users.

Finalizers must not wait. The garbage collector closes an iterator that is lost in a cycle, and it runs in any thread,
even in one that is inside a step on the very state that the iterator must change. So a finalizer posts its work.

Exceptions from outside can arrive between any two instructions: KeyboardInterrupt, what a signal handler raises,
PyThreadState_SetAsyncExc. The lock is only held by ``with``, which is atomic for a lock written in C, so it is always
released. The monitor repairs the state that such an exception has left before it runs the next step.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar, TypeVarTuple

from .errors import ClosedError, MoetierError
from .interrupts import POLL_SECONDS, interruptible

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class ForkGuard:
    """Detect use in a forked child, where threads are gone and a lock may stay held for ever."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_owner(self) -> bool:
        """Whether this is the process that made the guard."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Raise ClosedError in a forked child."""
        if not self.is_owner:
            raise ClosedError(
                f"This is another process's tier: it was opened in process {self._process}, and this is a fork of it.",
                "Load the model in the process that uses it, or start children by spawn.",
            )


class Monitor:
    """Run steps on shared state one at a time. In a forked child, raise ClosedError instead of waiting for ever."""

    def __init__(self, repair: Callable[[], None] = lambda: None) -> None:
        """``repair`` makes the state consistent after an exception has cut a step at any instruction."""
        self.fork_guard = ForkGuard()
        self._repair = repair
        self._lock = threading.Lock()
        self._is_torn = False  # a step is running, or an exception has cut one
        self._sleepers: list[threading.Lock] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._attempted: Callable[[], None] | None = None  # the first posted work, once it has begun

    def run(self, step: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run ``step`` and return its result. Steps don't nest.

        A step may raise a MoetierError only where the state is consistent.
        """
        self.fork_guard.check()
        try:
            with self._lock:
                if self._is_torn:
                    self._repair()
                self._is_torn = True
                try:
                    result = step(*arguments)
                except MoetierError:
                    self._is_torn = False
                    raise
                self._is_torn = False
        finally:
            if self._posted:
                self._settle()
        return result

    def wait_for(self, step: Callable[[*Arguments], Result | None], *arguments: *Arguments) -> Result:
        """Run a step, and again after each ``wake``, until it returns something other than None."""
        if (found := self.run(step, *arguments)) is not None:
            return found

        def attempt() -> Result | None:
            result = step(*arguments)
            if result is None:
                sleeper.acquire(blocking=False)
                self._sleepers.append(sleeper)
            return result

        sleeper = threading.Lock()
        while (result := self.run(attempt)) is None:
            _wait(sleeper)
        return result

    def wake(self) -> None:
        """Wake all threads that sleep in ``wait_for``. Call it within a step."""
        for sleeper in self._sleepers:
            if sleeper.locked():
                sleeper.release()
        self._sleepers.clear()

    @property
    def sleepers(self) -> int:
        """The number of threads that sleep in ``wait_for``."""
        return len(self._sleepers)

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` as a step, now or when the running step has ended. Never waits.

        Work that an exception has cut is repeated once. No more, as the work itself may be at fault, and other steps
        must go on.
        """
        self._posted.append(work)
        self._settle()

    def _settle(self) -> None:
        # Work posted during a step is found here by the thread that ran the step. Another thread may take the lock
        # between the check and ``with``: its step is short, so this wait is too.
        while self._posted and not self._lock.locked():
            with self._lock:
                if self._is_torn:
                    self._repair()
                self._is_torn = True
                while self._posted:
                    work = self._posted[0]
                    if work is self._attempted:
                        self._posted.popleft()
                        work()
                    else:
                        self._attempted = work
                        work()
                        self._posted.popleft()
                    self._attempted = None
                self._is_torn = False


@interruptible
def _wait(sleeper: threading.Lock) -> None:
    while not sleeper.acquire(timeout=POLL_SECONDS):
        pass


class UseCount:
    """Count the users of a resource, so that ``close`` waits until none is left.

    ``with use_count:`` marks a use. It raises ClosedError after ``close`` and in a forked child.
    """

    def __init__(self, name: str) -> None:
        """``name`` stands for the resource in error messages."""
        self._name = name
        self._fork_guard = ForkGuard()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._users = 0
        self._closed = False

    def __enter__(self) -> None:
        self._fork_guard.check()
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
        """Refuse further uses and wait for the present ones to end. Idempotent; does nothing in a forked child."""
        if self._fork_guard.is_owner:
            with self._lock:
                self._closed = True
                self._idle.wait_for(lambda: not self._users)
