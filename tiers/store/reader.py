"""ExpertStore, the SSD tier: opens and checks a store, and reads one record at a time into a slot.

Opening a store checks the sizes and indexes of all shards. A read is a ``preadv`` straight into the slot, with O_DIRECT
if the file system supports it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from moetier.tiers.errors import ChecksumError, StoreError, StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, PAGE, ExpertKey, RecordLayout
from moetier.tiers.locks import ForkGuard, UseCount
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import interruptible_bytes

from .atomic import read_errors
from .checksum import PIECE_BYTES, crc32c
from .folder import METADATA, check_array, command, read_manifest, store_folder
from .shard import (
    REPAIR,
    OpenShard,
    ShardFile,
    foreign_record,
    foreign_shards,
    store_digest,
)

# The check of an older store's digest:
DIGEST_SECONDS = 0.1  # time for which ``open`` waits for it, enough for a quick disk or a small store
DIGEST_SHARE = 0.1  # part of the time for which it reads afterwards, in the background

Fill = Callable[[int, memoryview, memoryview, int, int], int]
"""Reads a part of a record.

Called with the part's start in the record, the memory for it, the part of that memory that counts for the checksum, the
most bytes of a single read, and the CRC-32C of what is before the part. Returns the CRC-32C with the part.
"""


class Read(NamedTuple):
    """The read of a piece of a record."""

    pool: ThreadPoolExecutor  # of the disk that it is read from
    call: Callable[[], None]
    payload: memoryview  # where the piece is read to, without the record's checksum


_log = logging.getLogger(__name__)


class ExpertStore:
    """The records of one model directory. Thread-safe. One file descriptor is open for each block."""

    @classmethod
    def open(cls, folder: Path, *, readers: int = 4, damaged: bool = False) -> ExpertStore:
        """Open a model directory or its ``experts.zarr``, and check everything except the bytes of the records.

        Args:
            folder: the directory.
            readers: number of threads that read pieces of large records.
            damaged: open the store even if shards are bad, to scrub it. The errors of bad shards are in ``faults``, and
                reads of their records raise them. The digest of an older store is not checked.

        Raises:
            IncompleteStoreError: the conversion was interrupted.
            StoreFormatError: the directory is not a store that this version can read.
            MissingExpertError: a shard is missing.
            ChecksumError: a shard belongs to another conversion.
            StoreReadError: the disk has answered with an error.
        """
        folder = store_folder(folder)
        manifest = read_manifest(folder)
        for array in manifest.layouts:
            check_array(folder / array / METADATA, manifest, array)
        store = cls(folder, manifest, readers)
        try:
            for block in range(len(manifest.blocks)):
                try:
                    file, name = ShardFile.of(folder, manifest, block), _name(manifest, block)
                    store._shards[block] = OpenShard.open(file, name, manifest.checksums(block))
                except StoreError as error:
                    if not damaged:
                        raise
                    store._faults[block] = error
            if not damaged:
                store.check_digest()
        except BaseException:
            store.close()
            raise
        return store

    def __init__(self, folder: Path, manifest: Manifest, readers: int) -> None:
        assert readers >= 1
        self.folder = folder  # experts.zarr
        self.manifest = manifest
        self._fork_guard = ForkGuard()
        self._shards: dict[int, OpenShard] = {}
        self._faults: dict[int, StoreError] = {}
        self._digest_check: threading.Thread | None = None
        self._closing = threading.Event()  # ends the thread ``_digest_check``
        self._fault = Future[ChecksumError]()  # done if the records turn out to have another digest than the manifest
        self._use = UseCount(f"The store {folder}")  # a descriptor closed during a read could be reused
        self.pool = ThreadPoolExecutor(readers, thread_name_prefix="moetier-store")  # starts no thread yet

    def check_digest(self) -> None:
        """Compare the digest of the stored checksums with the manifest's, if the manifest has no table of checksums.

        Manifests of older stores have none. If the check takes longer than DIGEST_SECONDS it goes on in the background.
        Raises ChecksumError if a mismatch is found before that; if it is found later, all further reads raise the
        error.
        """
        if self.manifest.record_checksums:
            return
        check = threading.Thread(target=self._compare_digest, name="moetier-digest", daemon=True)
        check.start()
        self._digest_check = check
        self._digest_check.join(DIGEST_SECONDS)
        if self._fault.done():
            raise self._fault.result()

    def _compare_digest(self) -> None:
        checksums, began = [], time.monotonic()
        try:
            for _, shard in sorted(self._shards.items()):
                with read_errors(shard.file.path):
                    for crc in shard.file.stored_checksums(shard.descriptor):
                        checksums.append(crc)
                        if (seconds := time.monotonic() - began) > DIGEST_SECONDS:  # leave the disk to reads of records
                            self._closing.wait(seconds * (1 / DIGEST_SHARE - 1))
                            began = time.monotonic()
                        if self._closing.is_set():
                            return
        except StoreError as error:  # a read of these records will raise it
            _log.warning("The digest of %s is not checked: %s", self.manifest.model, error.cause)
            return
        if (digest := store_digest(checksums)) != self.manifest.digest and not self._closing.is_set():
            self._fault.set_result(foreign_shards(self.manifest, digest, self.folder))

    def on_fault(self, watcher: Callable[[ChecksumError], None]) -> None:
        """Register ``watcher``, which is called in any thread if the records have another digest than the manifest."""
        self._fault.add_done_callback(lambda fault: watcher(fault.result()))

    def on_recovery(self, watcher: Callable[[], None]) -> None:
        """Do nothing: a store of one copy recovers no read. See ``MirroredStore``."""

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """The errors of bad shards, by block. It is empty unless the store was opened with ``damaged``."""
        return self._faults

    @property
    def direct(self) -> bool:
        """True if all shards are read with O_DIRECT."""
        return all(shard.direct for shard in self._shards.values())

    def layout(self, block: int) -> RecordLayout:
        """The layout of a block's records."""
        return self.manifest.layout(block)

    def path(self, block: int) -> Path:
        """The file of a block's records."""
        return ShardFile.of(self.folder, self.manifest, block).path

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Read a record and its checksum into ``buffer``: writable, ``slot_bytes`` long, beginning on a page.

        Args:
            key: the expert.
            buffer: the slot. After an error its content is undefined.
            pause: if given, the record is read in pieces, and ``pause`` is called between two of them. Once it returns
                False, the rest is read without further calls.

        Raises:
            MissingExpertError: the model does not have the expert.
            StoreReadError: the disk has answered with an error. EIO is raised only if a second try fails too.
            ChecksumError: the bytes are not those that were written.
        """
        with self._use:
            shard, offset = self.locate(key)
            view = as_bytes(buffer)
            assert len(view) == shard.file.slot_bytes, f"{len(view)} bytes are no slot"
            assert not shard.direct or _address(view) % PAGE == 0, "not on a page"
            try:
                crc = read_in_steps(view, pause, partial(self._fill, shard, offset))
            except StoreReadError as error:
                raise StoreReadError(f"{_expert(self.manifest, key)}: {error.cause}", error.fix) from error
            shard.uncache(offset, len(view))
            self.check_record(key, view, crc)

    def check_record(self, key: ExpertKey, view: memoryview, crc: int) -> None:
        """Raise ChecksumError unless ``crc``, that of the payload in ``view``, is the stored one and the manifest's."""
        if crc != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
            raise ChecksumError(
                f"{_expert(self.manifest, key)}: checksum mismatch in {self.path(key.block)}.",
                f"{REPAIR} {command('verify', self.folder.parent)} lists all that is damaged.",
            )
        if (known := self.manifest.checksums(key.block)) and crc != known[key.expert]:
            path = self.path(key.block)
            raise foreign_record(f"{_expert(self.manifest, key)}: its record in {path}", path)

    def close(self) -> None:
        """Wait for running reads, then end all threads and close all descriptors. Idempotent.

        In a forked child, only the child's copies of the descriptors are closed.
        """
        self._closing.set()
        check = self._digest_check
        if self._fork_guard.is_owner and check is not None and check is not threading.current_thread():
            check.join()
        self._use.close()
        shards, self._shards = self._shards, {}
        if self._fork_guard.is_owner:
            self.pool.shutdown()
        for shard in shards.values():
            shard.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def locate(self, key: ExpertKey) -> tuple[OpenShard, int]:
        """Return the shard that has the record of ``key``, and the offset of the record in it. Raises StoreError."""
        block, expert = key
        self.manifest.check_keys(block, (key,))
        if self._fault.done():
            raise self._fault.result().with_traceback(None)
        if block in self._faults:
            raise self._faults[block].with_traceback(None)
        shard = self._shards[block]
        return shard, expert * shard.file.slot_bytes

    def _fill(
        self, shard: OpenShard, record: int, start: int, part: memoryview, payload: memoryview, piece: int, crc: int
    ) -> int:
        """Read a part of the record at offset ``record``, as a ``Fill`` for ``read_in_steps``."""
        reads = [
            Read(self.pool, partial(shard.read, record + start + at, part[at : at + piece]), payload[at : at + piece])
            for at in range(0, len(part), piece)
        ]
        return run_reads(reads, crc)


def read_in_steps(view: memoryview, pause: Callable[[], bool] | None, fill: Fill) -> int:
    """Read a record into ``view`` with ``fill``. Return the CRC-32C of the payload.

    ``pause`` is called as ``RecordReader`` specifies.
    """
    payload = view[:-CHECKSUM_BYTES]
    start, step, crc = 0, interruptible_bytes(len(view)), 0
    while pause is not None and start < len(view):
        stop = start + step
        crc = fill(start, view[start:stop], payload[start:stop], step, crc)
        start = stop
        if start < len(view) and not pause():
            pause = None  # read the rest without interruption
    return fill(start, view[start:], payload[start:], PIECE_BYTES, crc) if start < len(view) else crc


def run_reads(reads: Sequence[Read], crc: int) -> int:
    """Run reads of consecutive pieces side by side. Return the CRC-32C of the payload, pieces before them included.

    ``crc`` is the CRC-32C of what is before them.
    """
    if len(reads) == 1:
        reads[0].call()
        return crc32c(reads[0].payload, crc)
    futures = [read.pool.submit(read.call) for read in reads]
    try:
        # Checksum the pieces in order, while later ones are read. This thread reads pieces that no other has begun.
        for read, future in zip(reads, futures, strict=True):
            if future.cancel():
                read.call()
            else:
                future.result()
            crc = crc32c(read.payload, crc)
    finally:
        for future in futures:  # no thread may write to the slot after this function has returned
            if not future.cancel():
                future.exception()
    return crc


def as_bytes(buffer: memoryview) -> memoryview:
    """Return a buffer as a memoryview of bytes [n]."""
    return buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer


def _name(manifest: Manifest, block: int) -> str:
    return f"block {block} ({manifest.blocks[block].path})"


def _expert(manifest: Manifest, key: ExpertKey) -> str:
    return f"{manifest.model}, {_name(manifest, key.block)}, expert {key.expert}"


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])
