"""Promoter: wishes of the device tier, brought about by a thread of its own, one record at a time.

The source's own prefetch reads from the disk; what is not there yet is looked for again, while the wish stands, after a
pause that grows. A demand goes first: while one misses records no copy is begun, and one that has begun is one record.

Nobody waits for ever: it waits for the source with no slot of the device in its hand, and with a lease of the source in
its hand for its own copy alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from queue import Empty, SimpleQueue

from .errors import ClosedError, MoetierError
from .keys import ExpertKey
from .monitor import Monitor
from .source import ExpertSource, Lease
from .stats import TierCounters

PAUSE = 0.002  # seconds until it looks again for what is not in the source yet; twice as many each time ...
LONGEST_PAUSE = 0.1  # ... up to these
FAREWELL = 1.0  # seconds that closing waits for a thread which waits for the source: it ends with that at the latest


class Promotion:
    """Of a record that a demand has not wanted yet."""

    __slots__ = ("began", "seconds")

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds: float | None = None  # that it took; None: it is under way


class Promoter:
    """Of one tier, whose lock is held by who calls anything but ``join``."""

    def __init__(
        self,
        source: ExpertSource[memoryview],
        monitor: Monitor,
        counters: TierCounters,
        promote: Callable[[Lease[memoryview]], None],
    ) -> None:
        """``promote`` is called without the lock: it begins what ``may_begin``, and returns when the lease may end."""
        self._source = source
        self._monitor = monitor
        self._counters = counters
        self._promote = promote
        self._waiting: dict[int, list[ExpertKey]] = {}  # not begun; by block, in the order of their coming
        self._latest: dict[int, dict[ExpertKey, None]] = {}  # begun or not, here or not; never the same object twice
        self._unused: dict[ExpertKey, Promotion] = {}
        self._missing = 0  # demands that wait for records
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_over = False

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether the latest wishes name it."""
        return key in self._latest.get(key.block, ())

    # -- wishes and demands -------------------------------------------------------------------------------------------

    def wish(self, block: int, wishes: Sequence[ExpertKey], absent: Sequence[ExpertKey]) -> None:
        """The block's wishes are these from now on, and those that are ``absent`` are to come."""
        self._counters.cancelled += sum(key not in wishes for key in self._waiting.pop(block, ()))
        self._latest.pop(block, None)
        if wishes:
            self._latest[block] = dict.fromkeys(wishes)
        if absent:
            self._waiting[block] = list(dict.fromkeys(absent))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moetier-promoter", daemon=True)
                self._thread.start()
            if not self._missing:
                self._bell.put(None)

    def stand_back(self) -> None:
        """A demand misses records."""
        self._missing += 1

    def go_on(self) -> None:
        """It is over."""
        self._missing -= 1
        if self._waiting and not self._missing:
            self._bell.put(None)

    def used(self, key: ExpertKey) -> None:
        """By a demand: if a wish brought it, that was right."""
        if (promotion := self._unused.pop(key, None)) is not None:
            if promotion.seconds is None:
                self._counters.late += 1
                self._counters.saved_seconds += time.perf_counter() - promotion.began
            else:
                self._counters.useful += 1
                self._counters.saved_seconds += promotion.seconds

    # -- promotions ---------------------------------------------------------------------------------------------------

    def may_begin(self, key: ExpertKey) -> bool:
        """Whether the wish stands, and no demand is to go first."""
        return not self._missing and key in self._waiting.get(key.block, ())

    def begin(self, key: ExpertKey) -> Promotion:
        self.drop(key)
        self._counters.prefetched += 1
        promotion = self._unused[key] = Promotion()
        return promotion

    def drop(self, key: ExpertKey) -> None:
        """It is not to come any more: it is here, or there is no place for it, or it can't be had."""
        waiting = self._waiting.get(key.block, [])
        if key in waiting:
            waiting.remove(key)
            if not waiting:
                del self._waiting[key.block]

    def fail(self, key: ExpertKey) -> None:
        """It did not come after all."""
        self._unused.pop(key, None)

    def evict(self, key: ExpertKey) -> None:
        if self._unused.pop(key, None) is not None:
            self._counters.wasted += 1

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Nothing is begun any more."""
        self._is_over = True
        self._waiting.clear()
        self._latest.clear()
        self._bell.put(None)

    def join(self) -> None:
        """Waits for the thread, without the lock."""
        if self._thread is not None:
            self._thread.join(FAREWELL)

    def check_integrity(self, find: Callable[[ExpertKey], int | None]) -> None:
        """Asserts that what was promoted and not used is in a slot, and that what waits is wished for."""
        assert self._missing >= 0
        assert all(find(key) is not None for key in self._unused)
        for block, waiting in self._waiting.items():
            assert waiting
            assert len(set(waiting)) == len(waiting)
            assert self._latest[block].keys() >= set(waiting)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(ClosedError):  # of the source: no wish comes true any more
            while (key := self._next()) is not None:
                self._bring(key)

    def _next(self) -> ExpertKey | None:
        """The first that waits and is in the source, as soon as there is one and no demand goes first; None at the
        end."""
        pause = PAUSE
        while True:
            with self._monitor:
                if self._is_over:
                    return None
                waiting = [key for keys in self._waiting.values() for key in keys] if not self._missing else []
            absent = set(self._source.absent(waiting))
            for key in waiting:
                if key not in absent:
                    return key
            try:
                self._bell.get(timeout=pause if waiting else None)
                pause = PAUSE
            except Empty:
                pause = min(2 * pause, LONGEST_PAUSE)

    def _bring(self, key: ExpertKey) -> None:
        try:
            with closing(self._source.acquire([key])) as leases:
                lease = next(leases)
                self._wish_again(key)
                self._promote(lease)
        except (MoetierError, RuntimeError):  # a demand meets it too, and there somebody is told
            with self._monitor:
                self.drop(key)

    def _wish_again(self, key: ExpertKey) -> None:
        """The source takes an acquire for a demand, which clears the block's wishes there: they are told once more,
        until what was told is what is wished."""
        told: object = self  # nothing yet
        while True:
            with self._monitor:
                latest = self._latest.get(key.block)
                rest = [other for other in self._waiting.get(key.block, ()) if other != key]
            if latest is told or (told is self and not rest):
                return
            self._source.prefetch(key.block, rest)
            told = latest
