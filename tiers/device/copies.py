"""Copy records from the host tier's memory to slots of the device, and page-lock that memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from moetier.tiers.layout import RecordLayout
from moetier.tiers.source import Lease

from .device_pool import DevicePool
from .stream import Device, Event, Stream
from .views import SlotViews

Arrange = Callable[[torch.Tensor, RecordLayout], None]


class PageLocks:
    """Page locks of host memory, so that copies from it are fast and asynchronous.

    The host tier's whole memory is locked when a record is first copied from it. The caller must not unlock memory
    while a copy from it is in progress.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._locked: dict[int, torch.Tensor] = {}  # by id of the memory: a tensor over all of it, which keeps it alive
        self._retired: dict[int, torch.Tensor] = {}  # locked memory that the host has replaced; to be unlocked
        self._pageable = False  # True once locking has failed

    @property
    def has_retired(self) -> bool:
        """True if memory that the host has replaced is still locked."""
        return bool(self._retired)

    def lock(self, memory: Any) -> None:
        """Lock the pages of ``memory``. Warn, once, if the system refuses."""
        if self._pageable or id(memory) in self._locked:
            return
        if id(memory) in self._retired:  # a record is copied from the replaced memory once more
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
            "The system does not page-lock the host tier: copies to the device will be slower.",
            RuntimeWarning,
            stacklevel=2,
        )

    def retire(self, memory: Any) -> None:
        """Mark memory that the host has replaced. ``unlock_retired`` unlocks it once copies from it have ended."""
        if (whole := self._locked.pop(id(memory), None)) is not None:
            self._retired[id(memory)] = whole

    def unlock_retired(self) -> None:
        """Unlock the memory that ``retire`` has marked."""
        self._unlock(self._retired)

    def unlock(self) -> None:
        """Unlock all memory that ``retire`` has not marked. Idempotent."""
        self._unlock(self._locked)

    def _unlock(self, locked: dict[int, torch.Tensor]) -> None:
        while locked:
            self._device.unlock_pages(locked.popitem()[1])


class Copy(NamedTuple):
    """A copy that has been queued."""

    ended: Event  # the copy has ended, so the host's record may be released
    ready: Event  # the record in the slot may be computed on
    uses: Mapping[Stream, Event]  # end of later work on the slot, by stream; a refill of the slot waits for it


class Copies:
    """Queues copies of records to one device. Thread-safe, except for ``locks`` (see ``PageLocks``)."""

    def __init__(self, device: Device, arrange: Arrange | None = None) -> None:
        """Prepare copies to ``device``.

        ``arrange`` queues work on the current stream that brings a copied record into the byte order of the kernels, in
        place. None: records are computed on as they are.
        """
        self._device = device
        self._arrange = arrange
        self.locks = PageLocks(device)
        self._views = SlotViews(self.locks.lock, self.locks.retire)

    def queue(self, lease: Lease[memoryview], pool: DevicePool, slot: int) -> Copy | None:
        """Queue a copy of the leased record into a slot, to run after all earlier uses of the slot.

        The slot is LOADING, so no other thread touches it. If the lease has a proof, this method waits for the copy to
        end and then checks that the lease holds, as another process may replace the record while it is copied. Returns
        None if the lease does not hold.
        """
        copies, record = self._device.copy_stream(), pool.records[slot]
        for use in pool.used[slot].values():
            copies.wait_event(use)
        self._device.copy(record, self._views.of(lease))
        ended = copies.record_event()
        if lease.proof is not None:
            ended.synchronize()
        if not lease.holds():
            return None
        if self._arrange is None:
            return Copy(ended, ended, {})
        arranging = self._device.arranging_stream()
        arranging.wait_event(ended)
        try:
            self._device.run(arranging, partial(self._arrange, record, pool.layout))
        except BaseException:
            arranging.record_event().synchronize()  # wait here, as no later event covers what was queued
            raise
        ready = arranging.record_event()
        return Copy(ended, ready, {arranging: ready})

    def abandon(self, pool: DevicePool, slot: int) -> Event:
        """Give up a copy that may or may not have been queued: make refills of the slot wait for it.

        Returns the end of the copy.
        """
        for stream in (self._device.copy_stream(), *([self._device.arranging_stream()] if self._arrange else ())):
            pool.used[slot][stream] = stream.record_event()
        ended = pool.copied[slot] = pool.used[slot][self._device.copy_stream()]
        return ended

    def clear(self) -> None:
        """Drop the views of the host's memory, which keep it alive."""
        self._views.clear()
