"""Promoter: a background thread that copies requested records from the host to the device, one at a time.

The source's own prefetch reads a requested record from the disk. Once it is READY there the promoter borrows it, which
the source does not count as a demand. A record that is not READY yet is looked for again after a pause that grows, as
long as the request stands. Demands go first: while one misses records no copy is begun, and a copy that has begun is
one record.

No deadlock: the thread waits only for its own copy.
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

PAUSE = 0.002  # seconds until the first new look for records that are not in the source yet; doubled each time
LONGEST_PAUSE = 0.1  # seconds

_log = logging.getLogger(__name__)


class Promoter:
    """Promotions of one tier. Every method but ``join`` is part of a step."""

    def __init__(
        self,
        source: Lender[memoryview],
        monitor: Monitor,
        counters: TierCounters,
        promote: Callable[[Lease[memoryview]], None],
        make_room: Callable[[], object],
    ) -> None:
        """
        Args:
            promote: called without the lock to copy a record that ``may_begin``; returns when the lease may end.
            make_room: called without the lock when the device had no memory left to promote a record.
        """
        self._source = source
        self._monitor = monitor
        self._counters = counters
        self._promote = promote
        self._make_room = make_room
        # the latest requests of each block, in the order of arrival; True: to be promoted, and not begun
        self._requests: dict[int, dict[ExpertKey, bool]] = {}
        self.outcomes = PrefetchOutcomes(counters, time.perf_counter)
        self._missing = 0  # demands that wait for records
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._has_failed = False  # only the first failure is logged

    def __contains__(self, key: ExpertKey) -> bool:
        """Return whether the latest requests name a record."""
        return key in self._requests.get(key.block, ())

    @property
    def waiting(self) -> list[ExpertKey]:
        """Records that are to be promoted, and not begun."""
        return [key for requests in self._requests.values() for key, waits in requests.items() if waits]

    # -- requests and demands -----------------------------------------------------------------------------------------

    def request(self, block: int, keys: Sequence[ExpertKey], lacking: Sequence[ExpertKey]) -> None:
        """Replace a block's requests by ``keys``, and promote those that are ``lacking`` on the device."""
        before = self._requests.pop(block, {})
        self._counters.cancelled += sum([waits and key not in keys for key, waits in before.items()])
        if keys:
            self._requests[block] = {key: key in lacking for key in keys}
        if lacking:
            if self._thread is None or self._thread.ident is None:  # None: its start was cut
                self._thread = threading.Thread(target=self._run, name="moetier-promoter", daemon=True)
                self._thread.start()
            if not self._missing:
                self._bell.put(None)

    def pause(self) -> None:
        """Begin no promotion until ``resume`` has been called as often: a demand misses records."""
        self._missing += 1

    def resume(self) -> None:
        """End one ``pause``."""
        self._missing -= 1
        if not self._missing and self.waiting:
            self._bell.put(None)

    # -- promotions ---------------------------------------------------------------------------------------------------

    def may_begin(self, key: ExpertKey) -> bool:
        """Return whether a record is still requested, and no demand goes first."""
        return not self._missing and self._requests.get(key.block, {}).get(key, False)

    def begin(self, key: ExpertKey, began: float) -> None:
        """Note that a promotion begins, at a time by ``time.perf_counter``."""
        self.remove(key)
        self._counters.prefetched += 1
        self.outcomes.began[key] = began

    def cancel(self, key: ExpertKey) -> None:
        """Cancel a request for which there is no slot, or whose record can't be had."""
        self._counters.cancelled += self.remove(key)

    def remove(self, key: ExpertKey) -> bool:
        """Remove a request from those that wait; return whether it was there."""
        requests = self._requests.get(key.block, {})
        waits = requests.get(key, False)
        if waits:
            requests[key] = False
        return waits

    def repair(self, missing: int, find: Callable[[ExpertKey], int | None]) -> None:
        """Drop all requests after a step that was cut; ``missing`` demands miss records."""
        self._missing = missing
        self._requests.clear()
        self.outcomes.repair(find)

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin no promotion any more."""
        self._is_over = True
        self._requests.clear()
        self._bell.put(None)

    def join(self) -> None:
        """Wait for the thread, without the lock."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def check_integrity(self, find: Callable[[ExpertKey], int | None]) -> None:
        """Assert that promoted records that are unused are in slots."""
        assert self._missing >= 0
        assert all(find(key) is not None for key in self.outcomes.unused)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = PAUSE
        while (waiting := self._monitor.run(self._due)) is not None:
            try:
                if any(self._bring(key) for key in waiting):  # the list of those that wait has changed
                    pause = PAUSE
                    continue
            except ClosedError:  # of the source, or of the tier
                return
            try:
                self._bell.get(timeout=pause if waiting else None)
                pause = PAUSE
            except Empty:
                pause = min(2 * pause, LONGEST_PAUSE)

    def _due(self) -> list[ExpertKey] | None:
        """Return the records that may be promoted now; None at the end."""
        if self._is_over:
            return None
        return self.waiting if not self._missing else []

    def _bring(self, key: ExpertKey) -> bool:
        """Promote a record if the source has it; return whether it has, or the request was cancelled."""
        try:
            with self._source.borrow(key) as lease:
                if lease is not None:
                    self._promote(lease)
                return lease is not None
        except ClosedError:
            raise
        except Exception as error:  # the thread serves other requests too, and a demand will meet the error again
            if not self._has_failed:  # logged as text: the error's frames hold the lease
                self._has_failed = True
                _log.warning("not promoted to the device: %s: %s: %s", key, type(error).__name__, str(error))
            self._monitor.run(self.cancel, key)
            is_full = isinstance(error, torch.OutOfMemoryError)
        if is_full:  # not in the handler: the error's frames hold slots
            with contextlib.suppress(BudgetError):  # the tier is closed then, and the next demand raises that
                self._make_room()
        return True
