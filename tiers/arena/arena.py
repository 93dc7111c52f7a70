"""Arena: the slots of one store in one memory file, with the directory of what is in them.

The file is private to its user and sealed against shrinking and growing: whoever maps it can't be made to fault. It is
not sealed against future writes: a restarted owner of the same user must be able to fill slots that it takes back.
Nothing lies under /dev/shm, whose size is another's to set.

The owner holds an exclusive flock(2) on the open file description that it writes through. The kernel lets go of it when
the owner is dead and all that it had begun to read has ended: whoever gets the lock then is the only one who writes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

from moetier.tiers.errors import ArenaError, BudgetError, ClosedError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.checksum import crc32c

from .directory import Directory, Header
from .plan import ArenaPlan

NAME = "moetier-arena"  # as /proc/*/fd show it: "/memfd:moetier-arena (deleted)"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_TOO_MUCH = (errno.ENOSPC, errno.ENOMEM, errno.EFBIG)


class Arena:
    """``plan.slots`` slots, both ends of each on a page, and a directory before them."""

    @classmethod
    def create(cls, plan: ArenaPlan) -> Arena:
        """Allocates every page now: a write later can't fail. Raises BudgetError when they can't be had."""
        descriptor = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.fchmod(descriptor, 0o600)
            os.posix_fallocate(descriptor, 0, plan.nbytes)  # else a full memory is a SIGBUS later
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
        """Maps another process's arena for reading; ``descriptor`` stays the caller's. Raises ArenaError on anything
        that could shrink under the reader, and on any other arena than the planned."""
        header = _check_sealed(descriptor)
        if header != Header.of(plan, header.identity):
            raise ArenaError("The arena is not the one that was announced.", "Connect to it anew.")
        # never MAP_PRIVATE: after one stray write the page would stay stale for ever
        mapping = mmap.mmap(descriptor, plan.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        return cls(mapping, plan, Directory(memoryview(mapping)[: plan.directory_bytes], plan), None)

    @classmethod
    def reclaim(cls, descriptor: int, manifest: Manifest) -> Arena:
        """Takes back the arena of an owner who is dead, by any descriptor of it, which stays the caller's. What it
        holds is to be proved: HostTier does.

        Raises ArenaError while its owner lives, and on what is no sealed arena of this very store.
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
                raise ArenaError("The arena has holes, which a full memory could not fill.", "Use a new one.")
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
        self._descriptor = descriptor  # None for a reader

    def slot(self, slot: int) -> memoryview:
        """The whole slot, writable: for who fills it. The owner's only."""
        piece = self._piece(slot, self.plan.slot_bytes(slot))
        assert not piece.readonly, "only the owner fills slots"
        return piece

    def view(self, slot: int) -> memoryview:
        """The record in a slot, read-only: for leases."""
        return self._piece(slot, self.plan.record_bytes(slot)).toreadonly()

    def whole(self, slot: int) -> memoryview:
        """The record in a slot and its checksum, read-only."""
        return self._piece(slot, self.plan.slot_bytes(slot)).toreadonly()

    def export(self) -> int:
        """A new read-only descriptor of the memory file, to be passed on; the caller closes it. It is an open file
        description of its own: who holds it does not hold the owner's lock."""
        assert self._descriptor is not None, "closed, or not the owner"
        return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Idempotent. The memory goes now, or with the last view of it: a view never dangles."""
        mapping, self._mapping = self._mapping, None
        descriptor, self._descriptor = self._descriptor, None
        self.directory.close()
        if descriptor is not None:
            if self._fork_guard.is_owner:  # a fork shares the lock, and must not let go of it
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # the map has a duplicate, which may live on with a view
            os.close(descriptor)
        if mapping is not None:
            # a BufferError: somebody still looks at it. The last view holds the mapping, and both go together.
            with contextlib.suppress(BufferError):
                mapping.close()

    def _piece(self, slot: int, nbytes: int) -> memoryview:
        if self._mapping is None:
            raise ClosedError("The arena was closed.", "Open the tier again.")
        start = self.plan.offset(slot)
        return memoryview(self._mapping)[start : start + nbytes]


def _check_sealed(descriptor: int) -> Header:
    """Raises ArenaError on what is no arena, and on what could shrink."""
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
    """The slots whose records are whole, and whose they are: each of a key that belongs there, each key once."""
    plan = arena.plan
    claimed: dict[ExpertKey, int] = {}
    for region, first in zip(plan.regions, plan.first_slots, strict=True):
        for slot in range(first, first + region.slots):
            key = arena.directory.content(slot)
            if key is not None and manifest.blocks[key.block].array == region.array:
                claimed.setdefault(key, slot)
    pending = iter(list(claimed.items()))  # which the threads share: whichever is free takes the next

    def check() -> list[int]:
        return [slot for key, slot in pending if _is_whole(arena.whole(slot), key, manifest)]

    with ThreadPoolExecutor(threads, thread_name_prefix="moetier-recovery") as pool:
        checks = [pool.submit(check) for _ in range(threads)]
    whole = {slot for done in checks for slot in done.result()}
    return {slot: key for key, slot in claimed.items() if slot in whole}


def _is_whole(data: memoryview, key: ExpertKey, manifest: Manifest) -> bool:
    stored = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if (known := manifest.checksums(key.block)) and known[key.expert] != stored:
        return False  # a moetier that did not know these has read it from a shard of another conversion
    return crc32c(data[:-CHECKSUM_BYTES]) == stored
