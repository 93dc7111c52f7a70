"""Locks of a tier: a monitor that survives interrupts, a guard against use after fork, and a count of uses.

A *transition* changes the state that the callers of a tier share. A ``Monitor`` runs one transition at a time, under
its lock. A method becomes a transition by one of four decorators, which differ in when it runs:

    transition   now; the caller waits for the lock
    waiting      now, and again after each ``wake``, until it returns something other than None; the caller sleeps
    posted       now, or at the end of the transition that runs now; the caller never waits
    deferred     at the beginning of the next transition; the caller never waits

A transition must not call another transition of the same monitor, which would wait for itself: this fails with an
AssertionError. A transition calls ordinary methods, which need the lock.

Locks are taken in this order. A thread that holds one of them takes only later ones:

    1. Clients._changed of a daemon; Fallback._lock of its client
    2. the lock of one Monitor. A thread in a transition of one tier begins none of another tier
    3. SlotViews._lock
    4. long locks, held while something is made, opened, read or computed: Merging._merging, checkpoint_store._lock,
       RemoteStore._state, CachedStore._lock, CacheWriter._keeping, _Piece._lock, GrammarCompiler._making,
       compute._computing, team._making, and emitter.compile_lock of compiled code, which alone is taken while another
       of these is held
    5. all other locks. They are held for a few statements, in which no lock is taken, but those of Python with which
       a thread starts: under Team._starting, grammar._stack_size, Peers._state, HostedModel._opening and
       ComputeCalls._state

``moetier.runtime`` lists all locks. The comment at a lock says "guards:", and names fields. Outside of ``__init__``
they are written only by a thread that holds the lock, or in methods that the comment names. Where they are read without
it, one read is enough, and an old value does no harm.

Finalizers must not wait for the lock. The garbage collector may close an unreachable iterator in any thread, even in a
thread that is running a transition. So what a finalizer calls is ``posted``.

An exception can come from outside between any two instructions of the main thread: KeyboardInterrupt, an exception
raised by another signal handler, or, in any thread, one set by PyThreadState_SetAsyncExc. There is one rule for all of
them. The lock is always released, because it is taken only with a ``with`` statement, which is atomic for a lock
written in C. If an exception has interrupted a transition, the monitor repairs the state before the next one. A wait
is not a transition, so Ctrl-C ends it at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any, TypeVar, TypeVarTuple

from .errors import ClosedError, MoetierError

POLL_SECONDS = 0.05  # longest single wait: a signal that arrives just before a wait is handled only after the wait
REENTRY_SECONDS = 0.5  # time after which a transition that waits for itself fails
MAX_DEFERRED = 32  # largest number of deferred functions that wait for the next transition

Owner = TypeVar("Owner")
Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class ForkGuard:
    """Detect the use of an object in a forked child: its threads don't run there, and its locks may stay held."""

    present = os.getpid()  # id of the running process; cached, because ``check`` runs at each lease

    def __init__(self) -> None:
        self._process = ForkGuard.present

    @property
    def is_owner(self) -> bool:
        """Whether this process made the guard. The answer is right even before a child's fork hooks have run."""
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
    """Run transitions, which change shared state, one at a time.

    In a forked child every transition raises ClosedError instead of waiting for a lock that is never released.
    """

    def __init__(self, repair: Callable[[], None] = lambda: None) -> None:
        """Make a monitor.

        ``repair`` makes the state consistent again after an exception has interrupted a transition. The exception may
        have come at any instruction of the transition.
        """
        self.fork_guard = ForkGuard()
        self._repair = repair
        # guards: what the transitions change, ``_is_torn``, ``_runner``, ``_sleepers``, ``_attempted``, ``_is_marked``.
        # ``wait_for``, ``wake``, ``mark`` and ``_run_marked`` change fields within transitions. Work is added to the
        # two queues without the lock
        self._lock = threading.Lock()
        self._after_mark: Callable[[], None] | None = None
        self._is_marked = False  # whether ``_run_marked`` is among ``_posted``
        self._is_torn = False  # true while a transition runs, and after an exception has interrupted one
        self._runner = 0  # id of the thread that runs a transition, or ran the latest one
        self._sleepers: list[threading.Lock] = []
        self._posted: deque[Callable[[], None]] = deque()
        self._deferred: deque[Callable[[], None]] = deque()
        self._attempted: Callable[[], None] | None = None  # the first of ``_posted``, once it has begun

    def run(self, change: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Run ``change`` with ``arguments`` as a transition, and return its result.

        It may raise a MoetierError only while the state is consistent: the state is not repaired after this error.
        """
        self.fork_guard.check()
        if self._is_torn and self._runner == get_ident():
            self._check_reentry()
        try:
            with self._lock:
                self._begin()
                try:
                    result = change(*arguments)
                except MoetierError:
                    self._is_torn = False
                    raise
                self._is_torn = False
        finally:
            if self._posted:
                self._run_posted()
        return result

    def wait_for(self, change: Callable[[*Arguments], Result | None], *arguments: *Arguments) -> Result:
        """Run a transition, and again after each ``wake``, until its result is not None. Return that result.

        It runs again every POLL_SECONDS, too: its result may depend on the time.
        """
        if (result := self.run(change, *arguments)) is not None:
            return result

        def attempt() -> Result | None:
            if (result := change(*arguments)) is None:
                sleeper.acquire(blocking=False)
                if sleeper not in self._sleepers:
                    self._sleepers.append(sleeper)
            return result

        sleeper = threading.Lock()  # held while this thread sleeps; ``wake`` releases it
        while (result := self.run(attempt)) is None:
            _wait(sleeper)
        return result

    def wake(self) -> None:
        """Wake all threads that sleep in ``wait_for``, and ``mark``. Call this within a transition."""
        for sleeper in self._sleepers:
            if sleeper.locked():
                sleeper.release()
        self._sleepers.clear()
        self.mark()

    def mark(self) -> None:
        """Let the work of ``run_after_mark`` run after the transition in which this is called."""
        if self._after_mark is not None and not self._is_marked:
            self.post(self._run_marked)
            self._is_marked = True  # only now, so that the work is posted twice, and not never, after an interruption

    def run_after_mark(self, work: Callable[[], None]) -> None:
        """From now on, run ``work`` as a transition after each transition that calls ``mark`` or ``wake``."""
        self._after_mark = work

    def _run_marked(self) -> None:
        self._is_marked = False
        assert self._after_mark is not None
        self._after_mark()

    def post(self, work: Callable[[], None]) -> None:
        """Run ``work`` as a transition: now, or when the running transition has ended. Never waits.

        If an exception interrupts ``work``, it runs once more, but not a third time: it may itself be the cause of the
        exception, and must not block other transitions.

        Does nothing in a forked child, where finalizers run too: the state, shared memory and devices are its parent's.
        """
        if not self.fork_guard.is_owner:
            return
        self._posted.append(work)
        self._run_posted()

    def defer(self, work: Callable[[], None]) -> None:
        """Run ``work`` at the beginning of the next transition, which costs less than a transition of its own.

        If more than MAX_DEFERRED functions wait for the next transition, all of them run now. If an exception
        interrupts the transition, the work may be lost.
        """
        self._deferred.append(work)
        if len(self._deferred) > MAX_DEFERRED:
            self.run(lambda: None)

    def _begin(self) -> None:
        """Begin a transition: repair the state if need be, and do the deferred work. The caller holds ``_lock``."""
        self._runner = get_ident()
        if self._is_torn:
            self._repair()
        self._is_torn = True
        while self._deferred:
            self._deferred.popleft()()

    def _run_posted(self) -> None:
        # A thread that has run a transition calls this method, and so runs the work that was posted meanwhile. Another
        # thread may take the lock between the check and ``with``. Its transition is short, and so is the wait for it.
        while self._posted and not self._lock.locked():
            with self._lock:
                self._begin()
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

    def _check_reentry(self) -> None:
        """Fail if this thread is in a transition. The lock is free if an exception has interrupted that."""
        deadline = time.monotonic() + REENTRY_SECONDS
        while self._runner == get_ident() and self._lock.locked():
            assert time.monotonic() < deadline, "a transition has called another transition of the same monitor"
            time.sleep(0.001)


def _wait(sleeper: threading.Lock) -> None:
    sleeper.acquire(timeout=POLL_SECONDS)


def transition(method: Callable[[Owner, *Arguments], Result]) -> Callable[[Owner, *Arguments], Result]:
    """Decorate a method so that each call is a transition of ``self._monitor``."""

    @functools.wraps(method)
    def run(self: Any, *arguments: *Arguments) -> Result:
        return self._monitor.run(method, self, *arguments)

    return run


def waiting(method: Callable[[Owner, *Arguments], Result | None]) -> Callable[[Owner, *Arguments], Result]:
    """Decorate a method so that a call waits until the method, run as a transition, returns something but None.

    The transition runs again whenever another one has called ``wake``, and every POLL_SECONDS.
    """

    @functools.wraps(method)
    def wait(self: Any, *arguments: *Arguments) -> Result:
        return self._monitor.wait_for(method, self, *arguments)

    return wait


def posted(method: Callable[[Owner, *Arguments], None]) -> Callable[[Owner, *Arguments], None]:
    """Decorate a method so that it runs as a transition now, or when the running transition has ended.

    The call never waits, so a finalizer may make it. ``Monitor.post`` says what happens after an exception.
    """

    @functools.wraps(method)
    def post(self: Any, *arguments: *Arguments) -> None:
        self._monitor.post(functools.partial(method, self, *arguments))

    return post


def deferred(method: Callable[[Owner, *Arguments], None]) -> Callable[[Owner, *Arguments], None]:
    """Decorate a method so that it runs at the beginning of the next transition (``Monitor.defer``)."""

    @functools.wraps(method)
    def defer(self: Any, *arguments: *Arguments) -> None:
        self._monitor.defer(functools.partial(method, self, *arguments))

    return defer


class UseCount:
    """Count the uses of a resource that are in progress, so that ``close`` can wait for their end."""

    def __init__(self, name: str) -> None:
        """``name`` is the name of the resource in error messages."""
        self._name = name
        self._fork_guard = ForkGuard()
        # guards: ``_uses``, ``_is_closed``. A finalizer of a use may take it while this thread holds it
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)  # notified when the last use has ended, once it is closed
        self._uses: set[object] = set()
        self._is_closed = False

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Use the resource in this context. Raises ClosedError after ``close``, and in a forked child."""
        self._fork_guard.check()
        use = object()
        try:
            with self._lock:
                if self._is_closed:
                    raise ClosedError(f"{self._name} was closed.", "Open it again.")
                self._uses.add(use)
            yield
        finally:
            with self._lock:
                self._uses.discard(use)
                if self._is_closed:
                    self._idle.notify_all()

    def close(self) -> None:
        """Refuse further uses, and wait until those in progress have ended. Does nothing in a forked child."""
        if self._fork_guard.is_owner:
            with self._lock:
                self._is_closed = True
                self._idle.wait_for(lambda: not self._uses)
