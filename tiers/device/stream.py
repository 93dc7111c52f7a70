"""The device tier's interface to a device: memory, streams of work, and events that order the work.

There are two implementations: CudaDevice in this module, and a simulated device in the tests. The simulated device does
queued work as late as the rules of streams and events permit, in any order that they permit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

_cuda: Any = torch.cuda  # typed as Any, because half of its functions have no types
_PORTABLE, _READ_ONLY = 0x01, 0x08  # flags of cudaHostRegister: pinned for all devices; read-only


class Event(Protocol):
    """A point in a stream's queue of work."""

    def synchronize(self) -> None:
        """Wait until all work that was queued before the event is done."""


class DeviceStream(Protocol):
    """A queue of work, which the device does in order while the caller goes on.

    Streams are hashable. Two objects are equal if they refer to the same stream of the device.
    """

    def record_event(self) -> Event:
        """Add an event to the present end of the queue, and return the event."""

    def wait_event(self, event: Event) -> None:
        """Let work that is queued from now on begin only after ``event``. The caller does not wait."""


class Device(Protocol):
    """A device. Thread-safe."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return a tensor uint8 [nbytes] on the device. Raises torch.OutOfMemoryError if there is not enough memory."""

    def current_stream(self) -> DeviceStream:
        """Return the stream on which the calling thread computes."""

    def copy_stream(self) -> DeviceStream:
        """Return the stream on which records are copied to the device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy from host memory ``source`` to device memory ``target`` on the copy stream.

        Both are uint8 [record bytes]. They must stay unchanged until the copy has ended.
        """

    def arranging_stream(self) -> DeviceStream:
        """Return the stream on which copied records are arranged (see ``Copies``), while other records are copied."""

    def run(self, stream: DeviceStream, work: Callable[[], None]) -> None:
        """Call ``work`` so that it queues its computations on ``stream``."""

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Page-lock host memory, so that copies from it are fast and asynchronous. Return whether this succeeded.

        ``memory`` is uint8 [nbytes]. ``read_only`` is true if the memory is mapped read-only.
        """

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Unlock host memory, uint8 [nbytes], that ``lock_pages`` has locked."""


class CudaDevice:
    """A CUDA device, with a stream for copies of records and a stream for arranging copied records."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: DeviceStream = _cuda.Stream(device)
        self._arranging: DeviceStream = _cuda.Stream(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return an uninitialised tensor uint8 [nbytes] on the device.

        Raises torch.OutOfMemoryError if there is not enough memory.
        """
        with torch.inference_mode(False):  # a tensor made in inference mode can't be changed outside of that mode
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def current_stream(self) -> DeviceStream:
        """Return the calling thread's current stream in torch."""
        stream: DeviceStream = _cuda.current_stream(self._device)
        return stream

    def copy_stream(self) -> DeviceStream:
        """Return this object's stream for copies."""
        return self._copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of uint8 [record bytes]. The copy is asynchronous only if ``source`` is page-locked."""
        with _cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def arranging_stream(self) -> DeviceStream:
        """Return this object's stream for arranging records."""
        return self._arranging

    def run(self, stream: DeviceStream, work: Callable[[], None]) -> None:
        """Call ``work`` with ``stream`` as torch's current stream."""
        with _cuda.stream(stream):
            work()

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Register host memory, uint8 [nbytes], with CUDA. Return whether this succeeded."""
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        if int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)) == 0:
            return True
        # CUDA keeps the error until it is read, and torch has no function for that. Run a kernel that raises the error
        # here, so that no later kernel does.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)
        return False

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Unregister host memory, uint8 [nbytes], that ``lock_pages`` has registered."""
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())
