"""The device tier's interface to a device: memory, streams of work, and events that order the work.

Each kind of device that computes models has an implementation (``runtime.devices``), and the tests have a simulated
device. It does queued work as late as the rules of streams and events permit, in any order that they permit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class StreamEvent(Protocol):
    """A point in a stream's queue of work."""

    def synchronize(self) -> None:
        """Wait until all work that was queued before the event is done."""


class DeviceStream(Protocol):
    """A queue of work, which the device does in order while the caller goes on.

    Streams are hashable. Two objects are equal if they refer to the same stream of the device.
    """

    def record_event(self) -> StreamEvent:
        """Add an event to the present end of the queue, and return the event."""

    def wait_event(self, event: StreamEvent) -> None:
        """Let work that is queued from now on begin only after ``event``. The caller does not wait."""


class StreamDevice(Protocol):
    """A device. Thread-safe."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return a tensor uint8 [nbytes] on the device. Raises torch.OutOfMemoryError if there is not enough memory."""

    def page_locked(self, nbytes: int) -> torch.Tensor:
        """Return page-locked memory of the host, uint8 [nbytes]. Raises RuntimeError if the system refuses it."""

    def current_stream(self) -> DeviceStream:
        """Return the stream on which the calling thread computes."""

    def copy_stream(self) -> DeviceStream:
        """Return the stream on which records are copied to the device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy from host memory ``source`` to device memory ``target`` on the copy stream.

        Both are uint8 [bytes of a piece]. They must stay unchanged until the copy has ended. The copy is asynchronous
        only if ``source`` is page-locked.
        """

    def arranging_stream(self) -> DeviceStream:
        """Return the stream on which copied records are arranged (see ``Copies``), while other records are copied."""

    def run(self, stream: DeviceStream, work: Callable[[], None]) -> None:
        """Call ``work`` so that it queues its computations on ``stream``."""
