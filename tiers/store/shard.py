"""Shard: the file with the records of one block. Computes a shard's sizes and index, and reads records in pieces.

A shard has ``slot_bytes`` for each expert: the record and its CRC-32C. After the records comes the index of zarr's
codec ``sharding_indexed``: the offset and size of each record as LE u64, then the CRC-32C of the index as LE u32. See
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html

Other stores read their records in pieces, too: several at the same time, and with pauses between its parts if a record
is prefetched (``read_in_pieces``, ``run_reads``).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import operator
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moetier.tiers.closeable import Closeable, descriptor_closed_on_error
from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError, StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, PAGE_BYTES
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import interruptible_bytes

from .atomic import read_errors
from .checksum import READ_PIECE_BYTES, checksum_bytes, crc32c
from .unchanged import Unchanged

Pause = Callable[[], bool]
"""Type of a function that a read calls between two pieces of a record. See ``Store.read_into``."""

REPAIR = "Restore this file, or remove it and run the same conversion again, which writes only missing files."

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """Path and sizes of one block's shard."""

    path: Path
    experts: int  # number of records
    slot_bytes: int  # size of a record with its checksum, in bytes

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, block: int) -> ShardFile:
        """Return path and sizes of the shard of ``block``. ``folder`` is the store's folder ``experts.zarr``."""
        entry = manifest.blocks[block]
        path = folder / entry.array / "c" / str(entry.index) / "0" / "0"
        return cls(path, entry.experts, manifest.layout(block).slot_bytes)

    @property
    def data_bytes(self) -> int:
        """Size of all records with their checksums, in bytes."""
        return self.experts * self.slot_bytes

    @property
    def index_bytes(self) -> int:
        """Size of the index with its checksum, in bytes."""
        return 16 * self.experts + CHECKSUM_BYTES

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, in bytes."""
        return self.data_bytes + self.index_bytes

    def make_index(self) -> bytes:
        """Return the bytes of the index and its checksum. Records are in the order of their experts."""
        payload = b"".join(struct.pack("<QQ", at, self.slot_bytes) for at in range(0, self.data_bytes, self.slot_bytes))
        return payload + checksum_bytes(crc32c(payload))

    def stored_checksums(self, descriptor: int | None = None) -> Iterator[int]:
        """Yield the checksum that is stored after each record.

        ``descriptor`` is an open file descriptor of the shard, or None to open ``path``. The descriptor still refers to
        the same shard if ``path`` was replaced.
        """
        place = self.path if descriptor is None else f"/proc/self/fd/{descriptor}"
        with open(place, "rb", buffering=0) as stream:  # noqa: PTH123 - a new open file description, without O_DIRECT
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: only 4 bytes per record
            for offset in range(self.slot_bytes - CHECKSUM_BYTES, self.data_bytes, self.slot_bytes):
                yield int.from_bytes(os.pread(stream.fileno(), CHECKSUM_BYTES, offset), "little")


def store_digest(checksums: Iterable[int]) -> str:
    """Return the digest of a store: the sha256 of the CRC-32C (LE u32) of every record, block after block."""
    return hashlib.sha256(b"".join(map(checksum_bytes, checksums))).hexdigest()


@dataclass(frozen=True, slots=True)
class OpenShard(Closeable):
    """An open shard whose size and index were checked. Thread-safe, except for ``close``."""

    file: ShardFile
    descriptor: int
    is_direct: bool  # true with O_DIRECT: addresses, offsets and lengths of reads must be multiples of PAGE_BYTES
    unchanged: Unchanged | None = None  # notices writes to the file after each read; None: records have checksums

    @classmethod
    def open(
        cls, file: ShardFile, name: str, checksums: Sequence[int] = (), *, has_checksums: bool = True
    ) -> OpenShard:
        """Open a shard, and check its size and its index. Use O_DIRECT if a trial read with O_DIRECT succeeds.

        Args:
            file: path and expected sizes.
            name: name of the block in error messages.
            checksums: the checksums of the block's records in the manifest; () if the manifest has none. The stored
                checksum of the last record is compared. If it differs, all are compared: the shard may belong to
                another conversion.
            has_checksums: whether the manifest has checksums, so that a record of another conversion is noticed.

        Raises:
            MissingExpertError: the file is missing.
            StoreFormatError: the file has another size, or a wrong index.
            ChecksumError: the records belong to another conversion.
            StoreReadError: the system reported an error when the file was read.
        """
        try:
            with read_errors(file.path):
                descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingExpertError(
                f"{name}: its shard {file.path} is missing; it should have {file.file_bytes:,} bytes.",
                "Restore this file, or run the same conversion again, which writes only missing files.",
            ) from None
        with descriptor_closed_on_error(descriptor):
            with read_errors(file.path):
                size = os.fstat(descriptor).st_size
                if size != file.file_bytes:
                    raise StoreFormatError(
                        f"{name}: its shard {file.path} has {size:,} bytes; {file.file_bytes:,} were expected.", REPAIR
                    )
                end = os.pread(descriptor, CHECKSUM_BYTES + file.index_bytes, file.data_bytes - CHECKSUM_BYTES)
            if end[CHECKSUM_BYTES:] != file.make_index():
                raise StoreFormatError(
                    f"{name}: the index at the end of its shard {file.path} is not the one that was written.", REPAIR
                )
            if checksums and checksums[-1] != int.from_bytes(end[:CHECKSUM_BYTES], "little"):
                with read_errors(file.path):
                    differing = sum(map(operator.ne, file.stored_checksums(descriptor), checksums))
                if differing > 1:  # a single difference may be a flipped bit, which a read of the record detects
                    raise foreign_record(f"{name}: its shard {file.path}", file.path)
            unchanged = None if has_checksums else Unchanged(file.path, descriptor, REPAIR)
            return cls(file, descriptor, try_direct(descriptor), unchanged)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on, as ``read_at`` does.

        Raises StoreReadError, and StoreFormatError if the records have no checksums and the file was written to.
        """
        read_at(self.file.path, self.descriptor, offset, view, direct=self.is_direct)
        if self.unchanged is not None:
            self.unchanged.check()

    def uncache(self, offset: int, length: int) -> None:
        """Drop a range of bytes from the page cache, since the host tier caches them. Does nothing with O_DIRECT.

        Raises StoreReadError.
        """
        if not self.is_direct:
            with read_errors(self.file.path):
                os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


def read_at(
    path: Path, descriptor: int, offset: int, view: memoryview, *, direct: bool, least: int | None = None
) -> None:
    """Fill ``view`` with bytes of a file. Continues after short reads, and retries once after EIO.

    Args:
        path: the file's name in errors.
        descriptor: the open file.
        offset: of the first byte in the file.
        view: memory for the bytes; with ``direct``, it fills whole pages, and so does what is before it in the file.
        direct: whether the descriptor has O_DIRECT.
        least: number of bytes that the file must have from ``offset`` on; None: all of ``view``.

    Raises:
        StoreReadError: the disk has answered with an error, or the file ends too early.
    """
    done, retried, least = 0, False, len(view) if least is None else least
    with read_errors(path):
        while done < least:
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EIO or retried:
                    raise
                retried = True
                continue
            if done + count >= least:
                return
            if direct:
                count -= count % PAGE_BYTES  # after a short read, the next read must begin on a page again
            if not count:
                raise StoreReadError(
                    f"{path} ends before byte {offset + least:,}: it was truncated while in use.", REPAIR
                )
            done += count


def foreign_record(what: str, path: Path) -> ChecksumError:
    """Return the error for records that are intact but belong to another conversion than the manifest.

    ``what`` is the subject of the error message: a record, or the shard ``path``.
    """
    return ChecksumError(
        f"{what} belongs to another conversion than the manifest.",
        f"Copy {path} from the original of this model directory, or convert the model again with --overwrite.",
    )


def foreign_shards(manifest: Manifest, digest: str, folder: Path) -> ChecksumError:
    """Return the error for a store whose records have the digest ``digest``, and not that of the manifest.

    A digest covers all records together, so it does not show which shards are wrong.
    """
    return ChecksumError(
        f"{manifest.model}: the shards in {folder} are not all of one conversion. Their records have the digest "
        f"{digest}; the manifest says {manifest.digest}. The store is too old to tell which shards are wrong.",
        "Copy the shards from the original of this model directory, or convert the model again with --overwrite.",
    )


def try_direct(descriptor: int) -> bool:
    """Switch an open file to O_DIRECT if a trial read with O_DIRECT succeeds. Return whether it succeeded."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with mmap.mmap(-1, PAGE_BYTES) as page:
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            if os.preadv(descriptor, [page], 0) == PAGE_BYTES:
                return True
        except OSError:
            pass
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return False


class RecordPart(NamedTuple):
    """A part of a record, which is read in pieces."""

    start: int  # offset of the part in the record
    memory: memoryview  # for the part
    payload: memoryview  # the same memory, without the record's checksum if the part includes that
    piece_bytes: int  # largest size of a single read

    def pieces(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, memoryview, memoryview]]:
        """Yield the pieces of the bytes from ``first`` to ``end`` of the part.

        For each, yields its offset in the record, its memory, and that memory without the record's checksum.
        """
        end = len(self.memory) if end is None else end
        for at in range(first, end, self.piece_bytes):
            stop = min(at + self.piece_bytes, end)
            yield self.start + at, self.memory[at:stop], self.payload[at:stop]


# reads a part; takes the CRC-32C of the record before the part, and returns that of the record up to the part's end
ReadPart = Callable[[RecordPart, int], int]


class Read(NamedTuple):
    """The read of one piece of a record."""

    threads: ThreadPoolExecutor  # threads that read from the disk that has the piece
    call: Callable[[], None]  # reads the piece
    payload: memoryview  # the memory for the piece, without the record's checksum


def read_in_pieces(view: memoryview, pause: Pause | None, read_part: ReadPart) -> int:
    """Read a record and its checksum into ``view``, in parts, with ``read_part``. Return the CRC-32C of the record.

    ``pause`` is called between two parts, as ``Store.read_into`` specifies. If it is None, there is one part.
    """
    payload = view[:-CHECKSUM_BYTES]
    start, part_bytes, crc = 0, interruptible_bytes(len(view)), 0
    while pause is not None and start < len(view):
        stop = start + part_bytes
        crc = read_part(RecordPart(start, view[start:stop], payload[start:stop], part_bytes), crc)
        start = stop
        if start < len(view) and not pause():
            pause = None  # read the rest in one part
    if start < len(view):
        crc = read_part(RecordPart(start, view[start:], payload[start:], READ_PIECE_BYTES), crc)
    return crc


def run_reads(reads: Sequence[Read], crc: int) -> int:
    """Read consecutive pieces of a record at the same time. Return the CRC-32C of the record up to their end.

    ``crc`` is the CRC-32C of the record before these pieces.
    """
    if len(reads) == 1:
        reads[0].call()
        return crc32c(reads[0].payload, crc)
    pieces = [_Piece(read.call) for read in reads]
    try:
        for read, piece in zip(reads, pieces, strict=True):
            read.threads.submit(piece.read)
    except RuntimeError:  # no thread can be started, or they have ended
        _log.debug("This thread reads what no other one can.", exc_info=True)
    try:
        # Checksum the pieces in order, while later pieces are read. This thread reads pieces that no other thread has
        # begun to read.
        for read, piece in zip(reads, pieces, strict=True):
            piece.wait()
            crc = crc32c(read.payload, crc)
    finally:
        for piece in pieces:  # no thread may write to the slot after this function has returned
            piece.end()
    return crc


class _Piece:
    """A read that is made at most once, by the first thread that begins it."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._lock = threading.Lock()  # guards: the fields below; held while the piece is read
        self._is_over = False
        self._error: BaseException | None = None

    def read(self) -> None:
        """Read the piece, unless it has been read, or ``end`` was called."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
            try:
                self._call()
            except BaseException as error:
                self._error = error

    def wait(self) -> None:
        """Read the piece, or wait for the thread that reads it. Raises the error of the read."""
        self.read()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Wait for the thread that reads the piece. No other thread will read it."""
        with self._lock:
            self._is_over = True


def as_bytes(buffer: memoryview) -> memoryview:
    """Return a view of the same memory with one dimension and items of one byte."""
    return buffer.cast("B") if buffer.format != "B" or buffer.ndim != 1 else buffer
