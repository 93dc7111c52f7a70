"""DeviceTier: records in the memory of the device that computes on them, copied from the tier below.

A device runs what it is told later, and each stream in its own time. Three orders are kept:

    compute on a slot starts after the copy into it: the stream of the lease waits for the copy's event;
    the copy that refills a slot starts after every use of it: the copy stream waits for an event that was recorded, at
    the end of each lease, on the stream that used it;
    a lease of the host ends after the copy out of it: the caller waits for the copy's event before it takes the next
    that the host does not hold together with it.

Where records are arranged on the device (``Copies``), that is done after the copy, in a stream of its own. It is a use
of the slot like any other, and a lease waits for it.

No deadlock: a caller that waits for the host holds no slot of this tier, so all held slots belong to callers that are
awake and compute. A caller that waits for a slot, with a lease of the host, waits for one of those.

Requested records are promoted in the background (``promoter.py``), where the tier is told to.
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
from moetier.tiers.locks import Monitor, step
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease, Lender, Pace
from moetier.tiers.stats import TierCounters, TierStats

from .copies import Arrange, Copies
from .device_pool import DeviceSlots, allocate, fewer
from .fill import DeviceDemand, DeviceFill
from .promoter import Promoter
from .stream import Device, Event, Stream

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
        """Allocate the slots, or fewer, with a warning, where the device has no room for them.

        Args:
            source: the tier below, which its owner closes.
            slots: number of slots by array, as ``slots_for`` gives them.
            promotes: whether requested records are copied to the device; otherwise requests end in the source.
            policy: one of ``ORDERS``.
            arrange: see ``Copies``.

        Raises:
            BudgetError: the device has no room for one token's experts.
        """
        assert slots.keys() == manifest.layouts.keys()
        self._source = source
        self._device = device
        self._manifest = manifest
        self._monitor = Monitor(self._repair)
        self._counters = TierCounters("device")
        self._copies = Copies(device, arrange)
        self._slots = DeviceSlots(manifest, allocate(device, manifest, slots), policy, self._counters)
        self._promotes = promotes
        self._promoter = Promoter(
            source, self._monitor, self._counters, lambda lease: self._fill.promote(lease), self.shrink
        )
        self._fill = DeviceFill(
            self._monitor, self._slots, self._copies, self._counters, self._promoter, self._check_open
        )
        self._demands: dict[DeviceDemand, None] = {}  # calls of acquire that have not ended
        self._shrinking: int | None = None  # the thread that shrinks the tier; no call of acquire begins meanwhile
        self._requested: set[int] = set()  # blocks whose requests were passed on to the source
        self._closed = False

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """See ``ExpertSource``. Records are uint8 [record bytes] on the device.

        A record is computed on in the stream that is current when its lease is taken.

        Raises MissingExpertError for a key that the model does not have.
        """
        if not keys:
            return
        block, distinct = keys[0].block, list(dict.fromkeys(keys))
        self._manifest.check_keys(block, distinct)
        demand = DeviceDemand(self._slots.pool(block), caller=threading.get_ident())
        try:
            hits, missing, was_requested = self._monitor.wait_for(self._look, demand, distinct)
            if hits:
                self._source.used(hits)
            if was_requested and not missing:  # otherwise the host learns of the demand by itself
                self._source.prefetch(block, ())
            yield from self._leases(demand)
            if missing:
                yield from self._bring(demand, missing)
        finally:
            self._monitor.post(partial(self._leave, demand))

    def reclaim(self) -> None:
        """See ``ExpertSource``."""
        self._reclaim(threading.get_ident())
        self._source.reclaim()

    @step
    def _reclaim(self, caller: int) -> None:
        self._end_shrinking(caller)
        for demand in [demand for demand in self._demands if demand.caller == caller]:
            self._leave(demand)
            demand.end_copies()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """See ``ExpertSource``. Records that the device lacks are requested from the host, and promoted from there."""
        self._manifest.check_keys(block, keys)
        self._source.prefetch(block, self._request(block, keys))

    @step
    def _request(self, block: int, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        self._check_open()
        lacking = [key for key in keys if self._slots.find(key) is None]
        self._requested.add(block)
        if self._promotes:
            self._promoter.request(block, keys, lacking)
        return lacking

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """See ``ExpertSource``. Where nothing is promoted, the host answers: a request brings a record only there."""
        if not self._promotes:
            return self._source.absent(keys)
        return self._monitor.run(lambda: [key for key in keys if not self._slots.pool(key.block).holds(key)])

    def pace(self, block: int) -> Pace | None:
        """Return the read timing of the host tier. The copy to the device is not counted: it is short beside a read."""
        return self._source.pace(block)

    @step
    def stats(self) -> TierStats:
        """See ``ExpertSource``."""
        return self._slots.stats()

    def shrink(self) -> int:
        """Evict all records, and go on with three quarters of the slots, when the device has no memory left.

        The caller holds no lease; this waits until no other caller does.

        Returns:
            The bytes that were given back; 0 where the tier can't be smaller.

        Raises:
            ClosedError: the tier was closed.
            BudgetError: the device no longer has room for one token's experts, and the tier is closed now.
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
        """See ``ExpertSource``. The source stays open, and a lease stays usable while its record is held.

        Does nothing in a forked child, where the device can't be used.
        """
        if not self._monitor.fork_guard.is_owner:
            return
        self._monitor.run(self._stop, threading.get_ident())
        self._monitor.wait_for(lambda: None if self._slots.copying else True)
        self._promoter.join()
        self._monitor.run(self._unlock)
        self._slots.clear()
        self._copies.clear()

    @step
    def check_integrity(self) -> None:
        """Assert that slots, groups and promotions agree."""
        for pool in self._slots.pools.values():
            pool.check_integrity()
        self._promoter.check_integrity(self._slots.find)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _stop(self, caller: int) -> None:
        self._closed = True
        self._promoter.stop()
        for demand in self._demands:
            if demand.caller == caller:  # this thread copies nothing now: an exception has cut it
                self._fill.leave(demand)
        self._monitor.wake()

    def _begin_shrinking(self, caller: int) -> tuple[dict[str, int], dict[str, int]] | None:
        """Return how many slots there are, and how many there are to be; None while another thread shrinks the tier."""
        self._check_open()
        if self._shrinking is not None:
            return None
        before = self._slots.counts
        less = fewer(self._manifest, before)
        if less != before:
            self._shrinking = caller
            self._promoter.pause()
        return before, less

    def _is_idle(self) -> bool | None:
        self._check_open()
        return None if self._demands or self._slots.copying else True

    def _use_fewer(self, less: dict[str, int]) -> tuple[int, TierStats]:
        """Return how many bytes there were, and what there is now."""
        nbytes = self._slots.stats().slot_bytes
        for key in self._slots.drop():
            self._promoter.outcomes.evict(key)
        try:
            self._slots.use(allocate(self._device, self._manifest, less))
        except Exception:  # after an exception from outside, such as KeyboardInterrupt, the next step repairs the rest
            self._closed = True
            self._promoter.stop()
            raise
        return nbytes, self._slots.stats()

    def _end_shrinking(self, caller: int) -> None:
        if self._shrinking == caller:
            self._shrinking = None
            self._promoter.resume()
            self._monitor.wake()

    def _unlock(self) -> None:
        self._slots.wait_for_copies()
        self._copies.locks.unlock()

    def _repair(self) -> None:
        if self._slots.is_dropped and not self._closed:  # shrinking was cut
            try:
                self._slots.use(allocate(self._device, self._manifest, self._slots.counts))
            except MoetierError:  # no memory is left; every caller gets ClosedError
                self._closed = True
        self._fill.repair(self._demands)
        missing = sum(demand.misses for demand in self._demands) + (self._shrinking is not None)
        self._promoter.repair(missing, self._slots.find)
        self._monitor.wake()

    # -- a caller -----------------------------------------------------------------------------------------------------

    def _look(
        self, demand: DeviceDemand, keys: Sequence[ExpertKey]
    ) -> tuple[list[ExpertKey], list[ExpertKey], bool] | None:
        """Pin the residents of distinct keys; return them, the other keys, and whether records were requested.

        None while another thread shrinks the tier.
        """
        self._check_open()
        if self._shrinking is not None:
            return None
        block, hits, missing = keys[0].block, list[ExpertKey](), list[ExpertKey]()
        demand.pool = self._slots.pool(block)
        demand.is_scan = len(keys) > demand.pool.quota(block)
        self._demands[demand] = None
        if self._promotes:
            self._promoter.request(block, (), ())
            for key in keys:
                self._promoter.outcomes.use(key)
        for key in keys:
            slot = demand.pool.pin_ready(key)
            if slot is None:
                missing.append(key)
            else:
                demand.ready.append(slot)
                hits.append(key)
        demand.pool.touch(reversed(hits), scan=demand.is_scan)  # the first of the keys is evicted last
        if missing:
            self._promoter.pause()
            demand.misses = True
        self._counters.hits += len(hits)
        self._counters.misses += len(missing)
        was_requested = block in self._requested
        self._requested.discard(block)
        return hits, missing, was_requested

    def _bring(self, demand: DeviceDemand, missing: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """Lease the records that the device lacks, as the host gives them."""
        with closing(self._source.acquire(missing)) as leases:
            began = time.perf_counter()
            try:
                for lease in leases:
                    if not self._fill.demand(demand, lease, began, wait=not demand.ready):
                        yield from self._leases(demand)
                        self._fill.demand(demand, lease, time.perf_counter(), wait=True)
                    # While this record is computed on, the next is copied, if the host has it too. A copy that needs a
                    # proof is waited for, so nothing would be gained.
                    yield from self._leases(demand, behind=int(lease.more and lease.proof is None))
                    if not lease.more:
                        demand.end_copies()
                    began = time.perf_counter()
            finally:
                demand.end_copies()

    def _leases(self, demand: DeviceDemand, behind: int = 0) -> Generator[Lease[torch.Tensor], None, None]:
        """Lease the records that are ready, all but the last ``behind``."""
        while len(demand.ready) > behind:
            stream = self._device.current_stream()
            lease, copied = self._monitor.run(self._take, demand, stream)
            stream.wait_event(copied)
            yield lease
        if demand.leased is not None:
            self._monitor.run(self._end_lease, demand)

    def _take(self, demand: DeviceDemand, stream: Stream) -> tuple[Lease[torch.Tensor], Event]:
        self._end_lease(demand)
        self._check_open()
        pool, slot = demand.pool, demand.ready.popleft()
        demand.leased = (slot, stream)
        copied, key = pool.copied[slot], pool.key(slot)
        demand.latest = key
        assert copied is not None
        return Lease(key, pool.records[slot], pool.first + slot), copied

    def _end_lease(self, demand: DeviceDemand) -> None:
        if demand.leased is not None:
            slot, stream = demand.leased
            demand.pool.used[slot][stream] = stream.record_event()
            demand.leased = None
            demand.pool.unpin(slot)
            self._monitor.wake()

    def _leave(self, demand: DeviceDemand) -> None:
        """Release all that a demand holds."""
        self._end_lease(demand)
        if demand.misses:
            demand.misses = False
            self._promoter.resume()
        while demand.ready:
            demand.pool.unpin(demand.ready.popleft())
        self._fill.leave(demand)
        self._demands.pop(demand, None)
        self._monitor.wake()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("The device tier was closed.", "Load the model again.")
