"""Arena: a memory file (memfd) with slots for the records of one store, and a directory of the slots.

Only processes of the same user can open the file. It is sealed against shrinking and growing, so a process that maps it
can't get SIGBUS. It is not sealed against writing, because a process that takes the file over must be able to fill its
slots. A file in /dev/shm would not do, because the administrator may have limited the size of that folder.

The *owner* of an arena is the process that writes to it. It holds an exclusive flock(2) on the open file description
through which it writes. After the owner's death the kernel releases the lock, but not before all disk reads into the
memory have ended. So the process that gets the lock next is the only one that writes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import platform
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from moetier.tiers.closeable import Closeable, descriptor_closed_on_error
from moetier.tiers.errors import ArenaError, BudgetError, ClosedError, ExhaustedError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey, TierSlot
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Residents
from moetier.tiers.store.checksum import crc32c, stored_checksum
from moetier.tiers.threads import start_thread

from .directory import ArenaHeader, Directory
from .layout import WORD, ArenaLayout

NAME = "moetier-arena"  # in /proc/PID/fd, the file is shown as "/memfd:moetier-arena (deleted)"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_TOO_MUCH = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)
FIRST_BYTES = 256 << 20  # that are allocated at once; some gigabytes take seconds
ALLOCATION_BYTES = 32 << 20  # that are allocated at a time in the background


class Arena(Closeable):
    """A memory file with a directory and slots, mapped into this process. Each slot begins on a page."""

    @classmethod
    def create(cls, layout: ArenaLayout) -> Arena:
        """Create an arena, and allocate its pages: the first of them at once, the others in the background.

        So a lack of memory does not show up in the middle of a run. A write to a page that can't be allocated would end
        the process: call ``allocate`` before the first write to a slot.

        Raises:
            BudgetError: the system does not have enough memory.
        """
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        first = min(layout.nbytes, max(layout.directory_bytes, FIRST_BYTES))
        with descriptor_closed_on_error(descriptor):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.fchmod(descriptor, 0o600)
            with _enough_memory(layout):
                os.ftruncate(descriptor, layout.nbytes)
                os.posix_fallocate(descriptor, 0, first)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
                mapping = mmap.mmap(descriptor, layout.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            directory = Directory.create(memoryview(mapping)[: layout.directory_bytes], layout)
            arena = cls(mapping, layout, directory, descriptor, allocated=first)
        if first < layout.nbytes:
            with contextlib.suppress(ExhaustedError):  # without a thread, slots are allocated when they are used
                arena._allocator = start_thread("moetier-arena", arena._allocate_all)
        return arena

    @classmethod
    def map(cls, descriptor: int, layout: ArenaLayout) -> Arena:
        """Map another process's arena read-only. The caller still has to close ``descriptor``.

        Raises:
            ArenaError: the file is not sealed against shrinking, or its header does not match ``layout``.
        """
        header = _check_sealed(descriptor)
        if header != ArenaHeader.of(layout, header.identity):
            raise ArenaError(
                "The arena's memory file is not the one that the daemon has described.", "Connect to the daemon again."
            )
        # Not MAP_PRIVATE: after a stray write, this process would no longer see the owner's changes to that page.
        mapping = mmap.mmap(descriptor, layout.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        return cls(mapping, layout, Directory(memoryview(mapping)[: layout.directory_bytes], layout), None)

    @classmethod
    def reclaim(cls, descriptor: int, manifest: Manifest) -> Arena:
        """Take over an arena whose owner is dead. ``recover`` must check its records before they are used.

        Args:
            descriptor: any descriptor of the memory file. The caller still has to close it.
            manifest: the manifest of the store whose records the arena should hold.

        Raises:
            ArenaError: the owner is alive, or the file is not a sealed arena of this store, or it can't be opened.
        """
        with contextlib.ExitStack() as undo:
            try:
                own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
                undo.callback(os.close, own)
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
                layout = _check_sealed(own).layout(manifest)
                mapping = mmap.mmap(own, layout.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            except BlockingIOError as error:
                raise ArenaError(
                    "The process that owns the arena is still running.",
                    "Connect to the daemon that owns the arena, or create a new arena.",
                ) from error
            except OSError as error:
                raise ArenaError(
                    f"The arena's memory file can't be opened, locked and mapped ({error.strerror}).",
                    "Restart the daemon.",
                ) from error
            if os.fstat(own).st_blocks * 512 < layout.nbytes:
                raise ArenaError(
                    "Some pages of the arena's memory file are not allocated: to write to them could fail.",
                    "Restart the daemon.",
                )
            arena = cls(mapping, layout, Directory(memoryview(mapping)[: layout.directory_bytes], layout), own)
            undo.pop_all()
            return arena

    def __init__(
        self,
        mapping: mmap.mmap,
        layout: ArenaLayout,
        directory: Directory,
        descriptor: int | None,
        allocated: int | None = None,
    ) -> None:
        self.layout = layout
        self.directory = directory
        self._fork_guard = ForkGuard()
        self._mapping: mmap.mmap | None = mapping
        self._descriptor = descriptor  # the owner's descriptor; None in a process that only reads
        self._allocated = layout.nbytes if allocated is None else allocated  # bytes that are allocated, in order
        self._is_allocated = bytearray(layout.slots)  # for each slot, whether ``allocate`` has seen to its pages
        self._allocator: threading.Thread | None = None
        self._is_closing = False

    def slot(self, slot: TierSlot) -> memoryview:
        """Return a view of a whole slot: the record and its checksum. The owner's views are writable.

        Raises:
            ClosedError: the arena was closed.
        """
        if self._mapping is None:
            raise ClosedError("The arena was closed.", "Open the tier again.")
        start = self.layout.offset(slot)
        return memoryview(self._mapping)[start : start + self.layout.slot_bytes(slot)]

    def allocate(self, slot: TierSlot) -> None:
        """Allocate the pages of a slot, unless that is done. Only for the owner, before it writes to the slot.

        Raises:
            BudgetError: the system does not have enough memory.
        """
        if self._is_allocated[slot]:
            return
        start, size = self.layout.offset(slot), self.layout.slot_bytes(slot)
        if start + size > self._allocated:
            assert self._descriptor is not None, "closed, or not the owner"
            with _enough_memory(self.layout):
                os.posix_fallocate(self._descriptor, start, size)
        self._is_allocated[slot] = True

    def _allocate_all(self) -> None:
        """Allocate pages piece by piece, until ``close``. Without memory, end: ``allocate`` says so."""
        descriptor, whole = self._descriptor, self.layout.nbytes
        assert descriptor is not None
        with contextlib.suppress(OSError):
            while self._allocated < whole and not self._is_closing:
                size = min(whole - self._allocated, ALLOCATION_BYTES)
                os.posix_fallocate(descriptor, self._allocated, size)
                self._allocated += size

    def record_and_checksum(self, slot: TierSlot) -> memoryview:
        """Return a read-only view of a whole slot: the record and its checksum."""
        return self.slot(slot).toreadonly()

    def view(self, slot: TierSlot) -> memoryview:
        """Return a read-only view of the record in a slot, without its checksum."""
        return self.record_and_checksum(slot)[:-CHECKSUM_BYTES]

    def residents(self, block: int, array: str) -> Residents | None:
        """Return the addresses with which compiled code finds the records of ``block``.

        The memory stays mapped as long as the result is referenced. Returns None unless the processor is an x86-64: on
        others, a thread may see the directory's words change in another order than the owner wrote them.

        Args:
            block: number of the block.
            array: name of the zarr array that has the block's records.

        Raises:
            ClosedError: the arena was closed.
        """
        if self._mapping is None:
            raise ClosedError("The arena was closed.", "Open the tier again.")
        if platform.machine() != "x86_64":
            return None
        import numpy as np  # imported late: of the processes that open arenas, only those that compute need it

        memory = np.frombuffer(self._mapping, np.uint8)
        start, layout = int(memory.__array_interface__["data"][0]), self.layout
        table = start + WORD * layout.header_words
        number = next(number for number, region in enumerate(layout.regions) if region.array == array)
        first, region = layout.first_slots[number], layout.regions[number]
        return Residents(
            experts=layout.experts[block],
            table=table + WORD * layout.first_keys[block],
            generations=table + WORD * layout.keys,
            first_slot=first,
            slots=region.slots,
            records=start + layout.offset(first),
            slot_bytes=region.slot_bytes,
            memory=memory,
        )

    def export(self) -> int:
        """Open a new read-only descriptor of the memory file, to pass to another process. The caller has to close it.

        The descriptor has an open file description of its own. So a process that gets it does not share the owner's
        lock.
        """
        assert self._descriptor is not None, "closed, or not the owner"
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Release the memory, and the owner's lock. While views of the memory exist, it stays mapped. Idempotent."""
        self._is_closing = True
        if self._allocator is not None and self._fork_guard.is_owner:
            self._allocator.join()
        mapping, self._mapping = self._mapping, None
        descriptor, self._descriptor = self._descriptor, None
        self.directory.close()
        if descriptor is not None:
            if self._fork_guard.is_owner:  # not in a forked child, which shares the lock and must not release it
                # Closing would not release the lock: the mapping has a duplicate of the descriptor, and views may keep
                # it open.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
        if mapping is not None:
            # BufferError means that views still exist. The memory is unmapped when the last of them is gone.
            with contextlib.suppress(BufferError):
                mapping.close()


@contextlib.contextmanager
def _enough_memory(layout: ArenaLayout) -> Iterator[None]:
    """Turn errors of the system for lack of memory into BudgetError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _TOO_MUCH:
            raise
        raise BudgetError(
            f"The system can't allocate {layout.nbytes:,} bytes of shared memory ({errno.errorcode[error.errno]}).",
            "Give the host tier less memory (`ram`), or free some memory.",
        ) from error


def _check_sealed(descriptor: int) -> ArenaHeader:
    """Return the header of an arena. Raises ArenaError if the file is not an arena, or not sealed against shrinking."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ArenaError(
            "The file descriptor of the arena does not refer to a memory file.", "Connect to a moetier daemon."
        ) from error
    if seals & SEALS != SEALS:
        raise ArenaError(
            "The arena's memory file is not sealed: another process could shrink it.", "Connect to a moetier daemon."
        )
    header = ArenaHeader.read(descriptor)
    size = os.fstat(descriptor).st_size
    if size != header.nbytes:
        raise ArenaError(
            f"The arena's memory file has {size:,} bytes; its header says {header.nbytes:,} bytes.",
            "Connect to the daemon again.",
        )
    return header


def recover(arena: Arena, manifest: Manifest, threads: int) -> dict[TierSlot, ExpertKey]:
    """Check all records of a reclaimed arena, and keep those that are intact: its owner may have died at any moment.

    Returns a dictionary from slot to key, with all slots whose record matches its checksum. The directory then has only
    these. If several slots have the same key, one of them is kept at most. A slot is not kept if records of its key
    have another layout than the slot's region. ``threads`` is the number of threads that compute checksums.
    """
    layout = arena.layout
    claimed: dict[ExpertKey, TierSlot] = {}
    for region, first in zip(layout.regions, layout.first_slots, strict=True):
        for slot in map(TierSlot, range(first, first + region.slots)):
            key = arena.directory.content(slot)
            if key is not None and manifest.blocks[key.block].array == region.array:
                claimed.setdefault(key, slot)
    pending = iter(list(claimed.items()))  # shared by all threads; each takes the next item when it is free

    def check() -> list[TierSlot]:
        return [slot for key, slot in pending if _is_whole(arena.record_and_checksum(slot), key, manifest)]

    with ThreadPoolExecutor(threads, thread_name_prefix="moetier-recovery") as pool:
        checks = [pool.submit(check) for _ in range(threads)]
    whole = {slot for done in checks for slot in done.result()}
    kept = {slot: key for key, slot in claimed.items() if slot in whole}
    arena.directory.repair([(kept.get(TierSlot(slot)), False) for slot in range(layout.slots)])
    return kept


def _is_whole(data: memoryview, key: ExpertKey, manifest: Manifest) -> bool:
    # an older version of moetier may have read the record from a shard of another conversion
    stored = stored_checksum(data)
    return manifest.has_record(key, stored) and crc32c(data[:-CHECKSUM_BYTES]) == stored
