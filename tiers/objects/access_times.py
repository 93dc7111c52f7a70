"""The file of a cache that says which records it has, and when each was last read from it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moetier.tiers.closeable import descriptor_closed_on_error
from moetier.tiers.errors import StoreFormatError, TargetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.atomic import allocate

ACCESS_TIMES = "uses.bin"  # in the store's folder: for each record a u64, the time of its last access in ns; 0: absent
TIMEOUT = 20.0  # longest wait for the lock, in seconds


class AccessTimes:
    """Times of last access to the records of a cache; 0 for absent records. Processes may share the file. Thread-safe.

    An entry is read and set without a lock. ``locked`` is for changes that belong together.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Open the file ``path``, or make it with all records absent.

        If the file can't be written, changes are known to this process only. Raises StoreFormatError if its size is
        wrong, and as ``locked``.
        """
        self.path = path
        self.is_durable = True  # whether changes are written to the file
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.is_durable = False
        with descriptor_closed_on_error(self._descriptor):
            size = 8 * manifest.record_count
            with self.locked():
                if os.fstat(self._descriptor).st_size == 0:
                    allocate(self._descriptor, size)  # writing a hole of a mapped file is SIGBUS if the disk is full
            if (actual := os.fstat(self._descriptor).st_size) != size:
                raise StoreFormatError(
                    f"{path} has {actual:,} bytes; {size:,} were expected, 8 for each record.",
                    f"It belongs to a cache. Remove {path.parent.parent}, and give the address of the model again.",
                )
            self._memory = mmap.mmap(
                self._descriptor, size, access=mmap.ACCESS_WRITE if self.is_durable else mmap.ACCESS_COPY
            )
            self._times = np.frombuffer(self._memory, np.uint64)
            experts = [block.experts for block in manifest.blocks]
            self._first = np.cumsum([0, *experts])  # number of the first record of each block
            self._sizes = np.repeat([manifest.layout(block).slot_bytes for block in range(len(experts))], experts)

    def __contains__(self, key: ExpertKey) -> bool:
        return bool(self._times[self._index(key)])

    def set(self, key: ExpertKey) -> None:
        """Note that a record is in the cache, and was accessed now."""
        self._times[self._index(key)] = time.time_ns()

    def clear(self, key: ExpertKey) -> None:
        """Note that a record is not in the cache."""
        self._times[self._index(key)] = 0

    @property
    def cached_bytes(self) -> int:
        """Bytes of the records in the cache, with their checksums."""
        return int(self._sizes[self._times != 0].sum())

    @property
    def has_all(self) -> bool:
        """True if all records of the model are in the cache."""
        return bool(self._times.all())

    def least_recent(self, nbytes: int) -> list[ExpertKey]:
        """Return the keys of the least recently used records: as few as have ``nbytes`` together, or all of them."""
        times, keys = self._times.copy(), list[ExpertKey]()  # a copy, as readers set entries meanwhile
        for index in map(int, np.argsort(times, kind="stable")):
            if nbytes <= 0:
                break
            if times[index]:
                keys.append(self._key(index))
                nbytes -= int(self._sizes[index])
        return keys

    def _index(self, key: ExpertKey) -> int:
        """Return the number of a record, from 0 on, block after block."""
        return int(self._first[key.block]) + key.expert

    def _key(self, index: int) -> ExpertKey:
        """Return the key of a record from its number."""
        block = int(np.searchsorted(self._first, index, "right")) - 1
        return ExpertKey(block, index - int(self._first[block]))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file's lock. It excludes other processes, but not other threads of this one.

        Raises TargetError if another process, one that is stopped for instance, has not released it after ``TIMEOUT``
        seconds.
        """
        deadline = time.monotonic() + TIMEOUT
        while self.is_durable:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TargetError(
                        f"Another process has held the lock of {self.path} for more than {TIMEOUT:.0f} seconds.",
                        f"Find it (`fuser -v {self.path}`). If it is stopped, continue it (kill -CONT PID) or end it.",
                    ) from None
                time.sleep(0.01)
        try:
            yield
        finally:
            if self.is_durable:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def sync(self) -> None:
        """Make all entries durable."""
        self._memory.flush()

    def close(self) -> None:
        """Unmap and close the file."""
        del self._times
        self._memory.close()
        os.close(self._descriptor)
