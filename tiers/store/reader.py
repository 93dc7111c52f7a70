"""ShardStore, the SSD tier: open and check a store, and read records into slots.

When a store is opened, the sizes and indexes of all shards are checked. A record is read by ``preadv`` straight into
the slot, with O_DIRECT if the file system supports it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from moetier.tiers.closeable import closed_on_error
from moetier.tiers.errors import ChecksumError, ExhaustedError, IncompleteStoreError, StoreError, StoreReadError
from moetier.tiers.layout import PAGE_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard, UseCount
from moetier.tiers.manifest import Manifest
from moetier.tiers.threads import start_thread

from .atomic import read_errors
from .base import READERS, DirectoryStore, Pause
from .checksum import stored_checksum
from .folder import CACHE, METADATA, MIRRORS, check_array, command, has_store, is_cache, read_manifest, store_folder
from .pieces import Read, RecordPart, as_bytes, read_in_pieces, run_reads
from .shard import REPAIR, OpenShard, ShardFile, foreign_record, foreign_shards, store_digest

# for the check of the digest of an older store, see ``ShardStore.check_digest``
DIGEST_SECONDS = 0.1  # seconds for which ``open`` waits for the check: enough for a quick disk or a small store
DIGEST_SHARE = 0.1  # share of the time that the check spends reading, once it runs in the background


_log = logging.getLogger(__name__)


class ShardStore(DirectoryStore):
    """The records of one model directory, in ``experts.zarr``, with an open file for each block."""

    @classmethod
    def recognises(cls, location: Path) -> bool:
        """Return whether ``location`` is a model directory or its ``experts.zarr``, complete or not.

        Caches and directories with mirrors have classes of their own.
        """
        return (
            has_store(location)
            and not is_cache(folder := store_folder(location))
            and not (folder.parent / MIRRORS).exists()
        )

    @classmethod
    def read_manifest(cls, location: Path) -> Manifest:
        """Return the manifest of the store at ``location``."""
        return read_manifest(store_folder(location))

    @classmethod
    def open(cls, location: Path, *, readers: int = READERS, damaged: bool = False) -> ShardStore:
        """Open a store, and check everything except the bytes of the records.

        Args:
            location: a model directory, or its ``experts.zarr``.
            readers: number of threads that read pieces of large records.
            damaged: open the store even if shards are bad. ``faults`` then has their errors. The digest is not checked.

        Raises:
            IncompleteStoreError: the conversion was interrupted, or the folder is a cache that lacks records.
            StoreFormatError: the folder is not a store that this version can read.
            MissingExpertError: a shard is missing.
            ChecksumError: a shard belongs to another conversion.
            StoreReadError: the system reported an error when a file was read.
        """
        folder = store_folder(location)
        if is_cache(folder):
            raise IncompleteStoreError(
                f"{folder.parent} is the cache of a model in an object store, and does not have all experts.",
                "Give the address of the model instead of this folder, or fetch all experts: moetier verify ADDRESS",
            )
        manifest = read_manifest(folder)
        for array in manifest.layouts:
            check_array(folder / array / METADATA, manifest, array)
        shards, faults = dict[int, OpenShard](), dict[int, StoreError]()
        with contextlib.ExitStack() as undo:
            for block in range(len(manifest.blocks)):
                try:
                    file, name = ShardFile.of(folder, manifest, block), _name(manifest, block)
                    shards[block] = OpenShard.open(
                        file, name, manifest.checksums(block), has_checksums=bool(manifest.record_checksums)
                    )
                    undo.callback(shards[block].close)
                except StoreError as error:
                    if not damaged:
                        raise
                    faults[block] = error
            store = cls(folder, manifest, shards, faults, readers)
            undo.pop_all()
        with closed_on_error(store):
            if not damaged:
                store.check_digest()
        return store

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        shards: Mapping[int, OpenShard],
        faults: Mapping[int, StoreError],
        readers: int,
    ) -> None:
        """Make a store of ``folder``, an ``experts.zarr``: each block has an open shard or a fault.

        ``readers``: number of threads that read pieces of large records. ``close`` closes the shards.
        """
        assert readers >= 1
        self.folder = folder
        self.directory = folder.parent
        self.manifest = manifest
        self.shards = shards
        self._faults = faults
        self._fork_guard = ForkGuard()
        self._digest_check: threading.Thread | None = None
        self._closing = threading.Event()  # ends the thread ``_digest_check``
        self._fault = Future[ChecksumError]()  # gets a result if the records have another digest than the manifest
        # ``close`` waits for reads: another file could get the number of a descriptor that is closed during a read
        self._use = UseCount(f"The store {folder}")
        self.threads = ThreadPoolExecutor(readers, thread_name_prefix="moetier-store")  # starts no thread yet

    def check_digest(self) -> None:
        """Compare the digest of the checksums in the shards with that in the manifest of an older store.

        If the manifest has the checksums themselves, nothing is done. After DIGEST_SECONDS, the check goes on in the
        background. If the digests differ, raises ChecksumError. If this is found only in the background, all further
        reads raise the error instead.
        """
        if self.manifest.record_checksums:
            return
        try:
            self._digest_check = start_thread("moetier-digest", self._compare_digest)
        except ExhaustedError as error:
            raise StoreReadError(error.cause, error.fix) from error
        self._digest_check.join(DIGEST_SECONDS)
        if self._fault.done():
            raise self._fault.result()

    def _compare_digest(self) -> None:
        checksums, began = [], time.monotonic()
        try:
            for _, shard in sorted(self.shards.items()):
                with read_errors(shard.file.path):
                    for crc in shard.file.stored_checksums(shard.descriptor):
                        checksums.append(crc)
                        if (seconds := time.monotonic() - began) > DIGEST_SECONDS:  # let records be read meanwhile
                            self._closing.wait(seconds * (1 / DIGEST_SHARE - 1))
                            began = time.monotonic()
                        if self._closing.is_set():
                            return
        except StoreError as error:  # reads of the same records will raise an error too
            _log.warning("The digest of %s is not checked: %s", self.manifest.model, error.cause)
            return
        try:
            self.compare_digest(checksums)
        except ChecksumError as error:
            if not self._closing.is_set():
                self._fault.set_result(error)

    def on_fault(self, watcher: Callable[[ChecksumError], None]) -> None:
        """Register ``watcher``. It is called, in any thread, if ``check_digest`` finds that the digests differ."""
        self._fault.add_done_callback(lambda fault: watcher(fault.result()))

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """The errors of bad shards, by block. It is empty unless the store was opened with ``damaged``."""
        return self._faults

    @property
    def is_direct(self) -> bool:
        """Whether all shards are read with O_DIRECT."""
        return all(shard.is_direct for shard in self.shards.values())

    @property
    def fix(self) -> str:
        """The fix for damaged files. Those of a cache are fetched again."""
        if (self.directory / CACHE).exists():
            return (
                f"Remove {self.directory}, and give the address again. If that does not help, push the original there "
                "again with `moetier push --overwrite`."
            )
        return (
            "Restore the files named, or remove them and run the same conversion again: it makes only what is missing."
        )

    def path(self, block: int) -> Path:
        """Return the path of a block's shard."""
        return ShardFile.of(self.folder, self.manifest, block).path

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Read a record, in pieces if it is large or ``pause`` is given.

        Raises, beside the errors that ``Store`` names:
            StoreReadError: the system reported an error; if the error is EIO, a second try has failed too.
            StoreFormatError: the manifest has no checksums, and the shard was written to since it was opened.
        """
        with self._use.use():
            shard, offset = self.locate(key)
            view = as_bytes(buffer)
            assert len(view) == shard.file.slot_bytes, f"{len(view)} bytes are no slot"
            assert not shard.is_direct or _address(view) % PAGE_BYTES == 0, "not on a page"
            try:
                crc = read_in_pieces(view, pause, partial(self._read_part, shard, offset))
            except StoreReadError as error:
                raise StoreReadError(f"{_expert(self.manifest, key)}: {error.cause}", error.fix) from error
            shard.uncache(offset, len(view))
            self.compare_checksums(key, view, crc)

    def compare_checksums(self, key: ExpertKey, view: memoryview, crc: int) -> None:
        """Compare the checksum of a record with the stored checksum, and with the manifest's if the manifest has it.

        ``view`` has the record and the stored checksum; ``crc`` is the CRC-32C of the record. Raises ChecksumError if
        they differ.
        """
        if crc != stored_checksum(view):
            raise ChecksumError(
                f"{_expert(self.manifest, key)}: checksum mismatch in {self.path(key.block)}.",
                f"{REPAIR} {command('verify', self.directory)} lists everything that is damaged.",
            )
        if not self.manifest.has_record(key, crc):
            path = self.path(key.block)
            raise foreign_record(f"{_expert(self.manifest, key)}: its record in {path}", path)

    def compare_digest(self, checksums: Sequence[int]) -> None:
        """Raise ChecksumError unless the store's digest is that of ``checksums``, one for each record."""
        if (digest := store_digest(checksums)) != self.manifest.digest:
            raise foreign_shards(self.manifest, digest, self.folder)

    def close(self) -> None:
        """Wait for the reads in progress, then end all threads and close all file descriptors."""
        self._closing.set()
        check = self._digest_check
        if self._fork_guard.is_owner and check is not None and check is not threading.current_thread():
            check.join()
        self._use.close()
        shards, self.shards = self.shards, {}
        if self._fork_guard.is_owner:
            self.threads.shutdown()
        for shard in shards.values():
            shard.close()

    def locate(self, key: ExpertKey) -> tuple[OpenShard, int]:
        """Return the shard that has the record of ``key``, and the offset of the record in the shard.

        Raises StoreError if there is no such record, if the shard is bad, or if ``check_digest`` has found an error.
        """
        block, expert = key
        self.manifest.check_keys(block, (key,))
        if self._fault.done():
            raise self._fault.result().fresh()
        if block in self._faults:
            raise self._faults[block].fresh()
        shard = self.shards[block]
        return shard, expert * shard.file.slot_bytes

    def _read_part(self, shard: OpenShard, offset: int, part: RecordPart, crc: int) -> int:
        """Read a part of the record that begins at ``offset`` of a shard. See ``ReadPart``."""
        reads = [
            Read(self.threads, partial(shard.read, offset + at, memory), payload)
            for at, memory, payload in part.pieces()
        ]
        return run_reads(reads, crc)


def _name(manifest: Manifest, block: int) -> str:
    return f"block {block} ({manifest.blocks[block].path})"


def _expert(manifest: Manifest, key: ExpertKey) -> str:
    return f"{manifest.model}, {_name(manifest, key.block)}, expert {key.expert}"


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
