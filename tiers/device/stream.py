"""Interface of a device to the device tier: memory, streams of work, and events that order it.

There are two implementations: CUDA's here, and a fake in the tests, which runs queued work as late as is legal, in any
legal order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch

_cuda: Any = torch.cuda  # half of its functions have no types
_PORTABLE, _READ_ONLY = 0x01, 0x08  # cudaHostRegister's flags: for every device; memory that is mapped read-only


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait until all work before the event is done."""


class Stream(Protocol):
    """A queue of work that is done in order, while the caller goes on. Hashable; equal if the same."""

    def record_event(self) -> Event:
        """Return the present end of the queue."""

    def wait_event(self, event: Event) -> None:
        """Have work that is queued from now on start after ``event``. The caller does not wait."""


class Device(Protocol):
    """A device. Thread-safe."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] on the device. Raises torch.OutOfMemoryError."""

    def current_stream(self) -> Stream:
        """The stream of the calling thread's computations."""

    def copy_stream(self) -> Stream:
        """The stream of copies into the device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy from the host on the copy stream.

        Both are uint8 [record bytes], and must stay as they are until the copy is done.
        """

    def arranging_stream(self) -> Stream:
        """The stream on which copied records are arranged, while others are copied."""

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """Call ``work``, which queues its computations on ``stream``."""

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Page-lock host memory, so that copies out of it are quick and asynchronous; return whether that succeeded.

        ``memory`` is uint8 [nbytes]; ``read_only``: whether it is mapped read-only.
        """

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Undo ``lock_pages`` of ``memory``, uint8 [nbytes]."""


class CudaDevice:
    """A CUDA device, with a stream of its own for copies and one for arranging them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Stream = _cuda.Stream(device)
        self._arranging: Stream = _cuda.Stream(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uint8 [nbytes] on the device, uninitialised. Raises torch.OutOfMemoryError."""
        with torch.inference_mode(False):  # one made in inference mode could not be written outside of it
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def current_stream(self) -> Stream:
        """The calling thread's current stream on the device, as torch has it."""
        stream: Stream = _cuda.current_stream(self._device)
        return stream

    def copy_stream(self) -> Stream:
        """This object's own stream for copies."""
        return self._copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy of uint8 [record bytes]; it is asynchronous only out of page-locked memory."""
        with _cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def arranging_stream(self) -> Stream:
        """This object's own stream for arranging records."""
        return self._arranging

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """Call ``work`` with ``stream`` as torch's current one."""
        with _cuda.stream(stream):
            work()

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Register host memory, uint8 [nbytes], with CUDA; return whether that succeeded."""
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        if int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)) == 0:
            return True
        # CUDA keeps the error until it is read, which torch's binding can't do: the next kernel would raise it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)
        return False

    def unlock_pages(self, memory: torch.Tensor) -> None:
        """Undo the registration of host memory, uint8 [nbytes]."""
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())
