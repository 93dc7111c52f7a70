"""A daemon's process, as whoever starts it sees it."""

from __future__ import annotations

import contextlib
import os
import resource

from .options import DaemonConfig
from .signals import blocked


def serve(config: DaemonConfig) -> int:
    """Runs a daemon until SIGTERM or SIGINT; the exit status. Raises MoetierError where it can't start."""
    config.check()
    os.umask(0o077)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # two descriptors a client, and each shard's: as many as one may have
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    with blocked():
        from .process import live

        live(config)
    return 0
