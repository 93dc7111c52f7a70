"""CachedStore, the SSD tier of a model in an object store: reads records from its cache, and fetches the absent ones.

The cache has the shards of a store, as sparse files. ACCESS_TIMES says which records are there. When a record has
arrived and its checksum is right, ``cache_writer`` writes a copy of it into its shard. If a record is damaged later,
its checksum is wrong when it is read, and it is fetched again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from functools import partial
from pathlib import Path

from moetier.tiers.errors import ChecksumError, ClosedError, StoreError, TargetError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard, UseCount
from moetier.tiers.manifest import Manifest
from moetier.tiers.stats import Share, ShareCounts
from moetier.tiers.store.atomic import disk_errors, durable_file, make_folders
from moetier.tiers.store.base import Pause, WrapperStore
from moetier.tiers.store.checksum import READ_PIECE_BYTES, stored_checksum
from moetier.tiers.store.folder import METADATA, check_array, has_store, is_cache, read_manifest, store_folder
from moetier.tiers.store.pieces import Read, as_bytes, run_reads
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.shard import OpenShard, ShardFile

from .access_times import ACCESS_TIMES, AccessTimes
from .cache_folder import cache_of
from .cache_writer import CacheWriter
from .client import RETRIES, Objects, until_right

READS = 16  # GETs of pieces of large records at the same time

_log = logging.getLogger(__name__)


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
        self.address, limit = cache_of(self.directory)
        self._fork_guard = ForkGuard()
        # ``close`` waits for reads before it closes what they use
        self._use = UseCount(f"The store {store.folder}")
        self._objects: Objects | None = None  # opened when the first record is fetched
        self._is_closed = False
        self._lock = threading.Lock()  # guards: ``_objects``, ``_is_closed``, ``_fetched``, ``_from_cache``
        self._fetched, self._from_cache = ShareCounts(), ShareCounts()
        self._times = times
        self._files = contextlib.ExitStack()  # closes what each process has to close, a fork too
        self._files.callback(times.close)
        self._files.callback(store.close)
        self._writer = CacheWriter(store, times, self.address, limit)
        if not times.is_durable and not self.is_complete:
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
        return self._times.cached_bytes

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
        with self._use.use():
            self.manifest.check_keys(key.block, (key,))
            if self._writer.copy_waiting(key, buffer):
                self._count(self._from_cache, buffer.nbytes)
                return
            if key in self._times:
                try:
                    self.store.read_into(key, buffer, pause)
                except StoreError as error:
                    if self.is_complete:  # it is an ordinary store now
                        raise
                    if key in self._times:  # else it was evicted meanwhile
                        _log.warning("%s It is fetched again.", error.cause)
                        self._times.clear(key)
                else:
                    if key in self._times:  # else it was evicted meanwhile
                        self._times.set(key)
                    self._count(self._from_cache, buffer.nbytes)
                    return
            self._fetch(key, as_bytes(buffer), pause)
            self._count(self._fetched, buffer.nbytes)

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
        self._writer.keep(key, view)

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

    def close(self) -> None:
        """Wait for reads in progress and for records to become durable, then close all."""
        with self._files, contextlib.ExitStack() as closing:
            if self._fork_guard.is_owner:
                with self._lock:
                    self._is_closed = True
                closing.callback(self._writer.close)
                closing.callback(self._use.close)
                if self._objects is not None:
                    self._objects.close()


def _make_sparse(file: ShardFile) -> None:
    """Make a shard that has its whole size and its index, but no record, unless it exists."""
    if file.path.exists():
        return
    make_folders(file.path.parent)
    with durable_file(file.path) as stream:
        stream.seek(file.data_bytes)
        stream.write(file.make_index())
