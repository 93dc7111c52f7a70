"""Promoter: a background thread that copies requested records from the host tier to the device, one at a time.

Such a copy is a *promotion*. The host tier prefetches a requested record from the disk. Once the record is READY in the
host tier, the promoter pins it, which does not count as a demand, and copies it. If it is not READY yet, the promoter
looks again after a pause, until the request is replaced. The pause grows each time. Demands go first: while a
demand lacks records, no promotion begins. A promotion that has begun ends after one record.

The thread can't be in a deadlock: it waits only for its own copy, and before that for another one that fills a slot,
which waits only for the device.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from queue import Empty, SimpleQueue

import torch

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import BudgetError, ClosedError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, transition
from moetier.tiers.source import CopySource, Lease
from moetier.tiers.stats import PrefetchOutcomes, TierCounters
from moetier.tiers.threads import start_thread

PAUSE = 0.002  # first pause until the promoter looks again for records that are not READY, in seconds; it then doubles
LONGEST_PAUSE = 0.1  # longest pause, in seconds

_log = logging.getLogger(__name__)


class Promoter(Closeable):
    """The promotions of one device tier. Callers of all methods except ``close`` hold the tier's lock."""

    def __init__(
        self,
        source: CopySource[memoryview],
        monitor: Monitor,
        counters: TierCounters,
        promote: Callable[[Lease[memoryview]], None],
        make_room: Callable[[], object],
        yields: Callable[[], bool],
    ) -> None:
        """Prepare the promoter. Its thread starts with the first request.

        Args:
            source: the tier from which records are copied.
            monitor: the device tier's monitor.
            counters: the device tier's counters.
            promote: called, without the lock, with a lease of a pinned record. It copies the record if ``may_begin``
                allows this, and returns when the lease may end.
            make_room: called, without the lock, if the device has no memory left for a promotion.
            yields: returns whether no promotion may begin now, as demands go first. ``resume`` says that this is over.
        """
        self._source = source
        self._monitor = monitor
        self._promote = promote
        self._make_room = make_room
        self._yields = yields
        # a dictionary from block to its latest requests, in the order of arrival. The requests are a dictionary from
        # key to True if the promotion is yet to begin.
        self._requests: dict[int, dict[ExpertKey, bool]] = {}
        self.outcomes = PrefetchOutcomes(counters, time.perf_counter)
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_ending = False
        self._has_failed = False  # only the first failure is logged

    def __contains__(self, key: ExpertKey) -> bool:
        """Return whether the latest prefetch request for the record's block includes the record."""
        return key in self._requests.get(key.block, ())

    @property
    def waiting(self) -> list[ExpertKey]:
        """The keys of all requested records whose promotion is yet to begin."""
        return [key for requests in self._requests.values() for key, waits in requests.items() if waits]

    # -- requests and demands -----------------------------------------------------------------------------------------

    def replace(self, block: int, keys: Iterable[ExpertKey], absent: Sequence[ExpertKey]) -> None:
        """Replace a block's requests by ``keys``. The thread will promote those of them that are in ``absent``.

        ``absent`` are the keys whose records are not on the device, in the order of ``keys``.
        """
        before = self._requests.pop(block, {})
        requests = dict.fromkeys(keys, False) | dict.fromkeys(absent, True)
        self.outcomes.note_dropped(sum([waits and key not in requests for key, waits in before.items()]))
        if requests:
            self._requests[block] = requests
        if absent:
            if self._thread is None:
                self._thread = start_thread("moetier-promoter", self._run)
            self.resume()

    def resume(self) -> None:
        """Wake the thread if promotions may begin now."""
        if not self._yields() and self.waiting:
            self._bell.put(None)

    # -- promotions ---------------------------------------------------------------------------------------------------

    def may_begin(self, key: ExpertKey) -> bool:
        """Return whether the promotion of a record is yet to begin and may begin now, as no demand lacks records."""
        return not self._yields() and self._requests.get(key.block, {}).get(key, False)

    def begin(self, key: ExpertKey) -> None:
        """Note that the promotion of a record begins."""
        self.remove(key)
        self.outcomes.note_begun(key)

    def drop(self, key: ExpertKey) -> None:
        """Drop the request for a record, because no slot is available or the record can't be copied."""
        self.outcomes.note_dropped(self.remove(key))

    def remove(self, key: ExpertKey) -> bool:
        """Remove a record from those whose promotion is yet to begin. Return whether it was one of these."""
        requests = self._requests.get(key.block, {})
        waits = requests.get(key, False)
        if waits:
            requests[key] = False
        return waits

    def repair(self, slot_of: Callable[[ExpertKey], int | None]) -> None:
        """Make the state consistent again after an interrupted transition. All requests are removed.

        ``slot_of`` returns the slot of a key, or None.
        """
        self._requests.clear()
        self.outcomes.repair(lambda key: slot_of(key) is not None)

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Let no promotion begin any more, and let the thread end. ``close`` waits for it."""
        self._is_ending = True
        self._requests.clear()
        self._bell.put(None)

    def close(self) -> None:
        """Wait until the thread has ended, after ``stop``. The caller must not hold the tier's lock. Idempotent."""
        if self._thread is not None:
            self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = PAUSE
        while (waiting := self._due()) is not None:
            try:
                if any(self._bring(key) for key in waiting):  # ``any`` ends at the first promotion, to get a new list
                    pause = PAUSE
                    continue
            except ClosedError:  # the source or this tier was closed
                return
            try:
                self._bell.get(timeout=pause if waiting else None)
                pause = PAUSE
            except Empty:
                pause = min(2 * pause, LONGEST_PAUSE)

    @transition
    def _due(self) -> list[ExpertKey] | None:
        """Return the keys of the records that may be promoted now; None if the thread has to end."""
        # a thread whose start was interrupted is not the promoter's: another one starts with the next request
        if self._is_ending or threading.current_thread() is not self._thread:
            return None
        return [] if self._yields() else self.waiting

    @transition
    def _fail(self, key: ExpertKey) -> None:
        self.drop(key)

    def _bring(self, key: ExpertKey) -> bool:
        """Promote a record if it is READY in the source. Return False if it is not READY, so that it is tried again."""
        try:
            with self._source.pin(key) as lease:
                if lease is not None:
                    self._promote(lease)
                return lease is not None
        except ClosedError:
            raise
        except Exception as error:  # go on with other requests: a demand for this record will raise the error again
            if not self._has_failed:  # log the error as text, because its frames would keep the lease
                self._has_failed = True
                _log.warning("%s was not copied to the device: %s: %s", key, type(error).__name__, str(error))
            self._fail(key)
            is_full = isinstance(error, torch.OutOfMemoryError)
        if is_full:  # outside the handler, because the error's frames would keep slots
            with contextlib.suppress(BudgetError):  # after BudgetError the tier is closed; demands raise ClosedError
                self._make_room()
        return True
