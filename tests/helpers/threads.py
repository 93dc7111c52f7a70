"""Threads with a deadline: a deadlock fails, loudly."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Generic, TypeVar

import pytest
from readers import PATIENCE

Result = TypeVar("Result")


class Task(Generic[Result]):
    """A function in a thread of its own; begins at once."""

    def __init__(self, function: Callable[[], Result], name: str = "task") -> None:
        self._function = function
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def result(self, timeout: float = PATIENCE) -> Result:
        """Return the thread's result, or raise its error."""
        self.thread.join(timeout)
        if self.thread.is_alive():
            frames = current_frames()
            stacks = (
                f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
                for thread in threading.enumerate()
                if thread.ident in frames
            )
            raise AssertionError(f"{self.thread.name} hangs\n" + "\n".join(stacks))
        if self._error is not None:
            error, self._error = self._error, None  # no cycle through its traceback
            raise error
        return self._result  # type: ignore[return-value]  # None only if the function says so


def current_frames() -> dict[int, FrameType]:
    """Return the frame that each thread is in, by the thread's identifier.

    Without garbage collection: Python 3.11 holds a lock of its own in this call, and a collection that begins in it
    can wait for a thread that wants the same lock (cpython issue 106883).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def sleeps(thread: threading.Thread) -> bool:
    """Return whether the thread sleeps in a tier's monitor (``Monitor.wait_for``)."""
    frame = current_frames().get(thread.ident or 0)
    return frame is not None and (frame.f_globals["__name__"], frame.f_code.co_name) == ("moetier.tiers.locks", "_wait")


def joins(thread: threading.Thread) -> bool:
    """Return whether the thread waits for the end of another."""
    return _is_in(thread, threading.Thread.join.__code__)


def waits(thread: threading.Thread) -> bool:
    """Return whether the thread waits for a condition."""
    return _is_in(thread, threading.Condition.wait.__code__)


def interrupt_main(is_waiting: Callable[[], bool]) -> None:
    """Press Ctrl-C once the main thread waits. Called in another thread.

    A signal that comes just before a lock begins to sleep is handled only after that sleep. So it is sent again.
    """
    wait_until(is_waiting)
    until = time.monotonic() + PATIENCE
    while is_waiting() and time.monotonic() < until:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.5)


def _is_in(thread: threading.Thread, code: CodeType) -> bool:
    frame = current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def without_thread(name: str) -> Iterator[None]:
    """The system gives no thread of this name."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as change:
        change.setattr(threading.Thread, "start", refuse)
        yield


def threads_named(prefix: str) -> list[str]:
    """Return the names of the running threads whose names begin with ``prefix``."""
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith(prefix))


def run_all(functions: Iterable[Callable[[], Result]]) -> list[Result]:
    """All at the same time."""
    tasks = [Task(function, f"caller {number}") for number, function in enumerate(functions)]
    return [task.result() for task in tasks]


def best_time(attempt: Callable[[], object], enough: float) -> float:
    """Return the shortest time that ``attempt`` took, in seconds.

    The machine may have other work, so it is repeated until it took less than ``enough``, or PATIENCE is over.
    """
    best, deadline = float("inf"), time.monotonic() + PATIENCE
    while best >= enough and time.monotonic() < deadline:
        began = time.monotonic()
        attempt()
        best = min(best, time.monotonic() - began)
    return best


def wait_until(condition: Callable[[], bool]) -> None:
    deadline, pause = time.monotonic() + PATIENCE, 0.001
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(pause)
        pause = min(1.1 * pause, 0.01)  # a long wait leaves the processor to what it waits for
