"""The tiers of a model that is gone, which nobody closed."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable

from .tiers import Tiers

_closers: set[threading.Thread] = set()


def close_later(close_sources: Callable[[], None], tiers: weakref.ref[Tiers]) -> None:
    """Ends the speculation of a model that is gone, if it is still there, and closes its tiers. To the speculation no
    reference is held until then: it refers to the model's modules, and any of these may refer to the model.

    The collector that found it gone may run anywhere: in a thread that holds a tier's lock, or in a loader. Closing
    waits for both, so a thread of its own does it; a daemon, whose start waits for nothing that such a thread may hold.
    At the interpreter's end nobody is interrupted, and no thread would come to its end.
    """
    here = tiers()
    if here is not None and here.speculation is not None:
        here.speculation.detach()
    if threading.current_thread() is threading.main_thread() and not threading.main_thread().is_alive():
        close_sources()
        return

    def close() -> None:
        try:
            close_sources()
        finally:
            _closers.discard(threading.current_thread())

    closer = threading.Thread(target=close, name="moetier-closer", daemon=True)
    _closers.add(closer)
    closer.start()


@atexit.register
def _wait_for_closers() -> None:
    """A thread that is in the midst of something when the interpreter ends may take the process down with it: torch's
    C++ can't be unwound."""
    for closer in list(_closers):
        closer.join()
