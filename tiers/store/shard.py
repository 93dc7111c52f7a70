"""Shard: the file with the records of one block. Computes a shard's sizes and index, and reads from open shards.

A shard has ``slot_bytes`` for each expert: the record and its CRC-32C. After the records comes the index of zarr's
codec ``sharding_indexed``: the offset and size of each record as LE u64, then the CRC-32C of the index as LE u32. See
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import operator
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetier.tiers.closeable import descriptor_closed_on_error
from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError, StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, PAGE_BYTES
from moetier.tiers.manifest import Manifest

from .atomic import read_errors
from .checksum import checksum_bytes, crc32c
from .unchanged import Unchanged

REPAIR = "Restore this file, or remove it and run the same conversion again, which writes only missing files."


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
class OpenShard:
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
