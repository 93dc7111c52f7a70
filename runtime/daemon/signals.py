"""Signals of the daemon: blocked in all its threads, and taken one by one by the thread that waits for its end."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator

from .log import log_event

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Block the signals in this thread and in those that it starts meanwhile, so that no handler interrupts anything.

    The kernel would deliver them to a thread that was started before, and they would kill the process.
    """
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
        while signal.sigtimedwait(SIGNALS, 0) is not None:  # discard: the daemon has ended as it was told
            pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def wait_for_stop() -> str:
    """Wait for SIGTERM or SIGINT, and return its name."""
    while True:
        name = signal.Signals(signal.sigwait(SIGNALS)).name
        if name != "SIGHUP":
            return name
        log_event(_log, "signal", name=name, note="nothing is reloaded: end it and start it again")


def got_second_stop() -> bool:
    """Return whether another SIGTERM or SIGINT has come."""
    return signal.sigtimedwait(SIGNALS - {signal.SIGHUP}, 0) is not None
