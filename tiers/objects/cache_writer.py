"""CacheWriter: writes fetched records into the cache of a model in an object store, and evicts others.

Records are written in the background; the shard is synced, and then the records' entries in ACCESS_TIMES are set. When
the cache is full, the least recently used records are evicted: their entries are cleared and synced, and then their
bytes are given back to the file system. So after a crash each entry that is set belongs to a record that is on the
disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import TargetError
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.atomic import sync_folder, write_all
from moetier.tiers.store.folder import FETCHED, METADATA, is_cache
from moetier.tiers.store.pieces import as_bytes
from moetier.tiers.store.reader import ShardStore

from .access_times import AccessTimes
from .client import copy_bytes

QUEUE_BYTES = 32 << 20  # most bytes of records that wait to be written, unless it is a single one
ROOM_TIMEOUT = 10.0  # most seconds that a read waits for room among these

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

_log = logging.getLogger(__name__)
NOT_KEPT = "Records were not kept in the cache."


class CacheWriter(Closeable):
    """Writes fetched records into a cache, in the background. Thread-safe."""

    def __init__(self, store: ShardStore, times: AccessTimes, address: str, limit: int | None) -> None:
        """Write into the shards of ``store``.

        Args:
            store: the store in which the records are cached.
            times: says which records are in the cache.
            address: the address of the model, for the log.
            limit: largest size of the cached records in bytes; None: no limit.
        """
        self._store, self._times, self._address, self._limit = store, times, address, limit
        # guards: ``_arrived``, ``_waiting``, ``_buffers``, ``_timeout``, ``_is_given_up``. Notified when records are
        # durable
        self._keeping = threading.Condition()
        self._arrived: dict[ExpertKey, memoryview] = {}  # copies of records that are not yet durable
        self._waiting = 0  # bytes of these copies
        self._buffers: dict[int, list[memoryview]] = {}  # memory for further copies, by size
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="moetier-cache")  # starts no thread yet
        self._timeout = ROOM_TIMEOUT  # 0 after a read has waited in vain
        self._is_given_up = not self._times.is_durable  # whether a write has failed: nothing more is cached

    def copy_waiting(self, key: ExpertKey, buffer: memoryview) -> bool:
        """Return whether a record waits to be written into its shard, and if so, copy it."""
        with self._keeping:
            if (copy := self._arrived.get(key)) is None:
                return False
            copy_bytes(as_bytes(buffer), copy)
        return True

    def keep(self, key: ExpertKey, view: memoryview) -> None:
        """Copy a record, to be written into its shard in the background.

        Waits while too many wait for the disk, but not if it stalls, or a stopped process holds the lock: then the
        record is not kept.
        """
        with self._keeping:
            room = self._keeping.wait_for(
                lambda: not self._waiting or self._waiting + len(view) <= QUEUE_BYTES or self._is_given_up,
                self._timeout,
            )
            self._timeout = ROOM_TIMEOUT if room else 0.0
            if not room or self._is_given_up or key in self._arrived:
                return
            spare = self._buffers.setdefault(len(view), [])
            try:
                copy = spare.pop() if spare else memoryview(mmap.mmap(-1, len(view)))
            except OSError as error:  # no memory
                _log.error(NOT_KEPT, exc_info=error)
                return
            self._waiting += len(view)
        try:
            copy_bytes(copy, view)  # without the lock, as other threads copy too
        except BaseException:
            with self._keeping:
                self._release(copy)
            raise
        with self._keeping:
            if key in self._arrived:  # another thread has fetched it too
                self._release(copy)
                return
            self._arrived[key] = copy
        try:
            self._threads.submit(self._write_arrived).add_done_callback(_log_error)
        except RuntimeError as error:  # there is no thread: the next record that arrives will be stored with this one
            _log.error(NOT_KEPT, exc_info=error)

    def _release(self, copy: memoryview) -> None:
        """Give back the memory of a copy. The caller holds ``_keeping``."""
        self._waiting -= len(copy)
        self._buffers[len(copy)].append(copy)
        self._keeping.notify_all()

    def _write_arrived(self) -> None:
        """Write the records that have arrived, sync them, set their entries, and evict others if there are too many."""
        with self._keeping:
            arrived = dict(self._arrived)
        if not arrived:
            return
        try:
            with self._times.locked():  # no other process evicts what is being written
                for block in {key.block for key in arrived}:
                    self._write(block, {key.expert: copy for key, copy in arrived.items() if key.block == block})
                for key in arrived:
                    self._times.set(key)
                if is_cache(self._store.folder):
                    self._evict()
                    self._complete()
        except TargetError as error:  # the records are not kept
            _log.info("%s", error.cause)
        except OSError as error:
            with self._keeping:
                self._is_given_up = True
            _log.warning(
                "Records of %s are no longer kept in %s (%s): free some space, or set --store-cache-size.",
                self._address,
                self._store.directory,
                error.strerror,
            )
        finally:
            with self._keeping:
                for key, copy in arrived.items():
                    del self._arrived[key]
                    self._release(copy)

    def _write(self, block: int, records: Mapping[int, memoryview]) -> None:
        """Write records of one block, a dictionary from experts to records, into its shard, and make them durable."""
        shard = self._store.shards[block]
        direct = os.O_DIRECT if shard.is_direct else 0
        with _opened(shard.file.path, os.O_WRONLY | direct) as descriptor:
            for expert, record in records.items():
                write_all(descriptor, record, expert * shard.file.slot_bytes)
            os.fdatasync(descriptor)
            if not direct:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # the host tier caches them

    def _evict(self) -> None:
        """Evict the least recently used records until the cache is within its limit. The caller holds ``locked``."""
        if self._limit is None or (excess := self._times.cached_bytes - self._limit) <= 0:
            return
        victims = self._times.least_recent(excess)
        for key in victims:
            self._times.clear(key)
        self._times.sync()
        for key in victims:
            shard, offset = self._store.locate(key)
            with _opened(shard.file.path, os.O_RDWR) as descriptor:
                if _LIBRARY.fallocate(descriptor, _PUNCH_HOLE, offset, shard.file.slot_bytes):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))

    def _complete(self) -> None:
        """If all records are there, make the folder an ordinary store. The caller holds ``locked``."""
        cached = self._times
        if not cached.has_all:
            return
        for block, shard in self._store.shards.items():
            expected = self._store.manifest.checksums(block)
            for expert, (stored, right) in enumerate(zip(shard.file.stored_checksums(), expected, strict=True)):
                if stored != right:  # a reader has set its entry just when it was evicted
                    cached.clear(ExpertKey(block, expert))
        if cached.has_all:
            cached.sync()
            (self._store.folder / FETCHED).rename(self._store.folder / METADATA)
            sync_folder(self._store.folder)
            _log.info("%s has all records of %s now.", self._store.directory, self._address)

    def close(self) -> None:
        """Wait until the records that have arrived are durable, and end the thread. A second call does nothing."""
        self._threads.shutdown()


def _log_error(stored: Future[None]) -> None:
    """Log the error with which ``_write_arrived`` has ended, if any. Its records are not kept."""
    if (error := stored.exception()) is not None:
        _log.error(NOT_KEPT, exc_info=error)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
