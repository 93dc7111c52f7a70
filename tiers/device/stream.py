"""Interface of a device for the device tier: memory, streams of work, and events that order the work.

There are two implementations: one for CUDA here, and a fake in the tests. The fake runs queued work as late as the
rules of streams and events permit, in any order that they permit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

_cuda: Any = torch.cuda  # Any, as half of its functions have no types
_PORTABLE, _READ_ONLY = 0x01, 0x08  # flags of cudaHostRegister: pinned for all devices; read-only


class Event(Protocol):
    """A point in a stream's queue of work."""

    def synchronize(self) -> None:
        """Wait until all work before the event is done."""


class Stream(Protocol):
    """A queue of work that the device does in order, while the caller goes on.

    Streams are hashable. Two objects are equal if they stand for the same stream.
    """

    def record_event(self) -> Event:
        """Return an event at the present end of the queue."""

    def wait_event(self, event: Event) -> None:
        """Make work that is queued from now on start after ``event``. The caller does not wait."""


class Device(Protocol):
    """A device. Thread-safe."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] on the device. Raises torch.OutOfMemoryError."""

    def current_stream(self) -> Stream:
        """Return the stream of the calling thread's computations."""

    def copy_stream(self) -> Stream:
        """Return the stream of copies to the device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy from the host on the copy stream.

        Both are uint8 [record bytes], and must stay as they are until the copy is done.
        """

    def arranging_stream(self) -> Stream:
        """Return the stream on which copied records are arranged (see ``Copies``) while others are copied."""

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """Call ``work``, which queues its computations on ``stream``."""

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Page-lock host memory, so that copies from it are fast and asynchronous. Return whether that succeeded.

        ``memory`` is uint8 [nbytes]. ``read_only`` tells whether it is mapped read-only.
        """

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Undo ``lock_pages`` of ``memory``, uint8 [nbytes]."""


class CudaDevice:
    """A CUDA device with two streams of its own: one copies records to it, the other arranges copied records."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Stream = _cuda.Stream(device)
        self._arranging: Stream = _cuda.Stream(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] on the device, uninitialised. Raises torch.OutOfMemoryError."""
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def current_stream(self) -> Stream:
        """Return torch's current stream of the calling thread on the device."""
        stream: Stream = _cuda.current_stream(self._device)
        return stream

    def copy_stream(self) -> Stream:
        """Return the stream for copies, which belongs to this object."""
        return self._copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of uint8 [record bytes]. It is asynchronous only if ``source`` is page-locked."""
        with _cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def arranging_stream(self) -> Stream:
        """Return the stream for arranging records, which belongs to this object."""
        return self._arranging

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """Call ``work`` with ``stream`` as torch's current stream."""
        with _cuda.stream(stream):
            work()

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Register host memory, uint8 [nbytes], with CUDA. Return whether that succeeded."""
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        if int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)) == 0:
            return True
        # CUDA keeps the error until it is read, which torch's binding can't do. Let this kernel raise it, not a later
        # one.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)
        return False

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Undo the registration of host memory, uint8 [nbytes]."""
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())
