"""Monitor: steps on shared state, one at a time; callers that sleep between them; and work that a finalizer posts.

An iterator that is lost in a cycle is closed by the garbage collector, and that runs anywhere: even in a thread that is
in the midst of a step, whose state the iterator needs to give back what it holds. So nothing that a finalizer calls may
wait.

An exception may come from outside between any two instructions: KeyboardInterrupt, what a signal's handler raises,
PyThreadState_SetAsyncExc. The lock is held by ``with`` alone, which no exception can cut for a lock of C: it is always
released. What the exception has left of the state is mended before the next step.
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
    """The process in which something was made. Threads don't survive a fork, and a lock may stay held for ever."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def is_owner(self) -> bool:
        return self._process == os.getpid()

    def check(self) -> None:
        """Raises ClosedError in a forked child."""
        if not self.is_owner:
            raise ClosedError(
                f"This is another process's tier: it was opened in process {self._process}, and this is a fork of it.",
                "Load the model in the process that uses it, or start children by spawn.",
            )


class Monitor:
    """Runs steps one at a time. Raises ClosedError in a forked child, instead of waiting for ever."""

    def __init__(self, repair: Callable[[], None] = lambda: None) -> None:
        """``repair`` makes the state agree with itself after a step that an exception has cut anywhere."""
        self.fork_guard = ForkGuard()
        self._repair = repair
        self._lock = threading.Lock()
        self._is_torn = False  # a step is under way, or was cut
        self._sleepers: list[threading.Lock] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._attempted: Callable[[], None] | None = None  # the first of these, once it has begun

    def run(self, step: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """What ``step`` returns, which may raise a MoetierError where the state agrees. No step runs another."""
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
        """Run a step, and again after each ``wake``, until it returns something else than None."""
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
        """Wake all that sleep. Part of a step."""
        for sleeper in self._sleepers:
            if sleeper.locked():
                sleeper.release()
        self._sleepers.clear()

    @property
    def sleepers(self) -> int:
        """How many threads sleep."""
        return len(self._sleepers)

    def post(self, work: Callable[[], None]) -> None:
        """Do ``work`` as a step: now, or when the present one has ended. Never waits. Work that an exception has ended
        is repeated, but only once: if it is at fault itself, other steps must go on."""
        self._posted.append(work)
        self._settle()

    def _settle(self) -> None:
        # What is posted during a step is seen here by the thread that ran it. Between the look at the lock and taking
        # it another thread may come first. Its step is short, and what it posts in turn does not wait: this one is.
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
    """Of something that threads use for a while each: ``with usage:``, which raises ClosedError once it is closed."""

    def __init__(self, name: str) -> None:
        """``name`` is what errors call it."""
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
        """Nobody may use it any more; waits for those who do. Idempotent. In a forked child there is nobody."""
        if self._fork_guard.is_owner:
            with self._lock:
                self._closed = True
                self._idle.wait_for(lambda: not self._users)
