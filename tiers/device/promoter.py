"""Promoter: a background thread that copies requested records from the host to the device, one at a time.

The host tier prefetches a requested record from the disk. Once the record is READY there, the promoter borrows it,
which the host tier does not count as a demand. If the record is not READY yet, the promoter looks again after a pause,
which grows each time, until the request is replaced. Demands go first: while a demand lacks records, no promotion
begins. A promotion that has begun copies one record only.

The thread can't be in a deadlock, as it waits only for its own copy.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

import torch

from moetier.tiers.errors import BudgetError, ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.source import Lease, Lender
from moetier.tiers.stats import PrefetchOutcomes, TierCounters

PAUSE = 0.002  # seconds until the promoter looks again for records that are not READY yet; doubled each time
LONGEST_PAUSE = 0.1  # seconds

_log = logging.getLogger(__name__)


class Promoter:
    """Promotions of one tier. Every method but ``join`` is part of a step: callers hold the tier's lock."""

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
            source: the tier from which records are copied.
            monitor: the device tier's monitor.
            counters: the device tier's counters.
            promote: called without the lock with a borrowed record. It copies the record if ``may_begin`` allows it,
                and returns when the lease may end.
            make_room: called without the lock if the device had no memory left for a promotion.
        """
        self._source = source
        self._monitor = monitor
        self._counters = counters
        self._promote = promote
        self._make_room = make_room
        # the latest requests of each block, in the order of arrival; True: its promotion has yet to begin
        self._requests: dict[int, dict[ExpertKey, bool]] = {}
        self.outcomes = PrefetchOutcomes(counters, time.perf_counter)
        self._missing = 0  # number of demands that lack records
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._has_failed = False  # only the first failure is logged

    def __contains__(self, key: ExpertKey) -> bool:
        """Return whether a record is in the latest requests of its block."""
        return key in self._requests.get(key.block, ())

    @property
    def waiting(self) -> list[ExpertKey]:
        """Records whose promotion has yet to begin."""
        return [key for requests in self._requests.values() for key, waits in requests.items() if waits]

    # -- requests and demands -----------------------------------------------------------------------------------------

    def request(self, block: int, keys: Sequence[ExpertKey], lacking: Sequence[ExpertKey]) -> None:
        """Replace a block's requests by ``keys``, and promote those in ``lacking``, which are not on the device."""
        before = self._requests.pop(block, {})
        self._counters.cancelled += sum([waits and key not in keys for key, waits in before.items()])
        if keys:
            self._requests[block] = {key: key in lacking for key in keys}
        if lacking:
            if self._thread is None or self._thread.ident is None:  # ident is None if its start was interrupted
                self._thread = threading.Thread(target=self._run, name="moetier-promoter", daemon=True)
                self._thread.start()
            if not self._missing:
                self._bell.put(None)

    def pause(self) -> None:
        """Begin no promotion until ``resume`` has been called as often as ``pause``, because a demand lacks records."""
        self._missing += 1

    def resume(self) -> None:
        """End one ``pause``."""
        self._missing -= 1
        if not self._missing and self.waiting:
            self._bell.put(None)

    # -- promotions ---------------------------------------------------------------------------------------------------

    def may_begin(self, key: ExpertKey) -> bool:
        """Return whether a record still waits for its promotion and no demand goes first."""
        return not self._missing and self._requests.get(key.block, {}).get(key, False)

    def note_begun(self, key: ExpertKey, began: float) -> None:
        """Note that a promotion has begun, at the time ``began`` by ``time.perf_counter``."""
        self.remove(key)
        self._counters.prefetched += 1
        self.outcomes.began[key] = began

    def cancel(self, key: ExpertKey) -> None:
        """Cancel a request, because there is no slot for the record or it can't be copied."""
        self._counters.cancelled += self.remove(key)

    def remove(self, key: ExpertKey) -> bool:
        """Remove a record from those whose promotion has yet to begin. Return whether it was one of them."""
        requests = self._requests.get(key.block, {})
        waits = requests.get(key, False)
        if waits:
            requests[key] = False
        return waits

    def repair(self, missing: int, find: Callable[[ExpertKey], int | None]) -> None:
        """Make the state consistent after an interrupted step: drop all requests.

        ``missing`` is the number of demands that lack records. ``find`` returns the slot of a key.
        """
        self._missing = missing
        self._requests.clear()
        self.outcomes.repair(find)

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin no more promotions, and end the thread."""
        self._is_over = True
        self._requests.clear()
        self._bell.put(None)

    def join(self) -> None:
        """Wait until the thread has ended. Called without the lock."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def check_integrity(self, find: Callable[[ExpertKey], int | None]) -> None:
        """Assert that unused promoted records have slots. ``find`` returns the slot of a key. Tests call it."""
        assert self._missing >= 0
        assert all(find(key) is not None for key in self.outcomes.unused)

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = PAUSE
        while (waiting := self._monitor.run(self._due)) is not None:
            try:
                if any(self._bring(key) for key in waiting):  # then the list of waiting records has changed
                    pause = PAUSE
                    continue
            except ClosedError:  # the source or this tier was closed
                return
            try:
                self._bell.get(timeout=pause if waiting else None)
                pause = PAUSE
            except Empty:
                pause = min(2 * pause, LONGEST_PAUSE)

    def _due(self) -> list[ExpertKey] | None:
        """Return the records that may be promoted now; None if the thread is to end."""
        if self._is_over:
            return None
        return self.waiting if not self._missing else []

    def _bring(self, key: ExpertKey) -> bool:
        """Promote a record if it is READY in the source. Return False if it is not and should be looked for again."""
        try:
            with self._source.borrow(key) as lease:
                if lease is not None:
                    self._promote(lease)
                return lease is not None
        except ClosedError:
            raise
        except Exception as error:  # go on with other requests: a demand for this record will raise the error again
            if not self._has_failed:  # logged as text, because the error's frames keep the lease
                self._has_failed = True
                _log.warning("not promoted to the device: %s: %s: %s", key, type(error).__name__, str(error))
            self._monitor.run(self.cancel, key)
            is_full = isinstance(error, torch.OutOfMemoryError)
        if is_full:  # outside the handler, because the error's frames keep slots
            with contextlib.suppress(BudgetError):  # then the tier is closed, and the next demand raises ClosedError
                self._make_room()
        return True
