"""DeviceTier: a cache of records in the memory of the device that computes, copied from the tier below.

A device does queued work later, and its streams run independently. The tier keeps three orders:

    A computation on a slot starts after the copy into the slot: the stream of the lease waits for the copy's event.
    The copy that refills a slot starts after every use of the slot: at the end of each lease an event is recorded on
    the stream that used the slot, and the copy stream waits for it.
    A lease of the host ends after the copy from its record: the caller waits for the copy's event before it takes a
    lease that ends this one.

If records are arranged on the device (see ``Copies``), that is done after the copy, in a stream of its own. It counts
as a use of the slot, and leases of the slot wait for it.

There is no deadlock. A caller that waits for the host holds no slot of this tier, so all leased slots belong to callers
that are computing. A caller that holds a lease of the host and waits for a slot waits for one of those.

If ``promotes`` is true, requested records are copied to the device in the background (``promoter``).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial

import torch

from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.errors import ClosedError, MoetierError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, step
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Lease, Lender, Residents
from moetier.tiers.stats import TierCounters, TierStats

from .copies import Arrange, Copies
from .device_pool import DeviceSlots, allocate, fewer
from .fill import DeviceDemand, DeviceFill
from .promoter import Promoter
from .stream import Device, Event, Stream

_log = logging.getLogger(__name__)


class DeviceTier:
    """A cache of records on a device, which are copied from leases of the host tier. It has one allocation per layout.

    A thread that iterates over ``acquire`` must not call it again inside the loop.
    """

    def __init__(
        self,
        source: Lender[memoryview],
        manifest: Manifest,
        *,
        slots: Mapping[str, int],
        device: Device,
        promotes: bool = False,
        policy: str = DEFAULT_POLICY,
        arrange: Arrange | None = None,
    ) -> None:
        """Allocate the slots. If the device has no room for them, warn and allocate fewer.

        Args:
            source: the tier below. It is not closed by this tier.
            manifest: the store's manifest.
            slots: number of slots by zarr array, as ``slots_for`` computes them.
            device: the device.
            promotes: whether requested records are copied to the device; otherwise only the source prefetches them.
            policy: a key of ``POLICIES``.
            arrange: brings a copied record into the kernels' byte order, see ``Copies``.

        Raises:
            BudgetError: the device has no room for one token's experts of one block.
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
        self._shrinking: int | None = None  # id of the thread that shrinks the tier; calls of acquire wait for it
        self._requested: set[int] = set()  # blocks with requests that were passed on to the source
        self._closed = False

    def acquire(self, keys: Sequence[ExpertKey]) -> Generator[Lease[torch.Tensor], None, None]:
        """Lease records as ``ExpertSource`` specifies. They are uint8 [record bytes] on the device.

        The caller must compute on a record in the stream that is current when it takes the lease.

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
            if was_requested and not missing:  # cancel them; otherwise the demand reaches the host and does that
                self._source.prefetch(block, ())
            yield from self._leases(demand)
            if missing:
                yield from self._bring(demand, missing)
        finally:
            self._monitor.post(partial(self._leave, demand))

    def residents(self, block: int) -> Residents | None:
        """Return None: a device can't look records up by itself."""
        return None

    def note_uses(self, block: int, experts: Sequence[int]) -> None:
        """Do nothing: nobody has used records through ``residents``, as there are none."""

    take_back_uses = note_uses

    def reclaim(self) -> None:
        """End the calling thread's leases, as ``ExpertSource`` specifies."""
        self._reclaim(threading.get_ident())
        self._source.reclaim()

    @step
    def _reclaim(self, caller: int) -> None:
        self._end_shrinking(caller)
        for demand in [demand for demand in self._demands if demand.caller == caller]:
            self._leave(demand)
            demand.end_copies()

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Prefetch as ``ExpertSource`` specifies. Records that the device lacks are requested from the host.

        If the tier promotes, they are copied from there to the device.
        """
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
        """Return absent keys, as ``ExpertSource`` specifies.

        If nothing is promoted these are the keys absent from the host, as prefetches bring records only there.
        """
        if not self._promotes:
            return self._source.absent(keys)
        return self._monitor.run(lambda: [key for key in keys if not self._slots.pool(key.block).holds(key)])

    @step
    def stats(self) -> TierStats:
        """Return the counters and the state of the slots."""
        return self._slots.stats()

    def shrink(self) -> int:
        """Evict all records and go on with three quarters of the slots, because the device has no memory left.

        The calling thread must hold no lease. The method waits until no other thread holds one.

        Returns:
            The number of bytes that were freed; 0 if the tier can't be smaller.

        Raises:
            ClosedError: the tier was closed.
            BudgetError: the device no longer has room for one token's experts. The tier is closed.
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
        """Close the tier, as ``ExpertSource`` specifies. The source stays open, and leased records stay usable.

        Does nothing in a forked child, as the device can't be used there.
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
        """Assert that slots, groups and promotions agree. Tests call it."""
        for pool in self._slots.pools.values():
            pool.check_integrity()
        self._promoter.check_integrity(self._slots.find)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _stop(self, caller: int) -> None:
        self._closed = True
        self._promoter.stop()
        for demand in self._demands:
            if demand.caller == caller:  # this thread copies nothing now, so an exception has interrupted it
                self._fill.leave(demand)
        self._monitor.wake()

    def _begin_shrinking(self, caller: int) -> tuple[dict[str, int], dict[str, int]] | None:
        """Return the present and the new numbers of slots by array; None while another thread shrinks the tier."""
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
        """Replace the slots by ``less``. Return the bytes of the old slots, and the statistics of the new ones."""
        nbytes = self._slots.stats().slot_bytes
        for key in self._slots.drop():
            self._promoter.outcomes.evict(key)
        try:
            self._slots.use(allocate(self._device, self._manifest, less))
        except Exception:  # after a KeyboardInterrupt the next step repairs the state
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
        if self._slots.is_dropped and not self._closed:  # shrinking was interrupted
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
        """Begin a demand for distinct keys: pin the records that are READY.

        Returns the keys that are READY, the other keys, and whether prefetches of the block had been requested. Returns
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
        """Copy the records that the device lacks, in the order in which the host leases them, and lease them."""
        with closing(self._source.acquire(missing)) as leases:
            began = time.perf_counter()
            try:
                for lease in leases:
                    if not self._fill.demand(demand, lease, began, wait=not demand.ready):
                        yield from self._leases(demand)
                        self._fill.demand(demand, lease, time.perf_counter(), wait=True)
                    # If the host has the next record too, keep this one back, so that it is computed on while the next
                    # is copied. A lease with a proof (its record may be replaced meanwhile) is not kept back: the copy
                    # of its record is waited for in any case.
                    yield from self._leases(demand, behind=int(lease.more and lease.proof is None))
                    if not lease.more:
                        demand.end_copies()
                    began = time.perf_counter()
            finally:
                demand.end_copies()

    def _leases(self, demand: DeviceDemand, behind: int = 0) -> Generator[Lease[torch.Tensor], None, None]:
        """Lease the records that are ready, except the last ``behind``."""
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
        """End a demand: release its lease and its slots."""
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
