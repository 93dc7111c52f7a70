"""The signals that tell a daemon to end: blocked, and taken one by one by the thread that waits for them."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator

from .log import say

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """In this thread and those that begin meanwhile: no handler runs in the middle of anything. A thread that has begun
    before would be given them by the kernel, and the process would die of them."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
        while signal.sigtimedwait(SIGNALS, 0) is not None:  # it has ended as it was told: nobody kills it any more
            pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def wait_for_the_end() -> str:
    """The name of the signal that it came by."""
    while True:
        name = signal.Signals(signal.sigwait(SIGNALS)).name
        if name != "SIGHUP":
            return name
        say(_log, "signal", name=name, note="nothing is reloaded: end it and start it again")


def is_told_again() -> bool:
    """Whether a second one has come."""
    return signal.sigtimedwait(SIGNALS - {signal.SIGHUP}, 0) is not None
