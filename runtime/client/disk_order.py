"""The order of reads for a client whose experts a daemon reads, as far as the client knows of these.

It knows the misses that it waits for: pages of keys and values are read and written when there are none, and while
pages are read, the client requests no prefetches. Of other clients and of the daemon's own reads it knows nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moetier.tiers.host.disk_order import PAGE_PATIENCE
from moetier.tiers.locks import POLL_SECONDS


class ClientDiskOrder:
    """The ``DiskOrder`` of a daemon's client: pages wait for the client's misses. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards: ``_misses``, ``_pages``. No finalizer takes it
        self._misses: set[object] = set()  # calls that wait for records
        self._pages: set[object] = set()  # pages that are read, or wait to be

    @property
    def is_reading_page(self) -> bool:
        """Whether a page is read, or waits to be. Takes no lock."""
        return bool(self._pages)

    @contextmanager
    def waiting_for_records(self) -> Iterator[None]:
        """Return a context manager in which a caller waits for records."""
        wait = object()
        try:
            with self._changed:
                self._misses.add(wait)
            yield
        finally:
            with self._changed:
                self._misses.discard(wait)
                self._changed.notify_all()

    @contextmanager
    def reading_page(self) -> Iterator[None]:
        """Wait for the turn to read a page, as ``DiskOrder`` specifies."""
        read = object()
        try:
            with self._changed:
                self._pages.add(read)
                self._changed.wait_for(lambda: not self._misses, PAGE_PATIENCE)
            yield
        finally:
            with self._changed:
                self._pages.discard(read)
                self._changed.notify_all()

    def wait_to_write(self, is_urgent: Callable[[], bool]) -> None:
        """Wait for the turn to write a part of a page, as ``DiskOrder`` specifies."""
        with self._changed:
            while not self._changed.wait_for(
                lambda: not (self._misses or self._pages) or is_urgent(), POLL_SECONDS
            ):  # nothing notifies it when it becomes urgent
                pass
