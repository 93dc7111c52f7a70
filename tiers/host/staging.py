"""Heads: beginnings of records, read for wishes beside the slots, so that a guess evicts nothing until it is sure.

A wish is read piece by piece into a buffer. Where its demand comes first, what is there of the record is copied into
the slot that the demand has chosen, and the rest is read behind it: a wrong guess has cost the demand nothing but the
piece that was under way. A head that is full, and still wished for, goes on in a slot.

Part of the ledger: no I/O, and its owner's lock is held.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

from moetier.tiers.errors import BudgetError
from moetier.tiers.layout import PAGE, ExpertKey
from moetier.tiers.manifest import Manifest

Place = TypeVar("Place")  # where its record goes on, and whose bytes it is of

HEADS = 2  # at a time
LEAST_BYTES = 1 << 20  # of a record, if it has so many: a copy of no more takes a tenth of a millisecond
SHARE = 16  # a head is a sixteenth of a larger record
PIECES = 4  # of a head, at most
PIECE_SECONDS = 1e-3  # at least: each costs turns of Python's lock
QUICK_SECONDS = 2e-3  # what is read sooner has no head


def head_bytes(slot_bytes: int) -> int:
    """Of each record of so many bytes, in whole pages."""
    return min(slot_bytes, max(LEAST_BYTES, -(-slot_bytes // (SHARE * PAGE)) * PAGE))


def piece_bytes(slot_bytes: int, seconds: float | None) -> int:
    """That are read at a time of a record whose read takes so many seconds, if that is known: a quarter of a head, or
    what takes PIECE_SECONDS. A demand waits for no more."""
    least = -(-head_bytes(slot_bytes) // (PIECES * PAGE)) * PAGE
    if seconds is None:
        return least
    return min(max(least, int(slot_bytes * PIECE_SECONDS / seconds) // PAGE * PAGE), head_bytes(slot_bytes))


def heads_bytes(manifest: Manifest) -> int:
    """That a tier of the model's records may allocate beside its slots."""
    return HEADS * head_bytes(max(layout.slot_bytes for layout in manifest.layouts.values()))


class Head(Generic[Place]):
    """The first ``filled`` bytes of a record."""

    __slots__ = (
        "began",
        "buffer",
        "end",
        "error",
        "filled",
        "is_claimed",
        "key",
        "place",
        "seconds",
        "step",
        "waiter",
    )

    def __init__(self, place: Place, key: ExpertKey, buffer: memoryview, step: int) -> None:
        self.place = place
        self.key = key
        self.buffer = buffer
        self.step = step  # bytes of a piece
        self.filled = 0
        self.end = 0  # of the piece that is being read; else as ``filled``
        self.seconds = 0.0  # that reading it has taken
        self.began = 0.0  # the latest piece, by the ledger's clock
        self.error: BaseException | None = None
        self.is_claimed = False  # by a load, which reads the rest
        self.waiter: Callable[[], None] | None = None  # is told when the piece is there, or won't come

    @property
    def is_reading(self) -> bool:
        return self.end > self.filled

    @property
    def is_full(self) -> bool:
        return self.filled == len(self.buffer)

    @property
    def may_grow(self) -> bool:
        return not (self.is_claimed or self.is_reading or self.is_full)

    def grow(self, now: float) -> None:
        """By a piece that is about to be read."""
        self.end = min(self.filled + self.step, len(self.buffer))
        self.began = now

    def tell(self, waiter: Callable[[], None]) -> None:
        """Call ``waiter`` when the piece that is being read is there, or won't come; at once if there is none."""
        if self.is_reading:
            self.waiter = waiter
        else:
            waiter()

    @property
    def is_idle(self) -> bool:
        return not (self.is_claimed or self.is_reading)


class Heads(Generic[Place]):
    """Of one tier."""

    def __init__(self, largest: int) -> None:
        """``largest``: bytes of a slot. Pages are taken when they are first read into. Raises BudgetError."""
        size = head_bytes(largest)
        try:
            buffers = [mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(HEADS)]
        except OSError as error:
            raise BudgetError(
                f"The system does not give {HEADS * size:,} bytes beside the slots ({error.strerror}).",
                "Give the host tier less memory, or free some.",
            ) from error
        self._buffers = buffers
        self._free = [memoryview(buffer) for buffer in buffers]
        self._heads: dict[ExpertKey, Head[Place]] = {}
        self._ended: list[Head[Place]] = []  # that are read into still

    def __len__(self) -> int:
        return len(self._heads)

    def __iter__(self) -> Iterator[Head[Place]]:
        return iter(self._heads.values())

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._heads

    @property
    def reading(self) -> int:
        """How many pieces are being read."""
        return sum([head.end > head.filled for head in self._heads.values()]) + len(self._ended)

    @property
    def has_room(self) -> bool:
        return bool(self._free)

    def begin(self, place: Place, key: ExpertKey, slot_bytes: int, seconds: float | None) -> Head[Place]:
        """There is room for it. Its record has so many bytes, whose read takes so many seconds, if that is known."""
        buffer = self._free.pop()[: head_bytes(slot_bytes)]
        head = self._heads[key] = Head(place, key, buffer, piece_bytes(slot_bytes, seconds))
        return head

    def claim(self, key: ExpertKey) -> Head[Place] | None:
        """For the load of its record, which ends it; None if there is none."""
        head = self._heads.get(key)
        if head is not None:
            head.is_claimed = True
        return head

    def clear(self, is_wished: Callable[[ExpertKey], bool]) -> bool:
        """Ends the oldest of those that nobody wishes for any more, if there are any."""
        for head in self._heads.values():
            if head.is_idle and not is_wished(head.key):
                self.end(head)
                return True
        return False

    def end(self, head: Head[Place]) -> None:
        """Its buffer is another's, as soon as nothing is read into it."""
        if head.is_reading:
            self._ended.append(head)
            del self._heads[head.key]
        else:
            del self._heads[head.key]
            self._release(head)

    def read(self, head: Head[Place], seconds: float, error: BaseException | None = None) -> None:
        """The piece that was being read is there, or won't come."""
        head.seconds += seconds
        if error is None:
            head.filled = head.end
        else:
            head.end, head.error = head.filled, error
        if head.waiter is not None:
            head.waiter()
        if head in self._ended:
            self._ended.remove(head)
            self._release(head)

    def mend(self, claimed: Collection[Head[Place]]) -> None:
        """After a step that was cut: heads that a load has claimed are these, and buffers that none uses are free."""
        for head in list(self._heads.values()):
            if head in self._ended:
                del self._heads[head.key]
            elif head.is_claimed and head not in claimed:
                self.end(head)
        used = [head.buffer.obj for head in (*self._heads.values(), *self._ended)]
        self._free[:] = [memoryview(buffer) for buffer in self._buffers if not any(buffer is other for other in used)]

    def close(self) -> None:
        """When nothing is read any more."""
        self._heads.clear()
        self._free.clear()
        self._buffers.clear()

    def _release(self, head: Head[Place]) -> None:
        whole = head.buffer.obj
        assert isinstance(whole, mmap.mmap)
        self._free.append(memoryview(whole))
        head.buffer.release()
