"""One call of a device tier's acquire: what it holds, and what it has to give back."""

from __future__ import annotations

from collections import deque

from moetier.tiers.layout import ExpertKey

from .pool import DevicePool
from .stream import Event, Stream


class Visit:
    """One call of acquire."""

    __slots__ = ("caller", "copied", "filling", "latest", "leased", "misses", "passing", "pool", "ready")

    def __init__(self, pool: DevicePool, *, caller: int) -> None:
        self.pool = pool
        self.caller = caller  # a thread
        self.passing = False  # a passage: wants more than its block can keep
        self.latest: ExpertKey | None = None  # leased
        self.misses = False  # records; the promoter stands back until it leaves
        self.ready: deque[int] = deque()  # pinned, not yielded yet
        self.leased: tuple[int, Stream] | None = None  # pinned; computed on in this stream
        self.filling: tuple[int, ExpertKey] | None = None  # a slot, until the copy into it is queued
        self.copied: Event | None = None  # the end of the latest copy, and with it of those before

    def end_copies(self) -> None:
        """Waits until the records that were copied may go."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None
