"""Staging buffers, into which prefetches read the beginnings of records, so that a wrong prediction evicts nothing.

A prefetch reads a record piece by piece into a buffer. If a demand for the record comes, it chooses a slot; what the
buffer holds is copied into the slot and the rest is read after it. So a wrong prediction costs other demands at most
the time of one piece. If the buffer is full and the record is still requested, it gets a slot and the rest is read into
it.

This is a part of the ledger: callers hold the tier's lock, and there is no I/O here.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Collection, Iterator

from moetier.tiers.errors import BudgetError
from moetier.tiers.layout import PAGE, ExpertKey
from moetier.tiers.manifest import Manifest

BUFFERS = 2  # number of buffers of a tier
LEAST_BYTES = 1 << 20  # smallest part of a record that is staged, if it has that many bytes; a copy takes about 0.1 ms
SHARE = 16  # a sixteenth of a record is staged, if that is more
PIECES = 4  # largest number of pieces of a buffer
PIECE_SECONDS = 1e-3  # shortest duration of the read of a piece, as each piece takes the GIL several times


def buffer_bytes(slot_bytes: int) -> int:
    """Return how many bytes of a record of ``slot_bytes`` are staged, in whole pages."""
    return min(slot_bytes, max(LEAST_BYTES, -(-slot_bytes // (SHARE * PAGE)) * PAGE))


def piece_bytes(slot_bytes: int, seconds: float | None) -> int:
    """Return the size of a piece in bytes. A demand waits for at most one piece of a prefetch.

    A piece is a quarter of a buffer, or as much as is read in PIECE_SECONDS if that is more. ``seconds`` is the
    duration of the read of a whole record; None if it is not known.
    """
    least = -(-buffer_bytes(slot_bytes) // (PIECES * PAGE)) * PAGE
    if seconds is None:
        return least
    return min(max(least, int(slot_bytes * PIECE_SECONDS / seconds) // PAGE * PAGE), buffer_bytes(slot_bytes))


def staging_bytes(manifest: Manifest) -> int:
    """Return how many bytes a host tier for this store allocates for staging buffers, at most."""
    return BUFFERS * buffer_bytes(max(layout.slot_bytes for layout in manifest.layouts.values()))


class StagingBuffer:
    """A buffer for the first bytes of a record, which is read piece by piece before the record has a slot."""

    def __init__(self, key: ExpertKey, buffer: memoryview, step: int) -> None:
        self.key = key
        self.buffer = buffer
        self.step = step  # size of a piece, in bytes
        self.filled = 0  # number of bytes that have been read
        self.end = 0  # end of the piece that is being read, in bytes; equal to ``filled`` if none is
        self.seconds = 0.0  # duration of all reads of pieces so far
        self.began = 0.0  # begin of the latest read of a piece, by the ledger's clock
        self.error: BaseException | None = None  # the error of a failed read
        self.is_claimed = False  # whether a load uses the buffer and reads the rest of the record
        self.piece_read = threading.Event()  # cleared while a piece is being read
        self.piece_read.set()

    @property
    def is_reading(self) -> bool:
        """True if a piece is being read into the buffer."""
        return self.end > self.filled

    @property
    def is_full(self) -> bool:
        """True if all of the buffer is filled."""
        return self.filled == len(self.buffer)

    @property
    def is_idle(self) -> bool:
        """True if no load has claimed the buffer and no piece is being read into it."""
        return not (self.is_claimed or self.is_reading)

    def begin_piece(self, now: float) -> StagingBuffer:
        """Note that the next piece is about to be read. Return this object."""
        self.piece_read.clear()
        self.end = min(self.filled + self.step, len(self.buffer))
        self.began = now
        return self


class StagingBuffers:
    """The staging buffers of one tier. A record has at most one."""

    def __init__(self, largest: int) -> None:
        """Allocate buffers for slots of at most ``largest`` bytes. Their pages take memory only once they are used.

        Raises BudgetError if the system does not give that much memory.
        """
        size = buffer_bytes(largest)
        try:
            maps = [mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(BUFFERS)]
        except OSError as error:
            raise BudgetError(
                f"The system does not give {BUFFERS * size:,} bytes beside the slots ({error.strerror}).",
                "Give the host tier less memory, or free some.",
            ) from error
        self._maps = maps
        self._unused = [memoryview(memory) for memory in maps]
        self._staged: dict[ExpertKey, StagingBuffer] = {}
        self._ended: list[StagingBuffer] = []  # buffers to be freed when the read into them ends

    def __iter__(self) -> Iterator[StagingBuffer]:
        return iter(self._staged.values())

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._staged

    @property
    def reading(self) -> int:
        """Number of pieces being read."""
        return sum([staged.end > staged.filled for staged in self._staged.values()]) + len(self._ended)

    @property
    def has_room(self) -> bool:
        """True if a buffer is free."""
        return bool(self._unused)

    def assign(self, key: ExpertKey, slot_bytes: int, read_seconds: float | None) -> StagingBuffer:
        """Give a free buffer to a record. ``slot_bytes`` and ``read_seconds`` are those of its pool."""
        buffer = self._unused.pop()[: buffer_bytes(slot_bytes)]
        staged = self._staged[key] = StagingBuffer(key, buffer, piece_bytes(slot_bytes, read_seconds))
        return staged

    def claim(self, key: ExpertKey) -> StagingBuffer | None:
        """Claim the record's buffer, if there is one, for a load that reads the rest of the record. Return the buffer.

        The load has to ``free`` the buffer.
        """
        staged = self._staged.get(key)
        if staged is not None:
            staged.is_claimed = True
        return staged

    def discard(self, is_requested: Callable[[ExpertKey], bool]) -> bool:
        """Free the oldest idle buffer whose record is no longer requested. Return whether there was one."""
        for staged in self._staged.values():
            if staged.is_idle and not is_requested(staged.key):
                self.free(staged)
                return True
        return False

    def free(self, staged: StagingBuffer) -> None:
        """Free the buffer, now or when the read into it ends."""
        if staged.is_reading:
            self._ended.append(staged)
            del self._staged[staged.key]
        else:
            del self._staged[staged.key]
            self._release(staged)

    def end_piece(self, staged: StagingBuffer, seconds: float, error: BaseException | None = None) -> None:
        """Note that the read of a piece, which took ``seconds``, has ended. ``error`` is its error if it failed."""
        staged.seconds += seconds
        if error is None:
            staged.filled = staged.end
        else:
            staged.end, staged.error = staged.filled, error
        staged.piece_read.set()
        if staged in self._ended:
            self._ended.remove(staged)
            self._release(staged)

    def repair(self, claimed: Collection[StagingBuffer]) -> None:
        """Make the state consistent after an interrupted step. ``claimed`` are the buffers that loads use."""
        for staged in list(self._staged.values()):
            if staged in self._ended:
                del self._staged[staged.key]
            elif staged.is_claimed and staged not in claimed:
                self.free(staged)
        used = [staged.buffer.obj for staged in (*self._staged.values(), *self._ended)]
        self._unused[:] = [memoryview(memory) for memory in self._maps if not any(memory is other for other in used)]

    def close(self) -> None:
        """Free all memory. No read may be in progress."""
        self._staged.clear()
        self._unused.clear()
        self._maps.clear()

    def _release(self, staged: StagingBuffer) -> None:
        whole = staged.buffer.obj
        assert isinstance(whole, mmap.mmap)
        self._unused.append(memoryview(whole))
        staged.buffer.release()
