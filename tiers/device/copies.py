"""Copies of the host's records into the device's slots: queued, and waited for where one has to be proved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from moetier.tiers.layout import RecordLayout
from moetier.tiers.source import Lease

from .page_locks import PageLocks
from .pool import DevicePool
from .stream import Device, Event, Stream
from .views import SlotViews

Arrange = Callable[[torch.Tensor, RecordLayout], None]


class Copy(NamedTuple):
    """One that has been queued."""

    ended: Event  # the host's record may go
    ready: Event  # the slot may be computed on
    uses: Mapping[Stream, Event]  # of the slot, behind the copy itself: who refills it waits for them


class Copies:
    """Into one device. Thread-safe, but for what ``locks`` says."""

    def __init__(self, device: Device, arrange: Arrange | None = None) -> None:
        """``arrange`` queues, on the current stream, what turns a record into what is computed with, in place."""
        self._device = device
        self._arrange = arrange
        self.locks = PageLocks(device)
        self._views = SlotViews(self.locks.lock, self.locks.retire)

    def queue(self, lease: Lease[memoryview], pool: DevicePool, slot: int) -> Copy | None:
        """Behind all uses of the slot, which is LOADING: nobody else touches it. None if the lease did not hold so
        long. One that has to be proved costs a wait for its copy: nobody may compute on what is not proved."""
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
            arranging.record_event().synchronize()  # nobody else would wait for what was queued
            raise
        ready = arranging.record_event()
        return Copy(ended, ready, {arranging: ready})

    def abandon(self, pool: DevicePool, slot: int) -> Event:
        """For a slot whose copy may have been queued, or not. Refilling it waits for what was; returns the end of the
        copy."""
        for stream in (self._device.copy_stream(), *([self._device.arranging_stream()] if self._arrange else ())):
            pool.used[slot][stream] = stream.record_event()
        ended = pool.copied[slot] = pool.used[slot][self._device.copy_stream()]
        return ended

    def clear(self) -> None:
        """The host's memory is let go of."""
        self._views.clear()
