"""CachedStore, the SSD tier of a model in an object store: reads records from its cache, and fetches the absent ones.

The cache has the shards of a store, as sparse files. ACCESS_TIMES says which records are there. When a record has
arrived and its checksum is right, a copy of it is written into its shard in the background; the shard is synced, and
then the record's entry in ACCESS_TIMES is set. When the cache is full, the least recently used records are evicted:
their entries are cleared and synced, and then their bytes are given back to the file system. So after a crash each
entry that is set belongs to a record that is on the disk. If a record is damaged later, its checksum is wrong when it
is read, and it is fetched again.
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
from functools import partial
from pathlib import Path

from moetier.tiers.errors import ChecksumError, ClosedError, StoreError, TargetError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard, UseCount
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share, ShareCounts
from moetier.tiers.store.atomic import disk_errors, durable_file, make_folders, sync_folder, write_all
from moetier.tiers.store.base import Pause, WrapperStore
from moetier.tiers.store.checksum import READ_PIECE_BYTES, stored_checksum
from moetier.tiers.store.folder import FETCHED, METADATA, check_array, has_store, is_cache, read_manifest, store_folder
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import OpenShard, Read, ShardFile, as_bytes, run_reads

from .access_times import ACCESS_TIMES, AccessTimes
from .cache_folder import cache_of
from .client import RETRIES, Objects, copy_bytes, until_right

QUEUE_BYTES = 32 << 20  # most bytes of records that wait to be written, unless it is a single one
ROOM_TIMEOUT = 10.0  # most seconds that a read waits for room among these
READS = 16  # GETs of pieces of large records at the same time

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE

_log = logging.getLogger(__name__)
NOT_KEPT = "Records were not kept in the cache."


class CachedStore(WrapperStore):
    """The records of a model in an object store. It wraps the store in which it caches them."""

    store: ShardStore

    @classmethod
    def recognises(cls, location: Path) -> bool:
        """Return whether ``location`` is the cache of a model in an object store, and lacks records."""
        return has_store(location) and is_cache(store_folder(location))

    @classmethod
    def read_manifest(cls, location: Path) -> Manifest:
        """Return the manifest of the model whose cache is at ``location``."""
        return read_manifest(store_folder(location))

    @classmethod
    def open(cls, location: Path, *, damaged: bool = False) -> CachedStore:
        """Open the cache at ``location``, which ``fetch`` has made. No request is sent.

        ``damaged`` has no effect, as bad records are fetched again. Raises StoreError, also if shards can't be made or
        another process keeps the cache locked.
        """
        folder = store_folder(location)
        manifest = read_manifest(folder)
        for array in manifest.layouts:
            check_array(folder / array / METADATA, manifest, array)
        files = [ShardFile.of(folder, manifest, block) for block in range(len(manifest.blocks))]
        with contextlib.ExitStack() as undo:
            try:
                with disk_errors(folder):
                    times = AccessTimes(folder / ACCESS_TIMES, manifest)
                    undo.callback(times.close)
                    with times.locked():
                        for file in files:
                            _make_sparse(file)
            except TargetError as error:
                raise StoreError(error.cause, error.fix) from error
            shards = dict[int, OpenShard]()
            for block, file in enumerate(files):
                shards[block] = OpenShard.open(file, f"block {block}", ())
                undo.callback(shards[block].close)
            cached = cls(ShardStore(folder, manifest, shards, {}, READS), times)
            undo.pop_all()
        return cached

    def __init__(self, store: ShardStore, times: AccessTimes) -> None:
        """Cache records in ``store``; ``times`` has the records that are there. ``close`` closes both."""
        super().__init__(store)
        self.folder = store.folder  # experts.zarr
        self.address, self._limit = cache_of(self.directory)
        self._fork_guard = ForkGuard()
        # ``close`` waits for reads before it closes what they use
        self._use = UseCount(f"The store {store.folder}")
        self._objects: Objects | None = None  # opened when the first record is fetched
        self._is_closed = False
        self._lock = threading.Lock()  # guards: ``_objects``, ``_is_closed``, ``_fetched``, ``_from_cache``
        self._fetched, self._from_cache = ShareCounts(), ShareCounts()
        self._cached = times
        self._files = contextlib.ExitStack()  # closes what each process has to close, a fork too
        self._files.callback(times.close)
        self._files.callback(store.close)
        # guards: ``_arrived``, ``_waiting``, ``_buffers``, ``_timeout``, ``_is_given_up``. Notified when records are
        # durable
        self._keeping = threading.Condition()
        self._arrived: dict[ExpertKey, memoryview] = {}  # copies of records that are not yet durable
        self._waiting = 0  # bytes of these copies
        self._buffers: dict[int, list[memoryview]] = {}  # memory for further copies, by size
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="moetier-cache")  # starts no thread yet
        self._timeout = ROOM_TIMEOUT  # 0 after a read has waited in vain
        self._is_given_up = not self._cached.is_durable  # whether a write has failed: nothing more is cached
        if self._is_given_up and not self.is_complete:
            _log.warning("%s can't be written: experts that it lacks are fetched at each use.", self.directory)

    @property
    def where(self) -> str:
        """The address of the model."""
        return self.address

    @property
    def objects(self) -> Objects:
        """The objects that records are fetched from.

        Raises ConfigError if obstore is not installed, and ClosedError once ``close`` was called.
        """
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"The store {self.folder} was closed.", "Open it again.")
            if self._objects is None:
                self._objects = Objects(self.address)
            return self._objects

    @property
    def cached_bytes(self) -> int:
        """Bytes of the records in the cache, with their checksums."""
        return self._cached.cached_bytes

    def shares(self) -> list[Share]:
        """Return how many records were fetched, and how many came from the cache, since the store was opened."""
        with self._lock:
            retries = 0 if self._objects is None else self._objects.retries
            place = f"{self.address} ({retries} retries)" if retries else self.address
            return [self._fetched.share(place), self._from_cache.share(f"its cache {self.directory}")]

    def _count(self, counts: ShareCounts, nbytes: int) -> None:
        with self._lock:
            counts.count(records=1, bytes=nbytes)

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record from the cache, or fetch it.

        Raises, beside the errors that ``Store`` names:
            StoreReadError: the record could not be fetched; the error names the object and the endpoint.
        """
        with self._use:
            self.manifest.check_keys(key.block, (key,))
            if self._is_waiting(key, buffer):
                return
            if key in self._cached:
                try:
                    self.store.read_into(key, buffer, pause)
                except StoreError as error:
                    if self.is_complete:  # it is an ordinary store now
                        raise
                    if key in self._cached:  # else it was evicted meanwhile
                        _log.warning("%s It is fetched again.", error.cause)
                        self._cached.clear(key)
                else:
                    if key in self._cached:  # else it was evicted meanwhile
                        self._cached.set(key)
                    self._count(self._from_cache, buffer.nbytes)
                    return
            self._fetch(key, as_bytes(buffer), pause)
            self._count(self._fetched, buffer.nbytes)

    def _is_waiting(self, key: ExpertKey, buffer: memoryview) -> bool:
        """Return whether a record waits to be written into its shard, and if so, copy it."""
        with self._keeping:
            if (copy := self._arrived.get(key)) is None:
                return False
            copy_bytes(as_bytes(buffer), copy)
        self._count(self._from_cache, buffer.nbytes)
        return True

    @property
    def is_complete(self) -> bool:
        """Whether all records are in the cache, so that it is an ordinary store."""
        return not is_cache(self.folder)

    def _fetch(self, key: ExpertKey, view: memoryview, pause: Pause | None) -> None:
        """Fetch a record and its checksum into ``view``, check it, and queue a copy for its shard.

        Each 8 MiB are one GET. With ``pause``, pieces are fetched one after the other, and ``pause`` is called between
        two of them; once it returns false, the rest is fetched at once. A record with a wrong checksum is fetched
        again, past caches on the way. Raises as ``read_into``.
        """
        try:
            until_right(partial(self._fetch_once, key, view, pause))
        except ChecksumError as error:
            raise ChecksumError(
                f"{error.cause} It came {1 + RETRIES} times, and not from a cache on the way.",
                f"If the model there was replaced, remove {self.directory}. If other machines read it well, see what "
                "the network or a proxy does. Else write it again: moetier push --overwrite DIR ADDRESS",
            ) from None
        self._keep(key, view)

    def _fetch_once(self, key: ExpertKey, view: memoryview, pause: Pause | None, fresh: bool) -> None:
        """Fetch a record and its checksum into ``view``, and check it. ``fresh`` is as in ``Objects.read``."""
        shard, offset = self.store.locate(key)
        assert len(view) == shard.file.slot_bytes, f"{len(view)} bytes are no slot"
        objects, payload = self.objects, view[:-CHECKSUM_BYTES]
        name = shard.file.path.relative_to(self.directory).as_posix()
        reads = [
            Read(
                self.store.threads,
                partial(objects.read, name, offset + at, view[at : at + READ_PIECE_BYTES], fresh=fresh),
                payload[at : at + READ_PIECE_BYTES],
            )
            for at in range(0, len(view), READ_PIECE_BYTES)
        ]
        crc, done = 0, 0
        try:
            while pause is not None and done < len(reads) - 1:
                crc = run_reads(reads[done : done + 1], crc)
                done += 1
                if not pause():
                    break
            crc = run_reads(reads[done:], crc)
        except StoreError as error:
            raise type(error)(f"{self.manifest.model}, {key}: {error.cause}", error.fix) from error
        if crc != stored_checksum(view) or not self.manifest.has_record(key, crc):
            where = f"{self.manifest.model}, {key}: {name} at {objects.where}"
            raise ChecksumError(f"{where} has other bytes than the manifest says.", "")

    def _keep(self, key: ExpertKey, view: memoryview) -> None:
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
            self._writer.submit(self._store_arrived).add_done_callback(_log_error)
        except RuntimeError as error:  # there is no thread: the next record that arrives will be stored with this one
            _log.error(NOT_KEPT, exc_info=error)

    def _release(self, copy: memoryview) -> None:
        """Give back the memory of a copy. The caller holds ``_keeping``."""
        self._waiting -= len(copy)
        self._buffers[len(copy)].append(copy)
        self._keeping.notify_all()

    def _store_arrived(self) -> None:
        """Write the records that have arrived, sync them, set their entries, and evict others if there are too many."""
        with self._keeping:
            arrived = dict(self._arrived)
        if not arrived:
            return
        try:
            with self._cached.locked():  # no other process evicts what is being written
                for block in {key.block for key in arrived}:
                    self._write(block, {key.expert: copy for key, copy in arrived.items() if key.block == block})
                for key in arrived:
                    self._cached.set(key)
                if not self.is_complete:
                    self._evict()
                    self._complete()
        except TargetError as error:  # the records are not kept
            _log.info("%s", error.cause)
        except OSError as error:
            with self._keeping:
                self._is_given_up = True
            _log.warning(
                "Records of %s are no longer kept in %s (%s): free some space, or set --store-cache-size.",
                self.address,
                self.directory,
                error.strerror,
            )
        finally:
            with self._keeping:
                for key, copy in arrived.items():
                    del self._arrived[key]
                    self._release(copy)

    def _write(self, block: int, records: Mapping[int, memoryview]) -> None:
        """Write records of one block, a dictionary from experts to records, into its shard, and make them durable."""
        shard = self.store.shards[block]
        direct = os.O_DIRECT if shard.is_direct else 0
        with _opened(shard.file.path, os.O_WRONLY | direct) as descriptor:
            for expert, record in records.items():
                write_all(descriptor, record, expert * shard.file.slot_bytes)
            os.fdatasync(descriptor)
            if not direct:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # the host tier caches them

    def _evict(self) -> None:
        """Evict the least recently used records until the cache is within its limit. The caller holds ``locked``."""
        if self._limit is None or (excess := self.cached_bytes - self._limit) <= 0:
            return
        victims = self._cached.least_recent(excess)
        for key in victims:
            self._cached.clear(key)
        self._cached.sync()
        for key in victims:
            shard, offset = self.store.locate(key)
            with _opened(shard.file.path, os.O_RDWR) as descriptor:
                if _LIBRARY.fallocate(descriptor, _PUNCH_HOLE, offset, shard.file.slot_bytes):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))

    def _complete(self) -> None:
        """If all records are there, make the folder an ordinary store. The caller holds ``locked``."""
        cached = self._cached
        if not cached.has_all:
            return
        for block, shard in self.store.shards.items():
            expected = self.manifest.checksums(block)
            for expert, (stored, right) in enumerate(zip(shard.file.stored_checksums(), expected, strict=True)):
                if stored != right:  # a reader has set its entry just when it was evicted
                    cached.clear(ExpertKey(block, expert))
        if cached.has_all:
            cached.sync()
            (self.folder / FETCHED).rename(self.folder / METADATA)
            sync_folder(self.folder)
            _log.info("%s has all records of %s now.", self.directory, self.address)

    def close(self) -> None:
        """Wait for reads in progress and for records to become durable, then close all."""
        with self._files, contextlib.ExitStack() as ending:
            if self._fork_guard.is_owner:
                with self._lock:
                    self._is_closed = True
                ending.callback(self._writer.shutdown)
                ending.callback(self._use.close)
                if self._objects is not None:
                    self._objects.close()


def _log_error(stored: Future[None]) -> None:
    """Log the error with which ``_store_arrived`` has ended, if any. Its records are not kept."""
    if (error := stored.exception()) is not None:
        _log.error(NOT_KEPT, exc_info=error)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _make_sparse(file: ShardFile) -> None:
    """Make a shard that has its whole size and its index, but no record, unless it exists."""
    if file.path.exists():
        return
    make_folders(file.path.parent)
    with durable_file(file.path) as stream:
        stream.seek(file.data_bytes)
        stream.write(file.make_index())
