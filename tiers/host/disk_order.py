"""The turns of pages of keys and values, which are read and written on the disk of the records."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from moetier.tiers.locks import Monitor, posted, transition, waiting

from .loads import Loads

PAGE_PATIENCE = 0.1  # seconds after which a page is read even while records are read for demands


class HostDiskOrder:
    """The ``DiskOrder`` of a process with a host tier of its own: says when pages are read and written."""

    def __init__(self, monitor: Monitor, loads: Loads) -> None:
        """``monitor`` is the tier's, and ``loads`` are all its reads of records."""
        self._monitor = monitor
        self._loads = loads

    @contextlib.contextmanager
    def reading_page(self) -> Iterator[None]:
        """Wait for the turn to read a page, as ``DiskOrder`` specifies."""
        read = object()
        try:
            self._begin_kv_read(read)
            self._may_read(time.monotonic() + PAGE_PATIENCE)
            yield
        finally:
            self._end_kv_read(read)

    def wait_to_write(self, is_urgent: Callable[[], bool]) -> None:
        """Wait for the turn to write a part of a page, as ``DiskOrder`` specifies."""
        self._may_write(is_urgent)

    @transition
    def _begin_kv_read(self, read: object) -> None:
        self._loads.begin_kv_read(read)

    @waiting
    def _may_read(self, late: float) -> bool | None:
        return time.monotonic() > late or self._loads.closed_by is not None or not self._loads.has_demand_loads or None

    @posted
    def _end_kv_read(self, read: object) -> None:
        self._loads.end_kv_read(read)

    @waiting
    def _may_write(self, is_urgent: Callable[[], bool]) -> bool | None:
        is_idle = self._loads.closed_by is not None or not (self._loads.is_reading_kv or [*self._loads])
        return is_urgent() or is_idle or None
