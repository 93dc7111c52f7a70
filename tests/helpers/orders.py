"""An order of reads and writes in which nothing waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

from moetier.tiers.disk_order import DiskOrder


class NoOrder:
    """Never waits."""

    def reading_page(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def wait_to_write(self, is_urgent: Callable[[], bool]) -> None:
        pass


NO_ORDER: DiskOrder = NoOrder()
