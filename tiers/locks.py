"""Locks of a tier: a monitor that survives interrupts, a guard against use after fork, and postponed interrupts.

A monitor runs *steps*: short functions that change shared state. It runs one step at a time, under its lock.

Finalizers must not wait for the lock. The garbage collector may close an unreachable iterator in any thread, even in a
thread that is running a step. So a finalizer hands its work to the monitor instead (``Monitor.post``).

An asynchronous exception can arrive between any two instructions: KeyboardInterrupt, an exception raised by another
signal handler, or an exception set by PyThreadState_SetAsyncExc. The lock is always released, because it is taken only
with a ``with`` statement, which is atomic for a lock written in C. If such an exception has interrupted a step, the
monitor repairs the state before it runs the next step.

Ctrl-C is postponed while code runs that must not end halfway. Python runs a signal's handler between any two
instructions of the main thread. The handler of this module looks at the call stack. If a function of a module in
``UNINTERRUPTIBLE`` is on the stack, the handler sends the signal again a little later. Otherwise, or if the thread only
waits, the handler raises KeyboardInterrupt at once. So the code of these modules needs no further protection.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # importing ``signal`` takes ten times as long
import _thread
import functools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, TypeVarTuple

from .errors import ClosedError, MoetierError

# modules whose functions change state that several callers share
UNINTERRUPTIBLE = frozenset(
    f"moetier.{package}.{name}"
    for package, names in (
        ("tiers", ("locks",)),
        ("tiers.host", ("tier",)),
        ("tiers.device", ("tier", "views", "fill", "copies", "promoter")),
        ("runtime.moe", ("gates",)),
        ("runtime.speculation", ("speculation",)),
        ("runtime.client", ("tier", "link")),
    )
    for name in names
)
POLL_SECONDS = 0.05  # longest single wait: a signal that arrives just before a wait is handled only after the wait
MOST_DEFERRED = 32  # largest number of deferred functions that wait for the next step
_AGAIN = 0.001  # seconds until a postponed signal is sent again

_waits: set[CodeType] = set()  # functions that only wait
Function = TypeVar("Function", bound=Callable[..., Any])
Owner = TypeVar("Owner")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")
Arguments = TypeVarTuple("Arguments")


def interruptible(wait: Function) -> Function:
    """Mark a function that only waits. Ctrl-C ends its wait at once, even if uninterruptible code has called it."""
    _waits.add(wait.__code__)
    return wait


class ForkGuard:
    """Detect the use of an object in a forked child: its threads don't run there, and its locks may stay held."""

    present = os.getpid()  # id of the running process; cached, because ``check`` runs at each lease

    def __init__(self) -> None:
        self._process = ForkGuard.present

    @property
    def is_owner(self) -> bool:
        """True if this process made the guard. The answer is right even before a child's fork hooks have run."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Raise ClosedError in a forked child."""
        if self._process != ForkGuard.present:
            raise ClosedError(
                f"This is another process's tier: it was opened in process {self._process}, of which this is a fork.",
                'Load the model in the process that uses it, or start processes with the start method "spawn".',
            )


def _note_fork() -> None:
    ForkGuard.present = os.getpid()


os.register_at_fork(after_in_child=_note_fork)


class Monitor:
    """Run steps, which change shared state, one at a time.

    In a forked child every step raises ClosedError instead of waiting for a lock that is never released.
    """

    def __init__(self, repair: Callable[[], None] = lambda: None) -> None:
        """Make a monitor.

        ``repair`` makes the state consistent again after an exception has interrupted a step. The exception may have
        come at any instruction of the step.
        """
        self.fork_guard = ForkGuard()
        self._repair = repair
        self._lock = threading.Lock()
        self._is_torn = False  # true while a step runs, and after an exception has interrupted a step
        self._sleepers: list[threading.Lock] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._deferred: deque[Callable[[], None]] = deque()
        self._attempted: Callable[[], None] | None = None  # the first of ``_posted``, once it has begun

    def run(self, step: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run ``step`` with ``arguments`` and return its result. A step must not run another step of this monitor.

        A step may raise a MoetierError only while the state is consistent: the state is not repaired after this error.
        """
        self.fork_guard.check()
        try:
            with self._lock:
                if self._is_torn:
                    self._repair()
                self._is_torn = True
                while self._deferred:
                    self._deferred.popleft()()
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
        """Run a step, and again after each ``wake``, until it returns something other than None. Return that result."""
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
        """Wake all threads that sleep in ``wait_for``. Call this within a step."""
        for sleeper in self._sleepers:
            if sleeper.locked():
                sleeper.release()
        self._sleepers.clear()

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` as a step: now, or when the running step has ended. Never waits.

        If an exception interrupts ``work``, it runs once more, but not a third time: it may itself be the cause of the
        exception, and must not block other steps.

        Does nothing in a forked child, where finalizers run too: the state, shared memory and devices are its parent's.
        """
        if not self.fork_guard.is_owner:
            return
        self._posted.append(work)
        self._settle()

    def defer(self, work: Callable[[], None]) -> None:
        """Run ``work`` at the beginning of the next step, which costs less than a step of its own.

        If more than MOST_DEFERRED functions wait for the next step, all of them run now. If an exception interrupts the
        step, the work may be lost.
        """
        self._deferred.append(work)
        if len(self._deferred) > MOST_DEFERRED:
            self.run(lambda: None)

    def _settle(self) -> None:
        # A thread that has run a step calls this method, and so runs the work that was posted during the step. Another
        # thread may take the lock between the check and ``with``. Its step is short, and so is the wait for it.
        while self._posted and not self._lock.locked():
            with self._lock:
                if self._is_torn:
                    self._repair()
                self._is_torn = True
                while self._deferred:
                    self._deferred.popleft()()
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


def step(method: Callable[Concatenate[Owner, Parameters], Result]) -> Callable[Concatenate[Owner, Parameters], Result]:
    """Decorate a method so that it runs as a step of ``self._monitor``."""

    @functools.wraps(method)
    def run(self: Owner, /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        monitor: Monitor = self._monitor  # type: ignore[attr-defined]
        return monitor.run(functools.partial(method, self, *arguments, **named))

    return run


@interruptible
def _wait(sleeper: threading.Lock) -> None:
    while not sleeper.acquire(timeout=POLL_SECONDS):
        pass


class UseCount:
    """Count the uses of a resource that are in progress, so that ``close`` can wait for their end.

    A use is a block ``with use_count:``. Entering the block raises ClosedError after ``close``, and in a forked child.
    """

    def __init__(self, name: str) -> None:
        """``name`` is the name of the resource in error messages."""
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
        """Refuse further uses, and wait until those in progress have ended. Does nothing in a forked child."""
        if self._fork_guard.is_owner:
            with self._lock:
                self._closed = True
                self._idle.wait_for(lambda: not self._users)


def postpone_interrupts() -> None:
    """Install this module's handler of SIGINT, which postpones Ctrl-C. ``raise_interrupts`` removes it.

    Does nothing outside the main thread, or if SIGINT has another handler than Python's own.
    """
    if _signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_main():
        _signal.signal(signal.SIGINT, _on_interrupt)


def raise_interrupts() -> None:
    """Replace this module's handler of SIGINT, if it is installed, by Python's own."""
    if _signal.getsignal(signal.SIGINT) is _on_interrupt and _is_main():
        _signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if not _may_interrupt(frame):
        try:
            _thread.start_new_thread(_send_again, (number,))  # unlike ``Thread.start`` it takes no lock
            return
        except RuntimeError:  # no thread can be started: raise at once, and let the tiers repair their state
            pass
    raise_interrupts()  # now, because torch calls no hook after a forward pass that KeyboardInterrupt has ended
    signal.default_int_handler(number, frame)


def _may_interrupt(frame: FrameType | None) -> bool:
    """Return whether an exception raised at ``frame`` leaves shared state whole."""
    if frame is not None and frame.f_code in _waits:
        return True
    while frame is not None:
        if frame.f_globals.get("__name__") in UNINTERRUPTIBLE:
            return False
        frame = frame.f_back
    return True


def _send_again(number: int) -> None:
    time.sleep(_AGAIN)
    # By now the main thread may sleep in a system call. Only a signal to that very thread ends the call.
    signal.pthread_kill(threading.main_thread().ident or 0, number)
