"""Dropping what the page cache holds: cold reads, and pages that are charged to whoever reads them anew."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .cgroup import forget

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_page_cache(files: Iterable[Path], *, whole: bool) -> str:
    """That of ``files``; with ``whole`` the machine's, so that whatever is read is charged to who reads it, where that
    is allowed. Says which."""
    forget(*files)
    if not whole:
        return "dropped for the model's files"
    try:
        descriptor = os.open(DROP_CACHES, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, b"1")
        finally:
            os.close(descriptor)
    except OSError:
        return "dropped for the model's files, as the machine's can't be"
    return "dropped"
