"""One arena: equal slots in an anonymous memory file that other processes may map, but never change.

The file is of mode 0600 and sealed against shrinking and growing: whoever maps it can't be made to fault. It is not
sealed against future writes: a restarted owner of the same user must be able to fill slots that it takes back.
Nothing lies under /dev/shm, whose size is another's to set.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os

from .errors import ArenaError, BudgetError, ClosedError
from .keys import PAGE

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_TOO_MUCH = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


class Arena:
    """``slots`` slots of ``slot_bytes`` each, both ends of every slot on a page."""

    @classmethod
    def create(cls, slots: int, slot_bytes: int) -> Arena:
        """Allocates every page now: a write later can't fail. Raises BudgetError when they can't be had."""
        assert slots > 0
        assert slot_bytes > 0
        assert slot_bytes % PAGE == 0
        descriptor = os.memfd_create("moetier-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(descriptor, 0o600)
            os.posix_fallocate(descriptor, 0, slots * slot_bytes)  # else a full memory is a SIGBUS later
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            mapping = mmap.mmap(descriptor, slots * slot_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _TOO_MUCH:
                raise
            raise BudgetError(
                f"The system does not give {slots * slot_bytes:,} bytes of shared memory "
                f"({errno.errorcode[error.errno]}).",
                "Give the host tier less memory, or free some.",
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(mapping, slots, slot_bytes, descriptor)

    @classmethod
    def map(cls, descriptor: int, slots: int, slot_bytes: int) -> Arena:
        """Maps another process's arena for reading; ``descriptor`` stays the caller's. Raises ArenaError on anything
        that could shrink under the reader."""
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ArenaError("The descriptor is no memory file.", "Connect to a moetier daemon.") from error
        size = os.fstat(descriptor).st_size
        if seals & SEALS != SEALS:
            raise ArenaError("The arena is not sealed: its owner could shrink it.", "Connect to a moetier daemon.")
        if size != slots * slot_bytes:
            raise ArenaError(
                f"The arena has {size:,} bytes, {slots * slot_bytes:,} were announced.", "Connect to it anew."
            )
        # never MAP_PRIVATE: after one stray write the page would stay stale for ever
        return cls(mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ), slots, slot_bytes, None)

    def __init__(self, mapping: mmap.mmap, slots: int, slot_bytes: int, descriptor: int | None) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._mapping: mmap.mmap | None = mapping
        self._descriptor = descriptor  # None for a reader

    def slot(self, index: int) -> memoryview:
        """The whole slot, writable: for who fills it. The owner's only."""
        slot = self._piece(index, self.slot_bytes)
        assert not slot.readonly, "only the owner fills slots"
        return slot

    def view(self, index: int, nbytes: int) -> memoryview:
        """The first ``nbytes`` of a slot, read-only: for leases."""
        return self._piece(index, nbytes).toreadonly()

    def export(self) -> int:
        """A new read-only descriptor of the memory file, to be passed on; the caller closes it."""
        assert self._descriptor is not None, "closed, or not the owner"
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent. The memory goes now, or with the last view of it: a view never dangles."""
        mapping, self._mapping = self._mapping, None
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        if mapping is not None:
            # a BufferError: somebody still looks at it. The last view holds the mapping, and both go together.
            with contextlib.suppress(BufferError):
                mapping.close()

    def _piece(self, index: int, nbytes: int) -> memoryview:
        if self._mapping is None:
            raise ClosedError("The arena was closed.", "Open the tier again.")
        assert 0 <= index < self.slots
        assert 0 <= nbytes <= self.slot_bytes
        start = index * self.slot_bytes
        return memoryview(self._mapping)[start : start + nbytes]
