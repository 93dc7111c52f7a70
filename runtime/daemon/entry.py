"""Entry point of the daemon's process.

Apart from the rest because it blocks signals before any library that starts threads is imported.
"""

from __future__ import annotations

import contextlib
import os
import resource

from .options import DaemonConfig
from .signals import blocked_signals


def serve(config: DaemonConfig) -> int:
    """Run a daemon until SIGTERM or SIGINT, and return its exit status. Raises MoetierError if it can't start."""
    config.check()
    os.umask(0o077)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # each client takes two descriptors, and each shard one
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with blocked_signals():
        from .process import run

        run(config)
    return 0
