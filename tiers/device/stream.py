"""What the device tier needs of a device: memory, a queue of copies, and events to keep orders by.

The protocol has two implementations: CUDA's here, and a fake in the tests, which runs what is queued as late as is
legal, in any order that is.
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
        """Waits until everything before it is done."""
        ...


class Stream(Protocol):
    """Work that is done in the order in which it is queued, while the caller goes on. Hashable; equal if the same."""

    def record_event(self) -> Event:
        """The present end of what is queued."""
        ...

    def wait_event(self, event: Event) -> None:
        """What is queued from now on starts after ``event``; the caller does not wait."""
        ...


class Device(Protocol):
    """Thread-safe."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 on the device. Raises torch.OutOfMemoryError."""
        ...

    def current_stream(self) -> Stream:
        """Where the calling thread's computations are queued."""
        ...

    def copy_stream(self) -> Stream:
        """Where copies into the device are queued."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy from the host on the copy stream. Both must stay as they are until it is done."""
        ...

    def arranging_stream(self) -> Stream:
        """Where records that have been copied are made ready, beside the copies of others."""
        ...

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        """Has ``work`` queue its computations on a stream of this device."""
        ...

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        """Page-locks host memory, so that copies out of it are quick and don't hold up the caller; whether it did.
        ``read_only``: it is mapped so."""
        ...

    def unlock_pages(self, memory: torch.Tensor) -> None: ...


class CudaDevice:
    """A CUDA device, with streams of its own for copies and for what is done with them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Stream = _cuda.Stream(device)
        self._arranging: Stream = _cuda.Stream(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        with torch.inference_mode(False):  # one made in inference mode could not be written outside of it
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def current_stream(self) -> Stream:
        stream: Stream = _cuda.current_stream(self._device)
        return stream

    def copy_stream(self) -> Stream:
        return self._copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with _cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def arranging_stream(self) -> Stream:
        return self._arranging

    def run(self, stream: Stream, work: Callable[[], None]) -> None:
        with _cuda.stream(stream):
            work()

    def lock_pages(self, memory: torch.Tensor, *, read_only: bool) -> bool:
        flags = _PORTABLE | (_READ_ONLY if read_only else 0)
        if int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, flags)) == 0:
            return True
        # The error stays with CUDA until somebody asks, and torch's binding can't: the next kernel would raise it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)
        return False

    def unlock_pages(self, memory: torch.Tensor) -> None:
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())
