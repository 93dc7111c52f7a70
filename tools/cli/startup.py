"""What a command that is to be quick does while it begins."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector of cycles: imports make a million objects that stay, and it would look at them again
    and again (docs/benchmarks.md, First token)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
