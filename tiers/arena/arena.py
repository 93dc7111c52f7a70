"""Arena: slots for the records of one store, and their directory, in one memory file (memfd).

The file is accessible to its user only. It is sealed against shrinking and growing, so a process that maps it is safe
from SIGBUS. It is not sealed against future writes: a restarted owner of the same user must be able to fill the slots
that it reclaims. A file under /dev/shm is not used, because the administrator may have limited its size.

The owner holds an exclusive flock(2) on the open file description through which it writes. The kernel releases the lock
when the owner is dead and all disk reads into the memory that it had begun have ended. The process that gets the lock
next is then the only one that writes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import platform
from concurrent.futures import ThreadPoolExecutor

from moetier.tiers.errors import ArenaError, BudgetError, ClosedError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import Residents
from moetier.tiers.store.checksum import crc32c

from .directory import Directory, Header
from .plan import WORD, ArenaPlan

NAME = "moetier-arena"  # /proc/*/fd show "/memfd:moetier-arena (deleted)"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_TOO_MUCH = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


class Arena:
    """A memory file with a directory and ``plan.slots`` slots of whole pages, mapped into this process."""

    @classmethod
    def create(cls, plan: ArenaPlan) -> Arena:
        """Create an arena and allocate all of its pages, so that later writes can't fail for lack of memory.

        Raises:
            BudgetError: the system does not have that much memory.
        """
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.fchmod(descriptor, 0o600)
            os.posix_fallocate(descriptor, 0, plan.nbytes)  # otherwise a lack of memory would cause a SIGBUS later
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            mapping = mmap.mmap(descriptor, plan.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _TOO_MUCH:
                code = errno.errorcode[error.errno]
                raise BudgetError(
                    f"The system does not give {plan.nbytes:,} bytes of shared memory ({code}).",
                    "Give the host tier less memory, or free some.",
                ) from error
            raise
        directory = Directory.create(memoryview(mapping)[: plan.directory_bytes], plan)
        return cls(mapping, plan, directory, descriptor)

    @classmethod
    def map(cls, descriptor: int, plan: ArenaPlan) -> Arena:
        """Map another process's arena for reading. The caller still has to close ``descriptor``.

        Raises:
            ArenaError: the file could shrink while it is mapped, or it is not the planned arena.
        """
        header = _check_sealed(descriptor)
        if header != Header.of(plan, header.identity):
            raise ArenaError("The arena is not the one that was announced.", "Connect to it anew.")
        # Not MAP_PRIVATE: after a stray write, this process would never see later changes to that page.
        mapping = mmap.mmap(descriptor, plan.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        return cls(mapping, plan, Directory(memoryview(mapping)[: plan.directory_bytes], plan), None)

    @classmethod
    def reclaim(cls, descriptor: int, manifest: Manifest) -> Arena:
        """Take over the arena of a dead owner.

        ``descriptor`` is any descriptor of the memory file; the caller still has to close it. The arena's records must
        be checked with ``intact_slots`` before they are used.

        Raises:
            ArenaError: the owner is alive, or the file is not a sealed arena of this store.
        """
        try:
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise ArenaError(f"The memory file can't be written to ({error.strerror}).", "Use a new arena.") from error
        try:
            try:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArenaError("The arena's owner lives.", "Connect to it, or use a new arena.") from error
            except OSError as error:
                raise ArenaError(f"The arena can't be locked ({error.strerror}).", "Use a new arena.") from error
            plan = _check_sealed(own).plan(manifest)
            if os.fstat(own).st_blocks * 512 < plan.nbytes:
                raise ArenaError(
                    "The arena's file has holes: writing to them could fail if memory is full.", "Use a new arena."
                )
            mapping = mmap.mmap(own, plan.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(own)
            raise
        return cls(mapping, plan, Directory(memoryview(mapping)[: plan.directory_bytes], plan), own)

    def __init__(self, mapping: mmap.mmap, plan: ArenaPlan, directory: Directory, descriptor: int | None) -> None:
        self.plan = plan
        self.directory = directory
        self._fork_guard = ForkGuard()
        self._mapping: mmap.mmap | None = mapping
        self._descriptor = descriptor  # the owner's descriptor; None in a process that only reads

    def slot(self, slot: int) -> memoryview:
        """Return a view of a whole slot: the record and its checksum. In the owner's process it is writable."""
        if self._mapping is None:
            raise ClosedError("The arena was closed.", "Open the tier again.")
        start = self.plan.offset(slot)
        return memoryview(self._mapping)[start : start + self.plan.slot_bytes(slot)]

    def whole(self, slot: int) -> memoryview:
        """Return a read-only view of the record in a slot and its checksum."""
        return self.slot(slot).toreadonly()

    def view(self, slot: int) -> memoryview:
        """Return a read-only view of the record in a slot, for leases."""
        return self.whole(slot)[:-CHECKSUM_BYTES]

    def residents(self, block: int, array: str) -> Residents | None:
        """Return where compiled code finds the records of a block. ``array`` names the zarr array that they belong to.

        The memory stays mapped as long as the result is referenced. Returns None on processors on which a thread may
        see the directory's words change in another order than they were written in (see ``arena/directory.py``).

        Raises ClosedError.
        """
        if self._mapping is None:
            raise ClosedError("The arena was closed.", "Open the tier again.")
        if platform.machine() != "x86_64":
            return None
        import numpy as np  # not at the top: most processes that open arenas do not compute

        memory = np.frombuffer(self._mapping, np.uint8)
        start, plan = int(memory.__array_interface__["data"][0]), self.plan
        table = start + WORD * plan.header_words
        number = next(number for number, region in enumerate(plan.regions) if region.array == array)
        first, region = plan.first_slots[number], plan.regions[number]
        return Residents(
            experts=plan.experts[block],
            table=table + WORD * plan.first_keys[block],
            generations=table + WORD * plan.keys,
            first_slot=first,
            slots=region.slots,
            records=start + plan.offset(first),
            slot_bytes=region.slot_bytes,
            memory=memory,
        )

    def export(self) -> int:
        """Open a new read-only descriptor of the memory file, to pass to another process. The caller has to close it.

        It has an open file description of its own, so the process that gets it does not share the owner's lock.
        """
        assert self._descriptor is not None, "closed, or not the owner"
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Release the memory now, or when the last view of it is gone. Views stay valid. Idempotent."""
        mapping, self._mapping = self._mapping, None
        descriptor, self._descriptor = self._descriptor, None
        self.directory.close()
        if descriptor is not None:
            if self._fork_guard.is_owner:  # a forked child shares the lock and must not release it
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # the mapping has a duplicate, which views may keep open
            os.close(descriptor)
        if mapping is not None:
            # BufferError means that there are still views. They keep the mapping, which is unmapped with the last of
            # them.
            with contextlib.suppress(BufferError):
                mapping.close()


def _check_sealed(descriptor: int) -> Header:
    """Read the header of an arena. Raises ArenaError if it is not an arena, or could shrink."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ArenaError("The descriptor is no memory file.", "Connect to a moetier daemon.") from error
    if seals & SEALS != SEALS:
        raise ArenaError("The arena is not sealed: its owner could shrink it.", "Connect to a moetier daemon.")
    header = Header.read(descriptor)
    size = os.fstat(descriptor).st_size
    if size != header.nbytes:
        raise ArenaError(f"The arena has {size:,} bytes, and says {header.nbytes:,}.", "Connect to it anew.")
    return header


def intact_slots(arena: Arena, manifest: Manifest, threads: int) -> dict[int, ExpertKey]:
    """Check all records of a reclaimed arena, whose owner may have died at any moment.

    Returns the key of each slot whose record matches its checksum. Slots with a key that has another record layout are
    left out, and no key is returned twice. ``threads`` is the number of threads that compute checksums.
    """
    plan = arena.plan
    claimed: dict[ExpertKey, int] = {}
    for region, first in zip(plan.regions, plan.first_slots, strict=True):
        for slot in range(first, first + region.slots):
            key = arena.directory.content(slot)
            if key is not None and manifest.blocks[key.block].array == region.array:
                claimed.setdefault(key, slot)
    pending = iter(list(claimed.items()))  # shared by all threads: each takes the next item when it is free

    def check() -> list[int]:
        return [slot for key, slot in pending if _is_whole(arena.whole(slot), key, manifest)]

    with ThreadPoolExecutor(threads, thread_name_prefix="moetier-recovery") as pool:
        checks = [pool.submit(check) for _ in range(threads)]
    whole = {slot for done in checks for slot in done.result()}
    return {slot: key for key, slot in claimed.items() if slot in whole}


def _is_whole(data: memoryview, key: ExpertKey, manifest: Manifest) -> bool:
    stored = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if (known := manifest.checksums(key.block)) and known[key.expert] != stored:
        return False  # an older moetier may have read it from a shard of another conversion
    return crc32c(data[:-CHECKSUM_BYTES]) == stored
