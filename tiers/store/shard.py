"""Shard: the file with the records of one block. This module computes its sizes and its index, and reads from it.

A shard holds one record of ``slot_bytes`` for each expert, its CRC-32C included, and then the index of zarr's
``sharding_indexed`` codec: an (offset, size) pair of LE u64 for each record, then the CRC-32C of these pairs as LE u32.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError, StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, PAGE
from moetier.tiers.manifest import Manifest

from .atomic import read_errors
from .checksum import checksum_bytes, crc32c

REPAIR = "Restore the file, or remove it and run the same conversion again: it makes only what is missing."


@dataclass(frozen=True, slots=True)
class ShardFile:
    """Path and sizes of one block's shard."""

    path: Path
    experts: int  # number of records
    slot_bytes: int  # size of a record with its checksum

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, block: int) -> ShardFile:
        """Describe the shard of a block in the store at ``folder``."""
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
        """Encode the index, with its checksum. Records are in the order of their experts."""
        pairs = np.empty((self.experts, 2), "<u8")
        pairs[:, 0] = range(0, self.data_bytes, self.slot_bytes)
        pairs[:, 1] = self.slot_bytes
        payload = pairs.tobytes()
        return payload + checksum_bytes(crc32c(payload))

    def stored_checksums(self, descriptor: int | None = None) -> Iterator[int]:
        """Yield the checksum that is stored after each record.

        If ``descriptor`` is given, read the file that it has open, even if the path now names another file.
        """
        place = self.path if descriptor is None else f"/proc/self/fd/{descriptor}"
        with open(place, "rb", buffering=0) as stream:  # noqa: PTH123 - a new open file description, without O_DIRECT
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # four bytes a record: no read-ahead
            for offset in range(self.slot_bytes - CHECKSUM_BYTES, self.data_bytes, self.slot_bytes):
                yield int.from_bytes(os.pread(stream.fileno(), CHECKSUM_BYTES, offset), "little")


def store_digest(checksums: Iterable[int]) -> str:
    """Compute the digest that identifies a store: sha256 over the CRC-32C (LE u32) of every record, block by block."""
    return hashlib.sha256(b"".join(map(checksum_bytes, checksums))).hexdigest()


@dataclass(frozen=True, slots=True)
class OpenShard:
    """An open shard whose index has been checked. Thread-safe, except for ``close``."""

    file: ShardFile
    descriptor: int
    direct: bool  # opened with O_DIRECT: buffers, offsets and lengths must be multiples of a page

    @classmethod
    def open(cls, file: ShardFile, name: str, checksums: Sequence[int] = ()) -> OpenShard:
        """Open a shard, check its size and its index, and use O_DIRECT if a trial read with it succeeds.

        Args:
            file: path and expected sizes.
            name: the block's name in errors.
            checksums: the records' checksums, if the manifest has them. The last record's, which is stored right before
                the index, is compared. If it differs, all are compared, as the shard may be of another conversion.

        Raises:
            MissingExpertError: the file is missing.
            StoreFormatError: the file has another size, or a wrong index.
            ChecksumError: the records are of another conversion.
            StoreReadError: the disk has answered with an error.
        """
        try:
            with read_errors(file.path):
                descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingExpertError(
                f"{name}: its shard {file.path} is missing, {file.file_bytes:,} bytes were expected.",
                REPAIR,
            ) from None
        try:
            with read_errors(file.path):
                size = os.fstat(descriptor).st_size
                if size != file.file_bytes:
                    raise StoreFormatError(
                        f"{name}: its shard {file.path} has {size:,} bytes, {file.file_bytes:,} were expected.",
                        REPAIR,
                    )
                end = os.pread(descriptor, CHECKSUM_BYTES + file.index_bytes, file.data_bytes - CHECKSUM_BYTES)
            if end[CHECKSUM_BYTES:] != file.make_index():
                raise StoreFormatError(
                    f"{name}: the index at the end of its shard {file.path} is not the one that was written.", REPAIR
                )
            if checksums and checksums[-1] != int.from_bytes(end[:CHECKSUM_BYTES], "little"):
                with read_errors(file.path):
                    differing = sum(map(operator.ne, file.stored_checksums(descriptor), checksums))
                if differing > 1:  # a single difference may be a flipped bit, which a read of that record detects
                    raise foreign_record(f"{name}: its shard {file.path}", file.path)
            return cls(file, descriptor, _try_direct(descriptor))
        except BaseException:
            os.close(descriptor)
            raise

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``offset`` on. Continues after short reads, and retries once after EIO.

        Raises StoreReadError.
        """
        done, retried = 0, False
        with read_errors(self.file.path):
            while done < len(view):
                try:
                    count = os.preadv(self.descriptor, [view[done:]], offset + done)
                except OSError as error:
                    if error.errno != errno.EIO or retried:
                        raise
                    retried = True
                    continue
                if self.direct:
                    count -= count % PAGE  # the next read must begin on a page again
                if not count:
                    raise StoreReadError(
                        f"{self.file.path} ends before byte {offset + len(view):,}: it was cut while it was in use.",
                        REPAIR,
                    )
                done += count

    def uncache(self, offset: int, length: int) -> None:
        """Drop a range of bytes from the page cache, as the host tier is the cache. Does nothing with O_DIRECT."""
        if not self.direct:
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def foreign_record(what: str, path: Path) -> ChecksumError:
    """Make the error for intact records of another conversion, of another model or with other options.

    ``what`` is the subject of the error message.
    """
    return ChecksumError(
        f"{what} is not the one that the manifest knows: it is of another conversion.",
        f"Copy {path} again from where the model directory came from, or convert the model again with --overwrite.",
    )


def foreign_shards(manifest: Manifest, digest: str, folder: Path) -> ChecksumError:
    """Make the error for a store whose records have another ``digest`` than its manifest.

    The digest is of all records together, so it does not tell which shards are wrong.
    """
    return ChecksumError(
        f"{manifest.model}: the shards in {folder} are not all of one conversion: which of them, this manifest of an "
        f"older moetier does not say. The digest of their records is {digest}, the manifest says {manifest.digest}.",
        "Copy the shards again from where the model directory came from, or convert the model again with --overwrite.",
    )


def _try_direct(descriptor: int) -> bool:
    """Switch a descriptor to O_DIRECT if a trial read with it succeeds. Return whether it is switched."""
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
