"""ExpertStore: the SSD tier. Opens and checks a store, and reads one record at a time into a slot.

Where every record lies is resolved once, from the shard indexes, and checked against the sizes of the files before
anything is allocated. A read is ``preadv``, with O_DIRECT where the file system allows it, straight into the slot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np

from .errors import (
    ChecksumError,
    ClosedError,
    MissingExpertError,
    StoreError,
    StoreFormatError,
    StoreReadError,
)
from .folder import check_array, command, read_errors, read_manifest, store_folder
from .keys import CHECKSUM_BYTES, PAGE, ExpertKey, RecordLayout
from .manifest import Manifest
from .monitor import Home
from .shard import METADATA, ShardFile, read_checksums

PIECE_BYTES = 8 << 20  # of one read; a larger record is read in several, side by side
INTERRUPTIBLE_BYTES = 2 << 20  # of one read, at least, where it may be interrupted


@dataclass(frozen=True, slots=True)
class _Shard:
    """An open shard file and where its records begin."""

    file: ShardFile
    descriptor: int
    offsets: tuple[int, ...]
    direct: bool


class ExpertStore:
    """The records of one model directory. Thread-safe; keeps one descriptor for each block."""

    @classmethod
    def open(cls, folder: Path, *, readers: int = 4, damaged: bool = False) -> ExpertStore:
        """Opens a model directory or its ``experts.zarr``. ``readers`` threads share the pieces of large records.

        Raises IncompleteStoreError, StoreFormatError, MissingExpertError or StoreReadError when anything but the
        records' own bytes is not as it has to be. With ``damaged`` (for scrubbing) a bad shard is kept in ``faults``
        and the reads of its records raise its error.
        """
        folder = store_folder(folder)
        manifest = read_manifest(folder)
        for array in manifest.layouts:
            check_array(folder / array / METADATA, manifest, array)
        store = cls(folder, manifest, readers)
        try:
            for block in range(len(manifest.blocks)):
                try:
                    store._shards[block] = _open_shard(ShardFile.of(folder, manifest, block), _name(manifest, block))
                except StoreError as error:
                    if not damaged:
                        raise
                    store._faults[block] = error
        except BaseException:
            store.close()
            raise
        store._direct = all(shard.direct for shard in store._shards.values())
        return store

    def __init__(self, folder: Path, manifest: Manifest, readers: int) -> None:
        assert readers >= 1
        self.folder = folder  # experts.zarr
        self.manifest = manifest
        self._readers = readers
        self._home = Home()
        self._shards: dict[int, _Shard] = {}
        self._faults: dict[int, StoreError] = {}
        self._direct = False
        self._state = threading.Condition()  # guards the three below
        self._pool: ThreadPoolExecutor | None = None
        self._reading = 0  # calls that use a descriptor now
        self._closed = False

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """What is wrong with whole shards, by block; empty unless opened with ``damaged``."""
        return self._faults

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is in use for every shard."""
        return self._direct

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
        with self._in_use():
            shard, offset = self._locate(key)
            view = buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
            assert len(view) == shard.file.slot_bytes, f"{len(view)} bytes are no slot"
            assert not shard.direct or np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0, "not on a page"
            crc = self._read(shard, offset, view, pause)
            if not shard.direct:  # the host tier is the cache: the page cache would hold everything twice
                os.posix_fadvise(shard.descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
            if crc != int.from_bytes(view[-CHECKSUM_BYTES:], "little"):
                raise ChecksumError(
                    f"{self.manifest.model}, {_name(self.manifest, key.block)}, expert {key.expert}: "
                    f"checksum mismatch in {shard.file.path}.",
                    f"Check the whole: {command('verify', self.folder.parent)}; then convert again with --overwrite.",
                )

    def record_crcs(self, block: int) -> tuple[int, ...]:
        """The crc32c stored behind each of a block's records, in the order of its experts."""
        with self._in_use():
            shard, _ = self._locate(ExpertKey(block, 0))
            with read_errors(shard.file.path), shard.file.path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # four bytes a record: no read-ahead
                return read_checksums(stream.fileno(), shard.offsets, shard.file.slot_bytes)

    def close(self) -> None:
        """Waits for reads under way; no descriptor and no thread is left. Idempotent.

        In a forked child there is nothing to wait for: only its own descriptors go.
        """
        pool = None
        if self._home.is_here:
            with self._state:
                self._closed = True
                self._state.wait_for(lambda: not self._reading)
                pool, self._pool = self._pool, None
        shards, self._shards = self._shards, {}
        if pool is not None:
            pool.shutdown()
        for shard in shards.values():
            os.close(shard.descriptor)

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        """No descriptor is closed, and its number given to another file, while somebody reads from it."""
        self._home.check()
        with self._state:
            if self._closed:
                raise ClosedError(f"The store {self.folder} was closed.", "Open it again.")
            self._reading += 1
        try:
            yield
        finally:
            with self._state:
                self._reading -= 1
                self._state.notify_all()

    def _locate(self, key: ExpertKey) -> tuple[_Shard, int]:
        block, expert = key
        if not 0 <= block < len(self.manifest.blocks):
            raise MissingExpertError(
                f"{self.manifest.model} has no block {block}.", f"Its blocks are 0 to {len(self.manifest.blocks) - 1}."
            )
        experts = self.manifest.blocks[block].experts
        if not 0 <= expert < experts:
            raise MissingExpertError(
                f"{self.manifest.model}, {_name(self.manifest, block)} has no expert {expert}.",
                f"Its experts are 0 to {experts - 1}.",
            )
        if block in self._faults:
            raise self._faults[block]
        shard = self._shards[block]
        return shard, shard.offsets[expert]

    def _read(self, shard: _Shard, offset: int, view: memoryview, pause: Callable[[], bool] | None) -> int:
        """Reads a record and returns the crc32c of its payload."""
        payload = np.frombuffer(view, np.uint8)[:-CHECKSUM_BYTES]
        if pause is None and len(view) > PIECE_BYTES:
            return self._read_side_by_side(shard, offset, view, payload)
        crc, start = 0, 0
        while start < len(view):
            if pause is not None and start and not pause():
                pause = None
            end = len(view) if pause is None else start + _step(len(view))
            _read_piece(shard, offset + start, view[start:end])
            crc = google_crc32c.extend(crc, payload[start:end])
            start = end
        return crc

    def _read_side_by_side(self, shard: _Shard, offset: int, view: memoryview, payload: Any) -> int:
        crc, pool = 0, self._readers_pool()
        starts = range(0, len(view), PIECE_BYTES)
        pieces: list[Future[None]] = [
            pool.submit(_read_piece, shard, offset + start, view[start : start + PIECE_BYTES]) for start in starts
        ]
        try:
            # In order: each piece is checksummed while later ones are read. This thread takes one that none has begun.
            for start, piece in zip(starts, pieces, strict=True):
                if piece.cancel():
                    _read_piece(shard, offset + start, view[start : start + PIECE_BYTES])
                else:
                    piece.result()
                crc = google_crc32c.extend(crc, payload[start : start + PIECE_BYTES])
        finally:
            for piece in pieces:  # nobody may write to the slot once this has returned
                if not piece.cancel():
                    piece.exception()
        return crc

    def _readers_pool(self) -> ThreadPoolExecutor:
        with self._state:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._readers, thread_name_prefix="moetier-store")
            return self._pool


def _open_shard(file: ShardFile, name: str) -> _Shard:
    """Opens a shard, checks it from its size to the last offset in its index, and tries O_DIRECT by a real read."""
    try:
        with read_errors(file.path):
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MissingExpertError(
            f"{name}: its shard {file.path} is missing, {file.file_bytes:,} bytes were expected.",
            "Restore the file, or convert the model again.",
        ) from None
    try:
        with read_errors(file.path):
            size = os.fstat(descriptor).st_size
            if size != file.file_bytes:
                raise StoreFormatError(
                    f"{name}: its shard {file.path} has {size:,} bytes, {file.file_bytes:,} were expected.",
                    "Restore the file, or convert the model again.",
                )
            index = os.pread(descriptor, file.index_bytes, file.data_bytes)
        try:
            offsets = file.parse_index(index)
        except ValueError as error:
            raise StoreFormatError(
                f"{name}: its shard {file.path} can't be used: {error}.",
                "Restore the file, or convert the model again.",
            ) from error
        if -1 in offsets:
            raise MissingExpertError(
                f"{name}: its shard {file.path} has no record of expert {offsets.index(-1)}.",
                "Convert the model again.",
            )
        return _Shard(file, descriptor, offsets, _try_direct(descriptor))
    except BaseException:
        os.close(descriptor)
        raise


def _try_direct(descriptor: int) -> bool:
    """Switches a descriptor to O_DIRECT if a read shows that its file system can; else leaves it buffered."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with mmap.mmap(-1, PAGE) as page:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            if os.preadv(descriptor, [page], 0) == PAGE:
                return True
        except OSError:
            pass
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return False


def _step(length: int) -> int:
    """Of a read that others may interrupt: an eighth of it, in whole pages, so that they wait for no more; and enough
    to be worth a call."""
    return max(INTERRUPTIBLE_BYTES, -(-length // (8 * PAGE)) * PAGE)


def _read_piece(shard: _Shard, offset: int, view: memoryview) -> None:
    """Fills ``view``; continues after short reads, and tries once more after an I/O error."""
    done, retried = 0, False
    with read_errors(shard.file.path):
        while done < len(view):
            try:
                count = os.preadv(shard.descriptor, [view[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EIO or retried:
                    raise
                retried = True
                continue
            if shard.direct:
                count -= count % PAGE  # the next read has to begin on a page again
            if not count:
                raise StoreReadError(
                    f"{shard.file.path} ends before byte {offset + len(view):,}: it was cut while it was in use.",
                    "Restore the file, or convert the model again.",
                )
            done += count


def _name(manifest: Manifest, block: int) -> str:
    return f"block {block} ({manifest.blocks[block].path})"
