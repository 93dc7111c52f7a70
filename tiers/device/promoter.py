"""Promoter: wishes of the device tier, brought about by a thread of its own, one record at a time.

The source's own prefetch reads from the disk, and what is READY there is borrowed: of that the source counts no demand.
What is not there yet is looked for again, while the wish stands, after a pause that grows. A demand goes first: while
one misses records no copy is begun, and one that has begun is one record.

Nobody waits for ever: the thread waits for its own copy alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

import torch

from moetier.tiers.cache.outcomes import PrefetchOutcomes
from moetier.tiers.errors import BudgetError, ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.source import Lease, Lender
from moetier.tiers.stats import TierCounters

PAUSE = 0.002  # seconds until it looks again for what is not in the source yet; twice as many each time ...
LONGEST_PAUSE = 0.1  # ... up to these

_log = logging.getLogger(__name__)


class Promoter:
    """Of one tier, whose lock is held by who calls anything but ``join``."""

    def __init__(
        self,
        source: Lender[memoryview],
        monitor: Monitor,
        counters: TierCounters,
        promote: Callable[[Lease[memoryview]], None],
        make_room: Callable[[], object],
    ) -> None:
        """``promote`` is called without the lock: it begins what ``may_begin``, and returns when the lease may end.
        ``make_room`` is called without it too, where the device had no memory left to promote a record."""
        self._source = source
        self._monitor = monitor
        self._counters = counters
        self._promote = promote
        self._make_room = make_room
        self._waiting: dict[int, list[ExpertKey]] = {}  # not begun; by block, in the order of their coming
        self._latest: dict[int, dict[ExpertKey, None]] = {}  # begun or not, here or not; never the same object twice
        self.outcomes = PrefetchOutcomes(counters, time.perf_counter)
        self._missing = 0  # demands that wait for records
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._has_failed = False  # once is told

    def __contains__(self, key: ExpertKey) -> bool:
        """Whether the latest wishes name it."""
        return key in self._latest.get(key.block, ())

    # -- wishes and demands -------------------------------------------------------------------------------------------

    def wish(self, block: int, wishes: Sequence[ExpertKey], lacking: Sequence[ExpertKey]) -> None:
        """The block's wishes are these from now on, and those that are ``lacking`` here are to come."""
        self._counters.cancelled += sum(key not in wishes for key in self._waiting.pop(block, ()))
        self._latest.pop(block, None)
        if wishes:
            self._latest[block] = dict.fromkeys(wishes)
        if lacking:
            self._waiting[block] = list(dict.fromkeys(lacking))
            if self._thread is None or self._thread.ident is None:  # None: its start was cut
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

    # -- promotions ---------------------------------------------------------------------------------------------------

    def may_begin(self, key: ExpertKey) -> bool:
        """Whether the wish stands, and no demand is to go first."""
        return not self._missing and key in self._waiting.get(key.block, ())

    def begin(self, key: ExpertKey) -> float:
        """Note that a promotion begins. Return the time, by ``time.perf_counter``."""
        self.drop(key)
        self._counters.prefetched += 1
        began = time.perf_counter()
        self.outcomes.begin(key, began)
        return began

    def give_up(self, key: ExpertKey) -> None:
        """There is no slot for it, or it can't be had."""
        self._counters.cancelled += self.drop(key)

    def drop(self, key: ExpertKey) -> bool:
        """It is not to come any more; whether it was."""
        waiting = self._waiting.get(key.block, [])
        if key not in waiting:
            return False
        waiting.remove(key)
        if not waiting:
            del self._waiting[key.block]
        return True

    def repair(self, missing: int, find: Callable[[ExpertKey], int | None]) -> None:
        """After a step that was cut: so many demands miss records, and no wish is known."""
        self._missing = missing
        self._waiting.clear()
        self._latest.clear()
        self.outcomes.repair(find)

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Nothing is begun any more."""
        self._is_over = True
        self._waiting.clear()
        self._latest.clear()
        self._bell.put(None)

    def join(self) -> None:
        """Waits for the thread, without the lock."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def check_integrity(self, find: Callable[[ExpertKey], int | None]) -> None:
        """Asserts that what was promoted and not used is in a slot, and that what waits is wished for."""
        assert self._missing >= 0
        assert all(find(key) is not None for key in self.outcomes.unused)
        for block, waiting in self._waiting.items():
            assert waiting
            assert len(set(waiting)) == len(waiting)
            assert self._latest[block].keys() >= set(waiting)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = PAUSE
        while (waiting := self._look()) is not None:
            try:
                if any(self._bring(key) for key in waiting):  # then what waits is another, or nothing
                    pause = PAUSE
                    continue
            except ClosedError:  # of the source, or of the tier: no wish comes true any more
                return
            try:
                self._bell.get(timeout=pause if waiting else None)
                pause = PAUSE
            except Empty:
                pause = min(2 * pause, LONGEST_PAUSE)

    def _look(self) -> list[ExpertKey] | None:
        """What waits and may begin now; None at the end."""
        return self._monitor.run(self._due)

    def _due(self) -> list[ExpertKey] | None:
        if self._is_over:
            return None
        return [key for keys in self._waiting.values() for key in keys] if not self._missing else []

    def _bring(self, key: ExpertKey) -> bool:
        """Whether the source has it, or it is given up."""
        try:
            with self._source.borrow(key) as lease:
                if lease is not None:
                    self._promote(lease)
                return lease is not None
        except ClosedError:
            raise
        except Exception as error:  # whatever it is: the thread is for other wishes too, and a demand meets it again
            if not self._has_failed:  # as text: its frames hold the lease
                self._has_failed = True
                _log.warning("not promoted to the device: %s: %s: %s", key, type(error).__name__, str(error))
            self._monitor.run(self.give_up, key)
            is_full = isinstance(error, torch.OutOfMemoryError)
        if is_full:  # not before: the error's frames hold slots
            with contextlib.suppress(BudgetError):  # the next demand says that the tier is closed
                self._make_room()
        return True
