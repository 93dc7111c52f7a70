"""Interrupts: Ctrl-C is postponed while code runs that must not end halfway.

Python runs a signal's handler between two instructions of the main thread, wherever that is. The handler of this module
looks at the stack. Where a module of ``WHOLE`` is on it, the signal comes again a little later; elsewhere, and where
the thread only waits, it raises KeyboardInterrupt at once. So nothing is to be noted where the code runs, and nothing
can be left behind.
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

# what changes the state that callers share
WHOLE = frozenset(
    f"moetier.{package}.{name}"
    for package, names in (
        ("tiers", ("locks",)),
        ("tiers.host", ("tier",)),
        ("tiers.device", ("tier", "views", "fill", "copies", "page_locks", "promoter")),
        ("runtime.moe", ("block", "gates")),
        ("runtime.speculation", ("speculation",)),
        ("runtime.client", ("tier", "misses", "link", "outbox", "counts", "spare")),
    )
    for name in names
)
LOOK_SECONDS = 0.05  # Python does not see a signal that comes just before a wait: none is longer
_AGAIN = 0.001  # seconds until a postponed signal comes again

_waits: set[CodeType] = set()
Function = TypeVar("Function", bound=Callable[..., Any])


def may_end(wait: Function) -> Function:
    """Mark a function that only waits: an interrupt ends it at once, whatever called it."""
    _waits.add(wait.__code__)
    return wait


def postpone_interrupts() -> None:
    """From now on, until ``raise_interrupts``. Only in the main thread, and where SIGINT has Python's own handler."""
    if _signal.getsignal(signal.SIGINT) is signal.default_int_handler and _is_main():
        _signal.signal(signal.SIGINT, _on_interrupt)


def raise_interrupts() -> None:
    """Give SIGINT Python's own handler back."""
    if _signal.getsignal(signal.SIGINT) is _on_interrupt and _is_main():
        _signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_main() -> bool:
    return threading.get_ident() == threading.main_thread().ident


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    if not _is_whole(frame):
        try:
            _thread.start_new_thread(_send_again, (number,))  # unlike a Thread it takes no lock
            return
        except RuntimeError:  # no thread is to be had; the tiers repair themselves
            pass
    raise_interrupts()  # torch calls no hook behind a forward pass that KeyboardInterrupt ends
    signal.default_int_handler(number, frame)


def _is_whole(frame: FrameType | None) -> bool:
    """Whether nothing is half done."""
    if frame is not None and frame.f_code in _waits:
        return True
    while frame is not None:
        if frame.f_globals.get("__name__") in WHOLE:
            return False
        frame = frame.f_back
    return True


def _send_again(number: int) -> None:
    time.sleep(_AGAIN)
    # to the main thread, which may sleep in a system call by then
    signal.pthread_kill(threading.main_thread().ident or 0, number)
