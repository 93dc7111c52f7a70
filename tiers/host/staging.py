"""Staging buffers: beginnings of records, read ahead beside the slots, so that a wrong prediction evicts nothing.

A prefetch is read piece by piece into a buffer. If its demand comes first, what is there of the record is copied into
the slot that the demand has chosen, and the rest is read behind it: a wrong prediction has cost the demand nothing but
the piece that was being read. A record whose buffer is full, and that is still requested, goes on in a slot.

Part of the ledger: no I/O, and its owner's lock is held.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator

from moetier.tiers.errors import BudgetError
from moetier.tiers.layout import PAGE, ExpertKey
from moetier.tiers.manifest import Manifest

from .demands import Pool, StagingBuffer

BUFFERS = 2
LEAST_BYTES = 1 << 20  # of a record, if it has so many: copying them takes a tenth of a millisecond
SHARE = 16  # a buffer holds a sixteenth of a larger record
PIECES = 4  # at most, of a buffer
PIECE_SECONDS = 1e-3  # that the read of a piece takes at least: each costs turns of the GIL


def buffer_bytes(slot_bytes: int) -> int:
    """Return how many bytes of a record of ``slot_bytes`` are staged, in whole pages."""
    return min(slot_bytes, max(LEAST_BYTES, -(-slot_bytes // (SHARE * PAGE)) * PAGE))


def piece_bytes(slot_bytes: int, seconds: float | None) -> int:
    """Return how many bytes of a record are read at a time, so that a demand waits for no more.

    That is a quarter of a buffer, or what is read in PIECE_SECONDS. ``seconds``: that reading the whole record takes;
    None if it is not known.
    """
    least = -(-buffer_bytes(slot_bytes) // (PIECES * PAGE)) * PAGE
    if seconds is None:
        return least
    return min(max(least, int(slot_bytes * PIECE_SECONDS / seconds) // PAGE * PAGE), buffer_bytes(slot_bytes))


def staging_bytes(manifest: Manifest) -> int:
    """Return how many bytes a tier of the model's records may allocate beside its slots."""
    return BUFFERS * buffer_bytes(max(layout.slot_bytes for layout in manifest.layouts.values()))


class StagingBuffers:
    """The staging buffers of one tier, at most one for each record."""

    def __init__(self, largest: int) -> None:
        """Allocate buffers for slots of at most ``largest`` bytes; pages are taken when they are first read into.

        Raises BudgetError.
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
        self._free = [memoryview(memory) for memory in maps]
        self._staged: dict[ExpertKey, StagingBuffer] = {}
        self._ended: list[StagingBuffer] = []  # still being read into

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
        return bool(self._free)

    def begin(self, pool: Pool, key: ExpertKey) -> StagingBuffer:
        """Give a free buffer to a record of ``pool``."""
        buffer = self._free.pop()[: buffer_bytes(pool.slot_bytes)]
        step = piece_bytes(pool.slot_bytes, pool.read_seconds)
        staged = self._staged[key] = StagingBuffer(pool, key, buffer, step)
        return staged

    def claim(self, key: ExpertKey) -> StagingBuffer | None:
        """Return the record's buffer, if there is one, for the load that reads the rest and then ends it."""
        staged = self._staged.get(key)
        if staged is not None:
            staged.is_claimed = True
        return staged

    def discard(self, is_requested: Callable[[ExpertKey], bool]) -> bool:
        """End the oldest buffer whose record is not requested any more. Return whether there was one."""
        for staged in self._staged.values():
            if staged.is_idle and not is_requested(staged.key):
                self.end(staged)
                return True
        return False

    def end(self, staged: StagingBuffer) -> None:
        """Free the buffer, as soon as nothing is being read into it."""
        if staged.is_reading:
            self._ended.append(staged)
            del self._staged[staged.key]
        else:
            del self._staged[staged.key]
            self._release(staged)

    def end_piece(self, staged: StagingBuffer, seconds: float, error: BaseException | None = None) -> None:
        """Note that the read of a piece has ended after so many seconds, with ``error`` if it failed."""
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
        """Repair after a step that was cut: loads have claimed just these, and a buffer that nothing uses is free."""
        for staged in list(self._staged.values()):
            if staged in self._ended:
                del self._staged[staged.key]
            elif staged.is_claimed and staged not in claimed:
                self.end(staged)
        used = [staged.buffer.obj for staged in (*self._staged.values(), *self._ended)]
        self._free[:] = [memoryview(memory) for memory in self._maps if not any(memory is other for other in used)]

    def close(self) -> None:
        """Free all memory; nothing is being read any more."""
        self._staged.clear()
        self._free.clear()
        self._maps.clear()

    def _release(self, staged: StagingBuffer) -> None:
        whole = staged.buffer.obj
        assert isinstance(whole, mmap.mmap)
        self._free.append(memoryview(whole))
        staged.buffer.release()
