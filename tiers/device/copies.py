"""Copy records from the host tier's memory to slots of the device, and page-lock that memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from moetier.tiers.layout import PoolSlot, RecordLayout
from moetier.tiers.source import Lease

from .device_pool import DevicePool
from .stream import Device, DeviceStream, Event
from .views import SlotViews

Arrange = Callable[[torch.Tensor, RecordLayout], None]


class PageLocks:
    """Page-locks host memory, so that copies from it are fast and asynchronous.

    The whole memory of the host tier is locked when a record is first copied from it. The caller must not unlock memory
    while a copy from this memory is in progress.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        # a dictionary from the id of a memory object to a tensor over all of that memory, which keeps the memory alive
        self._locked: dict[int, torch.Tensor] = {}
        self._retired: dict[int, torch.Tensor] = {}  # the same for memory that is still locked, but is to be unlocked
        self._pageable = False  # true once locking has failed

    @property
    def has_retired(self) -> bool:
        """True if memory that ``retire`` has marked is still locked."""
        return bool(self._retired)

    def lock(self, memory: Any) -> None:
        """Lock the pages of ``memory``. If the system refuses, warn, and lock nothing from then on."""
        if self._pageable or id(memory) in self._locked:
            return
        if id(memory) in self._retired:  # another record is copied from memory that the host tier has replaced
            self._locked[id(memory)] = self._retired.pop(id(memory))
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            whole = torch.frombuffer(memory, dtype=torch.uint8)
        if self._device.lock_pages(whole, read_only=memoryview(memory).readonly):
            self._locked[id(memory)] = whole
            return
        self._pageable = True
        warnings.warn(
            "The memory of the host tier can't be page-locked, so copies to the device will be slower.",
            RuntimeWarning,
            stacklevel=2,
        )

    def retire(self, memory: Any) -> None:
        """Mark memory that the host tier has replaced by other memory, so that ``unlock_retired`` unlocks it."""
        if (whole := self._locked.pop(id(memory), None)) is not None:
            self._retired[id(memory)] = whole

    def unlock_retired(self) -> None:
        """Unlock the memory that ``retire`` has marked. Copies from this memory must have ended."""
        self._unlock(self._retired)

    def unlock(self) -> None:
        """Unlock all memory that ``retire`` has not marked. Copies from this memory must have ended. Idempotent."""
        self._unlock(self._locked)

    def _unlock(self, locked: dict[int, torch.Tensor]) -> None:
        while locked:
            self._device.unlock_pages(locked.popitem()[1])


class Copy(NamedTuple):
    """A queued copy of a record into a slot."""

    ended: Event  # the end of the copy; from then on the host tier's record may be released
    ready: Event  # the end of all work that prepares the record; from then on it can be computed with
    uses: Mapping[DeviceStream, Event]  # from each stream that works on the slot after the copy to the end of that work


class Copies:
    """Queues copies of records to one device. Thread-safe, except for the attribute ``locks`` (see ``PageLocks``)."""

    def __init__(self, device: Device, arrange: Arrange | None = None) -> None:
        """Prepare copies to ``device``.

        ``arrange``, if given, is called with each copied record and its layout. It queues work on the current stream
        that brings the record into the byte order of the kernels, in place.
        """
        self._device = device
        self._arrange = arrange
        self.locks = PageLocks(device)
        self._views = SlotViews(self.locks.lock, self.locks.retire)

    def queue(self, lease: Lease[memoryview], pool: DevicePool, slot: PoolSlot) -> Copy | None:
        """Queue a copy of a leased record into a slot. The copy begins after all earlier uses of the slot.

        The slot must be LOADING, so that no other thread uses it. If the lease has a proof, this method waits for the
        end of the copy and then checks whether the lease is still valid, because another process may replace the record
        during the copy. Returns None if the lease is not valid.
        """
        copies, record = self._device.copy_stream(), pool.records[slot]
        for use in pool.used[slot].values():
            copies.wait_event(use)
        self._device.copy(record, self._views.of(lease))
        ended = copies.record_event()
        if lease.proof is not None:
            ended.synchronize()
        if not lease.validate():
            return None
        if self._arrange is None:
            return Copy(ended, ended, {})
        arranging = self._device.arranging_stream()
        arranging.wait_event(ended)
        try:
            self._device.run(arranging, partial(self._arrange, record, pool.layout))
        except BaseException:
            arranging.record_event().synchronize()  # wait for what was queued, since no event of the slot covers it
            raise
        ready = arranging.record_event()
        return Copy(ended, ready, {arranging: ready})

    def abandon(self, pool: DevicePool, slot: PoolSlot) -> Event:
        """Give up a copy into a slot, whether or not the copy was queued. Return an event after its end.

        Later copies into the slot will wait for this event.
        """
        for stream in (self._device.copy_stream(), *([self._device.arranging_stream()] if self._arrange else ())):
            pool.used[slot][stream] = stream.record_event()
        ended = pool.copied[slot] = pool.used[slot][self._device.copy_stream()]
        return ended

    def clear(self) -> None:
        """Drop the views of the host tier's memory. They would keep that memory alive."""
        self._views.clear()
