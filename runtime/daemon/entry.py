"""Entry point of the daemon's process.

This is a module of its own, because signals must be blocked before a library is imported that starts threads. They are
then blocked in all threads, and the thread that waits for the daemon's end takes them one by one.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal

from .daemon_config import DaemonConfig

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def serve(config: DaemonConfig) -> int:
    """Run a daemon until SIGTERM or SIGINT, and return its exit status. Raises MoetierError if it can't start."""
    umask = os.umask(0o077)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # each client takes two descriptors, and each shard one
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    # a thread that was started earlier would receive the signals, and they would kill the process
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        from .process import run

        run(config)
        while signal.sigtimedwait(SIGNALS, 0) is not None:  # discard repeated signals, as the daemon has ended
            pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        os.umask(umask)
    return 0
