"""The order in which records of experts, and pages of keys and values, are read from and written to a disk.

    1. reads of records for demands
    2. reads of pages for a request that waits
    3. reads of records for prefetches and the warm-up
    4. writes of pages

The host tier's ledger has the first and the third, and says when pages have their turn: ``HostTier.disk_order`` is the
DiskOrder of its process. Where a daemon reads the records, ``client.disk_order`` knows those that its own process waits
for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class DiskOrder(Protocol):
    """Says when pages are read and written. Thread-safe."""

    def reading_page(self) -> AbstractContextManager[None]:
        """Return a context manager in which a page is read.

        It waits until no record is read for a demand, but not for long: the request would never begin. Meanwhile, and
        until its end, no prefetch begins.
        """

    def wait_to_write(self, is_urgent: Callable[[], bool]) -> None:
        """Wait until nothing is read, or ``is_urgent`` returns True. The caller then writes a small part of a page.

        ``is_urgent`` is called at the end of each read, and must return at once.
        """
