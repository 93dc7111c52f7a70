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
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch

from moetier.tiers.cache.orders import DEFAULT_ORDER
from moetier.tiers.errors import ClosedError, MoetierError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease, Lender, Pace
from moetier.tiers.stats import TierCounters, TierStats

from .allocation import allocate, fewer
from .copies import Arrange, Copies
from .fill import Intake
from .promoter import Promoter
from .residency import DeviceSlots
from .stream import Device, Event, Stream
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
        self._monitor = Monitor(self._repair)
        self._counters = TierCounters("device")
        self._copies = Copies(device, arrange)
        self._slots = DeviceSlots(manifest, allocate(device, manifest, slots), policy, self._counters)
        self._intake = Intake(self._monitor, self._slots, self._copies, self._counters, self._check_open)
        self._visits: dict[Visit, None] = {}  # calls of acquire that have not ended
        self._shrinking: int | None = None  # the thread that shrinks it; no call of acquire begins meanwhile
        self._wished: set[int] = set()  # blocks whose wishes were passed on
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
        visit = Visit(self._slots.pool(block), caller=threading.get_ident())
        try:
            self._monitor.wait_for(self._enter, visit, block, len(distinct))
            missing = self._look(visit, distinct)
            yield from self._leases(visit)
            if missing:
                yield from self._bring(visit, missing)
        finally:
            self._monitor.post(partial(self._leave, visit))

    def reclaim(self) -> None:
        """As ``ExpertSource`` says."""
        self._monitor.run(self._reclaim, threading.get_ident())
        self._source.reclaim()

    def _reclaim(self, caller: int) -> None:
        self._end_shrinking(caller)
        for visit in [visit for visit in self._visits if visit.caller == caller]:
            self._leave(visit)
            visit.end_copies()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """As ``ExpertSource`` says: what the device lacks is wished for in the host, and promoted from there."""
        self._manifest.check_keys(block, keys)
        self._source.prefetch(block, self._monitor.run(self._wish, block, keys))

    def _wish(self, block: int, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        self._check_open()
        lacking = [key for key in keys if self._slots.find(key) is None]
        self._wished.add(block)
        if self._promoter is not None:
            self._promoter.wish(block, keys, lacking)
        return lacking

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """As ``ExpertSource`` says; where nothing is promoted, of the host: to have it there is all a wish can do."""
        if self._promoter is None:
            return self._source.absent(keys)
        return self._monitor.run(lambda: [key for key in keys if not self._slots.holds(key)])

    def pace(self, block: int) -> Pace | None:
        """Of the host's reads, beside which a copy is nothing."""
        return self._source.pace(block)

    def stats(self) -> TierStats:
        return self._monitor.run(self._slots.stats)

    def shrink(self) -> int:
        """Goes on with three quarters of the slots, all of them empty: for a device that has no memory left. Returns
        how many bytes that gives back; 0 where the tier can't be smaller.

        The caller holds no lease; this waits until no other caller does. Raises ClosedError; BudgetError where the
        device has no room for one token's experts any more, which closes the tier.
        """
        caller = threading.get_ident()
        try:
            before, less = self._monitor.wait_for(self._begin_shrinking, caller)
            if less == before:
                return 0
            self._monitor.wait_for(self._is_idle)
            nbytes, stats = self._monitor.run(self._use_fewer, less)
        finally:
            self._monitor.run(self._end_shrinking, caller)
        _log.warning(
            "the device has no memory left: its tier has %d slots now, no longer %d", stats.slots, sum(before.values())
        )
        return nbytes - stats.slot_bytes

    def close(self) -> None:
        """As ``ExpertSource`` says; the source stays open. A lease stays usable while its record is held.

        Does nothing in a forked child, where the device can't be used.
        """
        if not self._monitor.fork_guard.is_owner:
            return
        self._monitor.run(self._stop, threading.get_ident())
        self._monitor.wait_for(lambda: None if self._slots.copying else True)
        if self._promoter is not None:
            self._promoter.join()
        self._monitor.run(self._unlock)
        self._slots.clear()
        self._copies.clear()

    def check_integrity(self) -> None:
        """Asserts that slots, groups and promotions agree."""
        self._monitor.run(self._check_integrity)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _stop(self, caller: int) -> None:
        self._closed = True
        if self._promoter is not None:
            self._promoter.stop()
        for visit in self._visits:
            if visit.caller == caller:  # this thread copies nothing now: an exception has cut it
                self._intake.leave(visit)
        self._monitor.wake()

    def _begin_shrinking(self, caller: int) -> tuple[dict[str, int], dict[str, int]] | None:
        """How many slots there are, and how many there are to be."""
        self._check_open()
        if self._shrinking is not None:
            return None
        before = self._slots.counts
        less = fewer(self._manifest, before)
        if less != before:
            self._shrinking = caller
            if self._promoter is not None:
                self._promoter.stand_back()
        return before, less

    def _is_idle(self) -> bool | None:
        self._check_open()
        return None if self._visits or self._slots.copying else True

    def _use_fewer(self, less: dict[str, int]) -> tuple[int, TierStats]:
        """How many bytes there were, and what there is now."""
        nbytes = self._slots.stats().slot_bytes
        for key in self._slots.drop():
            if self._promoter is not None:
                self._promoter.outcomes.evict(key)
        try:
            self._slots.use(allocate(self._device, self._manifest, less))
        except Exception:  # of what comes from outside, such as Ctrl-C, the next step repairs the rest
            self._closed = True
            if self._promoter is not None:
                self._promoter.stop()
            raise
        return nbytes, self._slots.stats()

    def _end_shrinking(self, caller: int) -> None:
        if self._shrinking == caller:
            self._shrinking = None
            if self._promoter is not None:
                self._promoter.go_on()
            self._monitor.wake()

    def _unlock(self) -> None:
        self._slots.wait_for_copies()
        self._copies.locks.unlock()

    def _check_integrity(self) -> None:
        self._slots.check_integrity()
        if self._promoter is not None:
            self._promoter.check_integrity(self._slots.find)

    def _repair(self) -> None:
        if self._slots.is_dropped and not self._closed:  # shrinking was cut
            try:
                self._slots.use(allocate(self._device, self._manifest, self._slots.counts))
            except MoetierError:  # no memory is left; every caller gets ClosedError
                self._closed = True
        self._slots.repair(self._visits, self._intake.promoting)
        if self._promoter is not None:
            missing = sum(visit.misses for visit in self._visits) + (self._shrinking is not None)
            self._promoter.repair(missing, self._slots.find)
        self._monitor.wake()

    def _enter(self, visit: Visit, block: int, records: int) -> bool | None:
        self._check_open()
        if self._shrinking is not None:
            return None
        visit.pool = self._slots.pool(block)
        visit.passing = visit.pool.policy.is_scan(block, records)
        self._visits[visit] = None
        return True

    # -- a caller -----------------------------------------------------------------------------------------------------

    def _look(self, visit: Visit, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Pins the residents of distinct keys; returns the others."""
        hits, missing, wished = self._monitor.run(self._pin, visit, keys)
        if hits:
            self._source.used(hits)
        if wished and not missing:  # else the host learns of the demand by itself
            self._source.prefetch(keys[0].block, ())
        return missing

    def _pin(self, visit: Visit, keys: Sequence[ExpertKey]) -> tuple[list[ExpertKey], list[ExpertKey], bool]:
        slots, missing, promoter = visit.pool.slots, list[ExpertKey](), self._promoter
        self._check_open()
        if promoter is not None:
            promoter.wish(keys[0].block, (), ())
        for key in keys:
            slot = slots.find(key)
            if slot is not None and promoter is not None:
                promoter.outcomes.use(key)
            if slot is not None and slots.is_ready(slot):
                slots.pin(slot)
                visit.ready.append(slot)
            else:
                missing.append(key)
        for slot in reversed(visit.ready):  # what is given first is evicted last
            visit.pool.policy.touch(slot, scan=visit.passing)
        if missing and promoter is not None:
            promoter.stand_back()
            visit.misses = True
        self._counters.hits += len(visit.ready)
        self._counters.misses += len(missing)
        wished = keys[0].block in self._wished
        self._wished.discard(keys[0].block)
        return [slots.key(slot) for slot in visit.ready], missing, wished

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
        stream = self._device.current_stream()
        lease, copied = self._monitor.run(self._take, visit, stream)
        stream.wait_event(copied)
        return lease

    def _take(self, visit: Visit, stream: Stream) -> tuple[Lease[torch.Tensor], Event]:
        self._check_open()
        pool, slot = visit.pool, visit.ready.popleft()
        visit.leased = (slot, stream)
        copied, key = pool.copied[slot], pool.slots.key(slot)
        visit.latest = key
        assert copied is not None
        return Lease(key, pool.records[slot], pool.first + slot), copied

    def _release(self, visit: Visit) -> None:
        self._monitor.run(self._end_lease, visit)

    def _end_lease(self, visit: Visit) -> None:
        if visit.leased is not None:
            slot, stream = visit.leased
            visit.pool.used[slot][stream] = stream.record_event()
            visit.leased = None
            visit.pool.slots.unpin(slot)
            self._monitor.wake()

    def _leave(self, visit: Visit) -> None:
        """Gives back all that a caller holds."""
        self._end_lease(visit)
        if visit.misses and self._promoter is not None:
            visit.misses = False
            self._promoter.go_on()
        while visit.ready:
            visit.pool.slots.unpin(visit.ready.popleft())
        self._intake.leave(visit)
        self._visits.pop(visit, None)
        self._monitor.wake()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()


def _closed_error() -> ClosedError:
    return ClosedError("The device tier was closed.", "Load the model again.")
