"""ExpertStore: the SSD tier. Opens and checks a store, and reads one record at a time into a slot.

Where every record lies is resolved once, from the shard indexes, and checked against the sizes of the files before
anything is allocated. A read is ``preadv``, with O_DIRECT where the file system allows it, straight into the slot.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np

from moetier.tiers.errors import ChecksumError, StoreError, StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, PAGE, ExpertKey, RecordLayout
from moetier.tiers.locks import ForkGuard, UseCount
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import StagedPrefix, interruptible_bytes

from .atomic import read_errors
from .checksum import crc32c
from .digest import DigestCheck
from .folder import METADATA, check_array, command, read_manifest, store_folder
from .shard import OpenShard, ShardFile, foreign_record, stored_checksums

PIECE_BYTES = 8 << 20  # of one read; a larger record is read in several, side by side


class ExpertStore:
    """The records of one model directory. Thread-safe; keeps one descriptor for each block."""

    @classmethod
    def open(cls, folder: Path, *, readers: int = 4, damaged: bool = False) -> ExpertStore:
        """Opens a model directory or its ``experts.zarr``. ``readers`` threads share the pieces of large records.

        Raises IncompleteStoreError, StoreFormatError, MissingExpertError or StoreReadError when anything but the
        records' own bytes is not as it has to be. With ``damaged`` (for scrubbing) a bad shard is kept in ``faults``
        and the reads of its records raise its error; the digest of an older store is not checked then.
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
        self._digest_check: DigestCheck | None = None
        self._fault: ChecksumError | None = None  # of all shards together
        self._watchers: list[Callable[[ChecksumError], None]] = []
        self._use = UseCount(f"The store {folder}")  # no descriptor is closed, and its number another file's, meanwhile
        self._lock = threading.Lock()  # guards the fault and the watchers
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="moetier-store")  # begins threads when it is used

    def check_digest(self) -> None:
        """Of an older store, whose manifest has no table of checksums, compares all that are stored with the digest: in
        the background, where that takes long. From a mismatch on, all reads raise it. Raises ChecksumError if it is
        found at once."""
        if not self.manifest.record_checksums:
            self._digest_check = DigestCheck(self.manifest, self._shards, self._condemn)
            if self._fault is not None:
                raise self._fault

    def on_fault(self, watcher: Callable[[ChecksumError], None]) -> None:
        """Calls ``watcher``, by any thread, when the digest turns out not to be that of the records."""
        with self._lock:
            self._watchers.append(watcher)
            fault = self._fault
        if fault is not None:
            watcher(fault)

    def _condemn(self, error: ChecksumError) -> None:
        with self._lock:
            self._fault = error
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher(error)

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """What is wrong with whole shards, by block; empty unless opened with ``damaged``."""
        return self._faults

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is in use for every shard."""
        return all(shard.direct for shard in self._shards.values())

    def layout(self, block: int) -> RecordLayout:
        return self.manifest.layout(block)

    def path(self, block: int) -> Path:
        """The file that holds a block's records."""
        return ShardFile.of(self.folder, self.manifest, block).path

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Callable[[], bool] | None = None) -> None:
        """Fills ``buffer`` (writable, ``slot_bytes`` long, begins on a page) with a record and its checksum.

        With a ``pause`` it is read piece by piece, and the pause is called between two, until it is False. Raises
        MissingExpertError for a key that the model does not have, StoreReadError when the disk fails twice,
        ChecksumError when the bytes are not what was written. What the buffer holds then is undefined.
        """
        self.read_rest(key, buffer, _NOTHING, pause)

    @property
    def parts(self) -> ExpertStore:
        return self

    def read_part(self, key: ExpertKey, start: int, part: memoryview) -> None:
        """As ``PartReader`` says."""
        with self._use:
            shard, offset = self._locate(key)
            shard.read(offset + start, part)
            shard.uncache(offset + start, len(part))

    def read_rest(
        self, key: ExpertKey, buffer: memoryview, prefix: StagedPrefix, pause: Callable[[], bool] | None = None
    ) -> None:
        """As ``PartReader`` says; raises what ``read_into`` does."""
        with self._use:
            shard, offset = self._locate(key)
            view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
            assert len(view) == shard.file.slot_bytes, f"{len(view)} bytes are no slot"
            assert not shard.direct or _address(view) % PAGE == 0, "not on a page"
            try:
                crc = self._read(shard, offset, view, prefix, pause)
            except StoreReadError as error:
                raise self._named(key, error) from error
            shard.uncache(offset, len(view))
            if crc != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
                raise ChecksumError(
                    f"{_expert(self.manifest, key)}: checksum mismatch in {shard.file.path}.",
                    f"Check the whole: {command('verify', self.folder.parent)}; then convert again with --overwrite.",
                )
            if (known := self.manifest.checksums(key.block)) and crc != known[key.expert]:
                raise foreign_record(f"{_expert(self.manifest, key)}: its record in {shard.file.path}", shard.file.path)

    def record_crcs(self, block: int) -> tuple[int, ...]:
        """The crc32c stored behind each of a block's records, in the order of its experts."""
        with self._use:
            shard, _ = self._locate(ExpertKey(block, 0))
            with read_errors(shard.file.path):
                return tuple(stored_checksums(shard.file.path, shard.offsets, shard.file.slot_bytes))

    def close(self) -> None:
        """Waits for reads under way; no descriptor and no thread is left. Idempotent.

        In a forked child there is nothing to wait for: only its own descriptors go.
        """
        if self._fork_guard.is_owner and self._digest_check is not None:
            self._digest_check.close()
        self._use.close()
        shards, self._shards = self._shards, {}
        if self._fork_guard.is_owner:
            self._pool.shutdown()
        for shard in shards.values():
            shard.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _named(self, key: ExpertKey, error: StoreReadError) -> StoreReadError:
        return StoreReadError(f"{_expert(self.manifest, key)}: {error.cause}", error.fix)

    def _locate(self, key: ExpertKey) -> tuple[OpenShard, int]:
        block, expert = key
        self.manifest.check_keys(block, (key,))
        if self._fault is not None:
            raise self._fault.with_traceback(None)
        if block in self._faults:
            raise self._faults[block]
        shard = self._shards[block]
        return shard, shard.offsets[expert]

    def _read(
        self,
        shard: OpenShard,
        offset: int,
        view: memoryview,
        prefix: StagedPrefix,
        pause: Callable[[], bool] | None,
    ) -> int:
        """Reads a record, but for its beginning, and returns the crc32c of its payload, as it is in ``view`` in the
        end."""
        payload = view[:-CHECKSUM_BYTES]
        start, step = prefix.length, interruptible_bytes(len(view))

        def before() -> int:
            prefix.copy(view)
            return crc32c(payload[: prefix.length])

        crc = before
        while pause is not None and start < len(view):
            shard.read(offset + start, view[start : start + step])
            crc = partial(int, crc32c(payload[start : start + step], crc()))
            start += step
            if start < len(view) and not pause():
                pause = None  # the rest as one that nobody may interrupt
        if len(view) - start > PIECE_BYTES:
            return self._read_side_by_side(shard, offset, view, start, crc)
        if start < len(view):
            shard.read(offset + start, view[start:])
        return crc32c(payload[start:], crc())

    def _read_side_by_side(
        self, shard: OpenShard, offset: int, view: memoryview, start: int, before: Callable[[], int]
    ) -> int:
        """From ``start`` on; ``before`` gives the crc32c of what is before, once that is there."""
        payload = view[:-CHECKSUM_BYTES]
        starts = range(start, len(view), PIECE_BYTES)
        pieces: list[Future[None]] = [
            self._pool.submit(shard.read, offset + start, view[start : start + PIECE_BYTES]) for start in starts
        ]
        try:
            crc = before()
            # In order: each piece is checksummed while later ones are read. This thread takes one that none has begun.
            for start, piece in zip(starts, pieces, strict=True):
                if piece.cancel():
                    shard.read(offset + start, view[start : start + PIECE_BYTES])
                else:
                    piece.result()
                crc = crc32c(payload[start : start + PIECE_BYTES], crc)
        finally:
            for piece in pieces:  # nobody may write to the slot once this has returned
                if not piece.cancel():
                    piece.exception()
        return crc


def _name(manifest: Manifest, block: int) -> str:
    return f"block {block} ({manifest.blocks[block].path})"


def _expert(manifest: Manifest, key: ExpertKey) -> str:
    return f"{manifest.model}, {_name(manifest, key.block)}, expert {key.expert}"


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def _nothing(view: memoryview) -> None:
    """Is there already."""


_NOTHING = StagedPrefix(0, _nothing)
