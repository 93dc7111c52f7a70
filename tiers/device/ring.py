"""A ring of page-locked buffers, through which records go from the host tier's memory to the device.

Only copies from page-locked memory are asynchronous. The memory of the host tier itself is not page-locked: that of a
daemon is mapped read-only, which most drivers refuse to lock, and locking all of it takes long.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from moetier.tiers.closeable import Closeable

from .stream import StreamDevice, StreamEvent

BUFFERS = 4
PIECE_BYTES = 4 << 20  # most bytes of a record that a buffer takes; larger records are copied piece by piece


@dataclass(slots=True)
class _Buffer:
    memory: torch.Tensor  # uint8 [size of a buffer], on the host
    copied: StreamEvent | None = None  # the end of the latest copy from the buffer


class Ring(Closeable):
    """Buffers that are filled in turn. Each is filled again after its latest copy has ended.

    One thread at a time may use the ring: the one that fills a LOADING slot (see ``DeviceFill``).
    """

    def __init__(self, device: StreamDevice, record_bytes: int) -> None:
        """Allocate the buffers. If their pages can't be locked, warn, and use buffers of ordinary memory.

        ``record_bytes`` is the size of the largest record.
        """
        self._device = device
        self._next = 0  # number of the buffer that is filled next
        size = min(record_bytes, PIECE_BYTES)
        try:
            self._buffers = [_Buffer(device.page_locked(size)) for _ in range(BUFFERS)]
        except RuntimeError as error:
            warnings.warn(
                f"No memory can be page-locked, so copies to the device will be slower: {error}",
                RuntimeWarning,
                stacklevel=4,
            )
            with torch.inference_mode(False):
                self._buffers = [_Buffer(torch.empty(size, dtype=torch.uint8)) for _ in range(BUFFERS)]

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> StreamEvent:
        """Queue a copy on the copy stream, and return the event of its end. ``source`` is read before this returns.

        Args:
            source: uint8 [record bytes] on the host.
            target: uint8 [record bytes] on the device.
        """
        size, stream = len(self._buffers[0].memory), self._device.copy_stream()
        for start in range(0, len(source), size):
            piece = source[start : start + size]
            buffer = self._buffers[self._next]
            self._next = (self._next + 1) % BUFFERS
            if buffer.copied is not None:
                buffer.copied.synchronize()
            filled = buffer.memory[: len(piece)].copy_(piece)
            self._device.copy(target[start : start + size], filled)
            copied = buffer.copied = stream.record_event()
        return copied

    def abort(self, ended: StreamEvent) -> None:
        """Let no buffer be filled before ``ended``: an exception may have cut a copy off before its own event."""
        for buffer in self._buffers:
            buffer.copied = ended

    def close(self) -> None:
        """Release the buffers. All copies have ended."""
        self._buffers.clear()
