"""Interrupts: postpone Ctrl-C while code runs that must not end halfway.

Python runs a signal's handler between any two instructions of the main thread. The handler of this module looks at the
stack. If a module of ``UNINTERRUPTIBLE`` is on it, the handler sends the signal again a little later. Otherwise, and
where the thread only waits, it raises KeyboardInterrupt at once. Code that must not be cut needs no marks of its own
and leaves no state behind.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # ``signal`` makes enumerations of its numbers: ten times as long
import _thread
import signal
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

# modules that change state that callers share
UNINTERRUPTIBLE = frozenset(
    f"moetier.{package}.{name}"
    for package, names in (
        ("tiers", ("locks",)),
        ("tiers.host", ("tier",)),
        ("tiers.device", ("tier", "views", "fill", "copies", "promoter")),
        ("runtime.moe", ("block", "gates")),
        ("runtime.speculation", ("speculation",)),
        ("runtime.client", ("tier", "misses", "link")),
    )
    for name in names
)
POLL_SECONDS = 0.05  # longest single wait: Python does not see a signal that comes just before it
_AGAIN = 0.001  # seconds until a postponed signal is sent again

_waits: set[CodeType] = set()
Function = TypeVar("Function", bound=Callable[..., Any])


def interruptible(wait: Function) -> Function:
    """Mark a function that only waits: an interrupt ends it at once, whatever code has called it."""
    _waits.add(wait.__code__)
    return wait


def postpone_interrupts() -> None:
    """Install the handler of this module until ``raise_interrupts``.

    Does nothing outside the main thread and where SIGINT has another handler than Python's own.
    """
    if _signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_main():
        _signal.signal(signal.SIGINT, _on_interrupt)


def raise_interrupts() -> None:
    """Restore Python's own handler of SIGINT."""
    if _signal.getsignal(signal.SIGINT) is _on_interrupt and _is_main():
        _signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if not _may_interrupt(frame):
        try:
            _thread.start_new_thread(_send_again, (number,))  # unlike ``Thread.start`` it takes no lock
            return
        except RuntimeError:  # the system has no thread left; the tiers repair themselves after the exception
            pass
    raise_interrupts()  # torch calls no hook after a forward pass that KeyboardInterrupt ends
    signal.default_int_handler(number, frame)


def _may_interrupt(frame: FrameType | None) -> bool:
    """Whether raising at ``frame`` leaves no shared state half changed."""
    if frame is not None and frame.f_code in _waits:
        return True
    while frame is not None:
        if frame.f_globals.get("__name__") in UNINTERRUPTIBLE:
            return False
        frame = frame.f_back
    return True


def _send_again(number: int) -> None:
    time.sleep(_AGAIN)
    # The main thread may sleep in a system call by then, which only a signal of its own ends.
    signal.pthread_kill(threading.main_thread().ident or 0, number)
