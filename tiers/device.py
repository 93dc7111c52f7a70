"""The device tier: records where they are computed on. It sees the tier below only as a Lender.

A device does what it is told later, and each stream in its own time. Three orders are kept:

    compute on a slot starts after the copy into it: the stream of the lease waits for the copy's event;
    the copy that refills a slot starts after every use of it: the copy stream waits for an event that was recorded, at
    the end of each lease, on the stream that used it;
    a lease of the host ends after the copy out of it: the caller waits for the copy's event before it takes the next
    that the host does not hold together with it.

Where records are made ready on the device (``Copies``), that is done after the copy, in a stream of its own, and is a
use of the slot like any other; a lease waits for it.

Nobody waits for ever: a caller that waits for the host holds no slot of this tier, so all that are held belong to
callers that are awake and compute. Who waits for a slot, a lease of the host in hand, waits for one of those.

What is wished for is promoted in the background (``promoter.py``), where the tier is told to.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch

from .allocation import allocate, fewer
from .copies import Arrange, Copies
from .device_slots import DeviceSlots
from .errors import ClosedError
from .intake import Intake
from .keys import ExpertKey
from .manifest import Manifest
from .monitor import Monitor
from .order import DEFAULT_ORDER
from .promoter import Promoter
from .source import Lease, Lender, Pace
from .stats import TierCounters, TierStats
from .stream import Device
from .visit import Visit

_log = logging.getLogger(__name__)


class DeviceTier:
    """Equal slots in one allocation per record geometry, evicted block by block, filled from the host's leases.

    One thread must not acquire again inside the loop over an acquire.
    """

    def __init__(
        self,
        source: Lender[memoryview],
        manifest: Manifest,
        *,
        slots: Mapping[str, int],
        device: Device,
        promotes: bool = False,
        policy: str = DEFAULT_ORDER,
        arrange: Arrange | None = None,
    ) -> None:
        """Allocates ``slots`` by array, as ``slots_for`` gives them, or fewer, with a warning, where the device has no
        room for them. Raises BudgetError when it has none for one token's experts. Unless it ``promotes`` what is
        wished for, a wish ends in the source. ``policy`` is one of ``ORDERS``; ``arrange`` is as ``Copies`` says."""
        assert slots.keys() == manifest.layouts.keys()
        self._source = source  # stays its owner's to close
        self._device = device
        self._manifest = manifest
        self._monitor = Monitor()
        self._counters = TierCounters("device")
        self._copies = Copies(device, arrange)
        self._slots = DeviceSlots(manifest, allocate(device, manifest, slots), policy, self._counters)
        self._intake = Intake(self._monitor, self._slots, self._copies, self._counters, self._check_open)
        self._wished: set[int] = set()  # blocks whose wishes were passed on
        self._visits = 0  # calls of acquire that have not ended
        self._shrinking = False  # none begins meanwhile
        self._closed = False
        self._promoter: Promoter | None = None
        if promotes:
            self._promoter = Promoter(source, self._monitor, self._counters, self._intake.wish, self.shrink)
            self._intake.promoter = self._promoter

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """As ``ExpertSource`` says. A record is computed on in the stream that is current when its lease is taken.

        Raises MissingExpertError for a key that the model does not have.
        """
        if not keys:
            return
        block, distinct = keys[0].block, list(dict.fromkeys(keys))
        self._manifest.check_keys(block, distinct)
        visit = self._enter(block, len(distinct))
        try:
            missing = self._look(visit, distinct)
            yield from self._leases(visit)
            if missing:
                yield from self._bring(visit, missing)
        finally:
            self._monitor.post(partial(self._leave, visit))

    def prefetch(self, block: int, wishes: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says: what the device lacks is wished for in the host, and promoted from there."""
        self._manifest.check_keys(block, wishes)
        with self._monitor:
            self._check_open()
            lacking = [key for key in wishes if self._slots.find(key) is None]
            self._wished.add(block)
            if self._promoter is not None:
                self._promoter.wish(block, wishes, lacking)
        self._source.prefetch(block, lacking)

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says; where nothing is promoted, of the host: to have it there is all a wish can do."""
        if self._promoter is None:
            return self._source.absent(keys)
        with self._monitor:
            return [key for key in keys if not self._slots.holds(key)]

    def pace(self, block: int) -> Pace | None:
        """Of the host's reads, beside which a copy is nothing."""
        return self._source.pace(block)

    def stats(self) -> TierStats:
        with self._monitor:
            return self._slots.stats()

    def shrink(self) -> int:
        """Goes on with three quarters of the slots, all of them empty: for a device that has no memory left. Returns
        how many bytes that gives back; 0 where the tier can't be smaller.

        The caller holds no lease; this waits until no other caller does. Raises ClosedError; BudgetError where the
        device has no room for one token's experts any more, which closes the tier.
        """
        with self._monitor:
            self._check_open()
            self._wait_while(lambda: self._shrinking)
            before, promoter = self._slots.counts, self._promoter
            less = fewer(self._manifest, before)
            if less == before:
                return 0
            self._shrinking = True
            if promoter is not None:
                promoter.stand_back()
            try:
                self._wait_while(lambda: self._visits or self._slots.copying)
                nbytes = self._slots.stats().slot_bytes
                for key in self._slots.drop():
                    if promoter is not None:
                        promoter.evict(key)
                try:
                    self._slots.use(allocate(self._device, self._manifest, less))
                except BaseException:
                    self._closed = True
                    if promoter is not None:
                        promoter.stop()
                    raise
                stats = self._slots.stats()
            finally:
                self._shrinking = False
                if promoter is not None:
                    promoter.go_on()
                self._monitor.wake()
        _log.warning(
            "the device has no memory left: its tier has %d slots now, no longer %d", stats.slots, sum(before.values())
        )
        return nbytes - stats.slot_bytes

    def close(self) -> None:
        """As ``ExpertSource`` says; the source stays open. A lease stays usable while its record is held.

        Does nothing in a forked child, where the device can't be used.
        """
        if not self._monitor.home.is_here:
            return
        with self._monitor:
            self._closed = True
            if self._promoter is not None:
                self._promoter.stop()
            self._monitor.wake()
            while self._slots.copying:
                self._monitor.sleep()
        if self._promoter is not None:
            self._promoter.join()
        with self._monitor:
            self._slots.wait_for_copies()
            self._copies.locks.unlock()
        self._slots.clear()
        self._copies.clear()

    def check_integrity(self) -> None:
        """Asserts that slots, groups and promotions agree."""
        with self._monitor:
            self._slots.check_integrity()
            if self._promoter is not None:
                self._promoter.check_integrity(self._slots.find)

    def _enter(self, block: int, records: int) -> Visit:
        with self._monitor:
            self._check_open()
            self._wait_while(lambda: self._shrinking)
            pool = self._slots.pool(block)
            self._visits += 1
            return Visit(pool, passing=pool.policy.is_passage(block, records))

    def _look(self, visit: Visit, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Pins the residents of distinct keys; returns the others."""
        slots, missing, promoter = visit.pool.slots, [], self._promoter
        with self._monitor:
            self._check_open()
            if promoter is not None:
                promoter.wish(keys[0].block, (), ())
            for key in keys:
                slot = slots.find(key)
                if slot is not None and promoter is not None:
                    promoter.used(key)
                if slot is not None and slots.is_ready(slot):
                    slots.pin(slot)
                    visit.ready.append(slot)
                else:
                    missing.append(key)
            for slot in reversed(visit.ready):  # what is given first is evicted last
                visit.pool.policy.touch(slot, passing=visit.passing)
            if missing and promoter is not None:
                promoter.stand_back()
                visit.misses = True
            self._counters.hits += len(visit.ready)
            self._counters.misses += len(missing)
            hits = [slots.key(slot) for slot in visit.ready]
            wished = keys[0].block in self._wished
            self._wished.discard(keys[0].block)
        if hits:
            self._source.used(hits)
        if wished and not missing:  # else the host learns of the demand by itself
            self._source.prefetch(keys[0].block, ())
        return missing

    def _bring(self, visit: Visit, missing: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """Leases of what the host has to give."""
        with closing(self._source.acquire(missing)) as leases:
            began = time.perf_counter()
            try:
                for lease in leases:
                    if not self._intake.demand(visit, lease, began, wait=not visit.ready):
                        yield from self._leases(visit)
                        self._intake.demand(visit, lease, time.perf_counter(), wait=True)
                    # the next one, which the host has too, is being copied when this one is computed on. What has to be
                    # proved is waited for: it would only come later
                    yield from self._leases(visit, behind=int(lease.more and lease.proof is None))
                    if not lease.more:
                        visit.end_copies()
                    began = time.perf_counter()
            finally:
                visit.end_copies()

    def _leases(self, visit: Visit, behind: int = 0) -> Generator[Lease[torch.Tensor], None, None]:
        """Of what is ready, all but the last ``behind``."""
        while len(visit.ready) > behind:
            yield self._lease(visit)
            self._release(visit)

    def _lease(self, visit: Visit) -> Lease[torch.Tensor]:
        pool, stream = visit.pool, self._device.current_stream()
        with self._monitor:
            self._check_open()
            slot = visit.ready.popleft()
            visit.leased = (slot, stream)
            copied, key, record = pool.copied[slot], pool.slots.key(slot), pool.records[slot]
            visit.latest = key
        assert copied is not None
        stream.wait_event(copied)
        return Lease(key, record, pool.first + slot)

    def _release(self, visit: Visit) -> None:
        with self._monitor:
            self._end_lease(visit)
            self._monitor.wake()

    def _end_lease(self, visit: Visit) -> None:
        if visit.leased is not None:
            slot, stream = visit.leased
            visit.leased = None
            visit.pool.used[slot][stream] = stream.record_event()
            visit.pool.slots.unpin(slot)

    def _leave(self, visit: Visit) -> None:
        """Gives back all that a caller holds."""
        self._visits -= 1
        self._end_lease(visit)
        if visit.misses and self._promoter is not None:
            visit.misses = False
            self._promoter.go_on()
        while visit.ready:
            visit.pool.slots.unpin(visit.ready.popleft())
        self._monitor.wake()

    def _wait_while(self, condition: Callable[[], object]) -> None:
        while condition():
            self._monitor.sleep()
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()


def _closed_error() -> ClosedError:
    return ClosedError("The device tier was closed.", "Load the model again.")
