"""``start_thread``, which makes and starts a thread. ``moetier.runtime`` lists all threads and locks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVarTuple

from .errors import ExhaustedError

Arguments = TypeVarTuple("Arguments")


def start_thread(
    name: str, run: Callable[[*Arguments], object], *arguments: *Arguments, daemon: bool = True
) -> threading.Thread:
    """Start a thread that calls ``run`` with ``arguments``, and return it.

    With ``daemon``, the process can end without waiting for it. Raises ExhaustedError if the system gives no thread.
    """
    thread = threading.Thread(target=run, args=arguments, name=name, daemon=daemon)
    try:
        thread.start()
    except RuntimeError as error:
        fix = "End other processes, or raise the limit of threads (ulimit -u)."
        raise ExhaustedError(f"The system gives no thread {name}: {error}.", fix) from None
    return thread
