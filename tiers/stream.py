"""What the device tier needs of a device: memory, a queue of copies, and events to keep two orders by.

The protocol has two implementations: CUDA's here, and a fake in the tests, which runs what is queued as late as is
legal, in any order that is.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch

_cuda: Any = torch.cuda  # half of its functions have no types


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

    def lock_pages(self, memory: torch.Tensor) -> bool:
        """Page-locks host memory, so that copies out of it are quick and don't hold up the caller; whether it did."""
        ...

    def unlock_pages(self, memory: torch.Tensor) -> None: ...


class CudaDevice:
    """A CUDA device, with a stream of its own for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: Stream = _cuda.Stream(device)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def current_stream(self) -> Stream:
        stream: Stream = _cuda.current_stream(self._device)
        return stream

    def copy_stream(self) -> Stream:
        return self._copies

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with _cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def lock_pages(self, memory: torch.Tensor) -> bool:
        portable = 1  # cudaHostRegisterPortable: for every device
        if int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable)) == 0:
            return True
        # The error stays with CUDA until somebody asks, and torch's binding can't: the next kernel would raise it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)
        return False

    def unlock_pages(self, memory: torch.Tensor) -> None:
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())
