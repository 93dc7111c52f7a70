"""Queue copies of records from the host tier's memory to slots of the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from moetier.tiers.closeable import Closeable
from moetier.tiers.layout import PoolSlot, RecordLayout
from moetier.tiers.source import Lease

from .device_pool import DevicePool
from .ring import Ring
from .stream import DeviceStream, StreamDevice, StreamEvent
from .views import SlotViews

Arrange = Callable[[torch.Tensor, RecordLayout], None]


class QueuedCopy(NamedTuple):
    """The events of a copy of a record into a slot, which was queued on a stream."""

    ended: StreamEvent  # the end of the copy
    ready: StreamEvent  # the end of all work that prepares the record; from then on it can be computed with
    uses: Mapping[DeviceStream, StreamEvent]  # the end of the work on the slot after the copy, by its stream


class Copies(Closeable):
    """Queues copies of records to one device. One thread at a time: the one that fills a LOADING slot."""

    def __init__(self, device: StreamDevice, record_bytes: int, arrange: Arrange | None = None) -> None:
        """Prepare copies to ``device``.

        Args:
            device: the device.
            record_bytes: size of the largest record.
            arrange: called with each copied record and its layout. It queues work on the current stream that brings
                the record into the byte order of the kernels, in place. None: records are used as they are.
        """
        self._device = device
        self._arrange = arrange
        self._ring = Ring(device, record_bytes)
        self._views = SlotViews()

    def queue(self, lease: Lease[memoryview], pool: DevicePool, slot: PoolSlot) -> QueuedCopy | None:
        """Queue a copy of a leased record into a LOADING slot. The copy begins after all earlier uses of the slot.

        The lease may end as soon as this returns. The caller then calls ``complete``. Returns None if the lease is not
        valid any more, because another process has replaced the record; then, and after an exception, the caller
        calls ``abort``.
        """
        copies, record = self._device.copy_stream(), pool.records[slot]
        for use in pool.used[slot].values():
            copies.wait_event(use)
        ended = self._ring.copy(self._views.of(lease), record)
        if not lease.validate():
            return None
        if self._arrange is None:
            return QueuedCopy(ended, ended, {})
        arranging = self._device.arranging_stream()
        arranging.wait_event(ended)
        self._device.run(arranging, partial(self._arrange, record, pool.layout))
        ready = arranging.record_event()
        return QueuedCopy(ended, ready, {arranging: ready})

    def complete(self, copy: QueuedCopy, pool: DevicePool, slot: PoolSlot) -> None:
        """Let computations on a slot wait for its queued copy, and later copies for what works on the slot now."""
        pool.copied[slot] = copy.ready
        pool.used[slot] = dict(copy.uses)

    def abort(self, pool: DevicePool, slot: PoolSlot) -> None:
        """Give up a copy into a slot, whether or not the copy was queued. Later copies into the slot come after it."""
        for stream in (self._device.copy_stream(), *([self._device.arranging_stream()] if self._arrange else ())):
            pool.used[slot][stream] = stream.record_event()
        ended = pool.copied[slot] = pool.used[slot][self._device.copy_stream()]
        self._ring.abort(ended)

    def close(self) -> None:
        """Release the buffers, and the views, which keep the host tier's memory alive. All copies have ended."""
        self._ring.close()
        self._views.clear()
