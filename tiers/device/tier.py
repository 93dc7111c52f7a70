"""DeviceTier: a cache of records in the memory of a device, which are copied from the tier below, the host tier.

A device does queued work later, and its streams run independently. The tier ensures three orders:

    A computation on a slot begins after the copy into the slot: the stream that computes waits for the copy's event.
    A copy into a slot begins after every use of the slot: when leases end, an event is recorded on the stream that has
    used their slots, and the copy stream waits for this event.
    A buffer of the ring (see ``ring``) is filled again after the copy from it: the host waits for the copy's event.
    The host tier's lease may end before, because the bytes are in the buffer.

If records are arranged on the device (see ``Copies``), this is done after the copy, in a stream of its own. Arranging
counts as a use of the slot, and computations on the slot wait for its end.

There is no deadlock. A caller that waits for the host tier holds no slot of this tier, so all leased slots belong to
callers that are computing. A caller may hold a lease of the host tier and wait for a slot. It then waits for
one of these callers, which need nothing from it, or for a slot to be filled, for which only the device is needed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import closing

import torch

from moetier.tiers.cache.policies import DEFAULT_POLICY
from moetier.tiers.cache.pool import SlotState
from moetier.tiers.closeable import Closeable, closed_on_error
from moetier.tiers.errors import ClosedError, MoetierError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.locks import Monitor, posted, transition, waiting
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import CopySource, Lease, NoUses, Residents
from moetier.tiers.stats import TierCounters, TierStats

from .copies import Arrange, Copies
from .device_pool import DeviceSlots
from .fill import DeviceDemand, DeviceFill
from .promoter import Promoter
from .stream import DeviceStream, StreamDevice, StreamEvent

_SHRUNK = "The device has no memory left, so the device tier now has %d slots instead of %d."

_log = logging.getLogger(__name__)


class DeviceTier(Closeable):
    """A cache of records in device memory. Records are copied from leases of the host tier.

    The tier has one allocation of memory for each record layout. A thread that iterates over ``acquire`` must not call
    ``acquire`` again inside the loop.
    """

    def __init__(
        self,
        source: CopySource[memoryview],
        manifest: Manifest,
        *,
        slots: Mapping[str, int],
        device: StreamDevice,
        promotes: bool = False,
        policy: str = DEFAULT_POLICY,
        arrange: Arrange | None = None,
    ) -> None:
        """Allocate the slots. If the device has too little free memory, warn, and allocate fewer slots.

        Args:
            source: the tier below. ``close`` does not close it.
            manifest: the store's manifest.
            slots: a dictionary from the name of each zarr array to a number of slots, as ``slots_for`` returns it.
            device: the device.
            promotes: whether requested records are copied to the device. If not, only the source prefetches them.
            policy: the policy of eviction, a key of ``POLICIES``.
            arrange: brings a copied record into the byte order of the kernels (see ``Copies``).

        Raises:
            BudgetError: the device has not enough memory for the experts that one token uses in one block.
        """
        assert slots.keys() == manifest.layouts.keys()
        self.uses = NoUses()  # ``residents`` returns None
        self._source = source
        self._device = device
        self._manifest = manifest
        self._monitor = Monitor(self._repair)
        self._counters = TierCounters("device")
        self._copies = Copies(device, max(layout.record_bytes for layout in manifest.layouts.values()), arrange)
        with closed_on_error(self._copies):
            self._slots = DeviceSlots(device, manifest, slots, policy, self._counters)
        self._promotes = promotes
        self._promoter = Promoter(
            source,
            self._monitor,
            self._counters,
            promote=lambda lease: self._fill.promote(lease),
            make_room=self.shrink,
            yields=lambda: self._shrinking is not None or any(demand.lacks_records for demand in self._demands),
        )
        self._fill = DeviceFill(
            self._monitor, self._slots, self._copies, self._counters, self._promoter, self._check_open
        )
        self._demands: dict[DeviceDemand, None] = {}  # calls of ``acquire`` that have not ended
        self._shrinking: int | None = None  # id of the thread that shrinks the tier; ``acquire`` waits meanwhile
        self._requested: set[int] = set()  # blocks with prefetch requests that were passed on to the source
        self._is_closed = False

    def acquire(self, keys: Sequence[ExpertKey], of_total: int = 0) -> Generator[Lease[torch.Tensor], None, None]:
        """Yield leases as ``ExpertSource`` specifies. Their records are uint8 [record bytes] on the device.

        All records that are on the device are leased together (see ``Lease.more``). The caller must compute with them
        in the stream that is current when it takes the first of these leases. Raises MissingExpertError if the model
        lacks one of the experts.
        """
        if not keys:
            return
        block, distinct = keys[0].block, list(dict.fromkeys(keys))
        self._manifest.check_keys(block, distinct)
        demand = DeviceDemand(self._slots.pool(block), caller=threading.get_ident())
        try:
            hits, missing, was_requested = self._begin(demand, distinct, of_total)
            if hits:
                self._source.uses.note_copies(hits)
            if was_requested and not missing and not of_total:  # else the source's demand cancels the requests
                self._source.prefetch(block, ())
            yield from self._leases(demand)
            if missing:
                yield from self._bring(demand, missing, of_total)
        finally:
            self._end(demand)

    def residents(self, block: int) -> Residents | None:
        """Return None, because compiled code can't look records up in a device tier."""
        return None

    def release_leases(self) -> None:
        """End the calling thread's leases, as ``ExpertSource`` specifies."""
        self._end_caller(threading.get_ident())
        self._source.release_leases()

    @transition
    def _end_caller(self, caller: int) -> None:
        self._end_shrinking(caller)
        for demand in [demand for demand in self._demands if demand.caller == caller]:
            self._end_demand(demand)

    def prefetch(self, block: int, keys: Sequence[ExpertKey]) -> None:
        """Request prefetches as ``ExpertSource`` specifies.

        Records that the device lacks are requested from the source. If the tier promotes, they are then copied from the
        source to the device.
        """
        self._manifest.check_keys(block, keys)
        self._source.prefetch(block, self._request(block, dict.fromkeys(keys)))

    @transition
    def _request(self, block: int, keys: Collection[ExpertKey]) -> list[ExpertKey]:
        self._check_open()
        absent = [key for key in keys if self._slots.slot_of(key) is None]
        self._requested.add(block)
        if self._promotes:
            self._promoter.replace(block, keys, absent)
        return absent

    def absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        """Return the absent keys, as ``ExpertSource`` specifies.

        If the tier does not promote, return the keys that are absent from the source, because a prefetch then brings
        records only to the source.
        """
        if not self._promotes:
            return self._source.absent(keys)
        return self._absent(keys)

    @transition
    def _absent(self, keys: Sequence[ExpertKey]) -> list[ExpertKey]:
        return [key for key in keys if self._slots.pool(key.block).state_of(key) is not SlotState.READY]

    @transition
    def stats(self) -> TierStats:
        """Return the tier's counters, and the state of its slots."""
        return self._slots.stats()

    def shrink(self) -> int:
        """Evict all records, and go on with three quarters of the slots, because the device has no memory left.

        The calling thread must hold no lease. This method waits until no other thread holds a lease.

        Returns:
            The number of bytes that were freed; 0 if the tier can't be smaller.

        Raises:
            ClosedError: the tier was closed.
            BudgetError: the device no longer has enough memory for one token's experts in one block. The tier is then
                closed.
        """
        caller = threading.get_ident()
        try:
            if not self._begin_shrinking(caller):
                return 0
            self._wait_until_idle()
            before, after = self._use_fewer()
        finally:
            self._complete_shrinking(caller)
        _log.warning(_SHRUNK, after.slots, before.slots)
        return before.memory_bytes - after.memory_bytes

    def close(self) -> None:
        """Close the tier, as ``ExpertSource`` specifies. The source stays open, and leased records stay usable.

        Does nothing in a forked child, which can't use the device.
        """
        if not self._monitor.fork_guard.is_owner:
            return
        self._stop(threading.get_ident())
        try:
            self._end_copies()
        finally:
            self._promoter.close()
        self._slots.clear()  # not after an exception: copies to this memory may not have ended
        self._copies.close()

    # -- transitions --------------------------------------------------------------------------------------------------

    @transition
    def _stop(self, caller: int) -> None:
        self._is_closed = True
        self._promoter.stop()
        for demand in self._demands:
            if demand.caller == caller:  # an exception has interrupted this demand, as its thread is in ``close`` now
                self._fill.end(demand)
        self._monitor.wake()

    @waiting
    def _begin_shrinking(self, caller: int) -> bool | None:
        """Return whether the tier can be smaller; None while another thread shrinks it."""
        self._check_open()
        if self._shrinking is not None:
            return None
        if self._slots.fewer_counts == self._slots.counts:
            return False
        self._shrinking = caller
        return True

    @waiting
    def _end_copies(self) -> bool | None:
        if self._slots.is_filling:
            return None
        self._slots.wait_for_copies()
        return True

    @waiting
    def _wait_until_idle(self) -> bool | None:
        self._check_open()
        return None if self._demands or self._slots.is_filling else True

    @transition
    def _use_fewer(self) -> tuple[TierStats, TierStats]:
        """Replace the slots by fewer ones. Return the statistics of the tier before and after."""
        before = self._slots.stats()
        for key in self._slots.drop():
            self._promoter.outcomes.note_eviction(key)
        try:
            self._slots.use(self._slots.fewer_counts)
        except Exception:  # not KeyboardInterrupt, after which the next transition repairs the state
            self._is_closed = True
            self._promoter.stop()
            raise
        return before, self._slots.stats()

    @transition
    def _complete_shrinking(self, caller: int) -> None:
        self._end_shrinking(caller)

    def _end_shrinking(self, caller: int) -> None:
        if self._shrinking == caller:
            self._shrinking = None
            self._promoter.resume()
            self._monitor.wake()

    def _repair(self) -> None:
        if self._slots.is_dropped and not self._is_closed:  # an exception has interrupted ``shrink``
            try:
                self._slots.use(self._slots.counts)
            except MoetierError:  # no memory is left; all callers get ClosedError
                self._is_closed = True
        self._fill.repair(self._demands)
        self._promoter.repair(self._slots.slot_of)
        self._monitor.wake()

    # -- a caller -----------------------------------------------------------------------------------------------------

    @waiting
    def _begin(
        self, demand: DeviceDemand, keys: Sequence[ExpertKey], of_total: int
    ) -> tuple[list[ExpertKey], list[ExpertKey], bool] | None:
        """Begin a demand for distinct keys: pin the slots of those whose records are READY.

        Returns the keys whose records are READY, the other keys, and whether the block had prefetch requests. Waits
        while a thread shrinks the tier.
        """
        self._check_open()
        if self._shrinking is not None:
            return None
        block, hits, missing = keys[0].block, list[ExpertKey](), list[ExpertKey]()
        pool = self._slots.pool(block)
        demand.begin(pool, is_scan=pool.partitions.is_scan(block, max(len(keys), of_total)))
        self._demands[demand] = None
        if self._promotes:
            self._promoter.replace(block, (), ())
            for key in keys:
                self._promoter.outcomes.note_use(key)
        for key in keys:
            slot = pool.pin_ready(key)
            if slot is None:
                missing.append(key)
            else:
                demand.hold(slot)
                hits.append(key)
        pool.partitions.touch(reversed(hits), is_scan=demand.is_scan)  # the first key is evicted last
        if missing:
            demand.note_lacking()
        self._counters.count(hits=len(hits), misses=len(missing))
        was_requested = block in self._requested
        self._requested.discard(block)
        return hits, missing, was_requested

    def _bring(
        self, demand: DeviceDemand, missing: Sequence[ExpertKey], of_total: int
    ) -> Generator[Lease[torch.Tensor], None, None]:
        """Copy the records that the device lacks, as the source leases them, and yield leases of the copies."""
        with closing(self._source.acquire(missing, of_total)) as leases:
            began = time.perf_counter()
            for lease in leases:
                if not self._fill.copy_for(demand, lease, began, wait=not demand.ready):
                    yield from self._leases(demand)
                    self._fill.copy_for(demand, lease, time.perf_counter(), wait=True)
                # If the source already has the next record, lease this record only after the copy of the next is
                # queued, so that the copy runs during the computation.
                yield from self._leases(demand, behind=int(lease.more))
                began = time.perf_counter()

    def _leases(self, demand: DeviceDemand, behind: int = 0) -> Generator[Lease[torch.Tensor], None, None]:
        """Yield leases of all slots that are ready, except the last ``behind`` slots. The leases end together."""
        if len(demand.ready) > behind:
            stream = self._device.current_stream()
            for lease, copied in self._lease_together(demand, stream, len(demand.ready) - behind):
                self._check_open()
                stream.wait_event(copied)
                yield lease
            self._release(demand)

    @transition
    def _lease_together(
        self, demand: DeviceDemand, stream: DeviceStream, count: int
    ) -> list[tuple[Lease[torch.Tensor], StreamEvent]]:
        """Return leases of the first ``count`` slots that are ready, and the end of the copy into each."""
        self._check_open()
        pool, leases = demand.pool, list[tuple[Lease[torch.Tensor], StreamEvent]]()
        for left, slot in enumerate(demand.lease(count, stream), 1 - count):
            copied = pool.copied[slot]
            assert copied is not None
            leases.append((Lease(pool.key(slot), pool.records[slot], pool.number(slot), more=left < 0), copied))
        return leases

    @transition
    def _release(self, demand: DeviceDemand) -> None:
        self._end_leases(demand)

    def _end_leases(self, demand: DeviceDemand) -> None:
        if demand.leased is not None:
            slots, stream = demand.leased
            ended = stream.record_event()
            for slot in slots:
                demand.pool.used[slot][stream] = ended
            demand.release_leases()
            for slot in slots:
                demand.pool.unpin(slot)
            self._monitor.wake()

    @posted
    def _end(self, demand: DeviceDemand) -> None:
        self._end_demand(demand)

    def _end_demand(self, demand: DeviceDemand) -> None:
        """End a demand: release its leases and all of its slots."""
        self._end_leases(demand)
        while demand.ready:
            demand.pool.unpin(demand.ready.pop())
        self._fill.end(demand)
        self._demands.pop(demand, None)
        if demand.end():
            self._promoter.resume()
        self._monitor.wake()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("The device tier was closed.", "Load the model again.")
