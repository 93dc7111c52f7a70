"""Shard: the file of one block, its geometry, its index, and reading from it.

A shard holds ``experts`` records of ``slot_bytes`` (payload, CRC-32C), then the index of zarr's ``sharding_indexed``
codec: an (offset, size) pair of LE u64 for each record, then the CRC-32C of these pairs as LE u32.
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
from itertools import pairwise
from pathlib import Path

import numpy as np

from moetier.tiers.errors import ChecksumError, MissingExpertError, StoreFormatError, StoreReadError
from moetier.tiers.layout import CHECKSUM_BYTES, PAGE
from moetier.tiers.manifest import Manifest

from .atomic import read_errors
from .checksum import checksum_bytes, crc32c

EMPTY = 2**64 - 1  # offset and size of a record that was not written
REPAIR = "Restore the file, or remove it and run the same conversion again: it makes only what is missing."


@dataclass(frozen=True, slots=True)
class ShardFile:
    """Path and geometry of one block's shard."""

    path: Path
    experts: int
    slot_bytes: int

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, block: int) -> ShardFile:
        """Describe the shard of a block in the store at ``folder``."""
        entry = manifest.blocks[block]
        path = folder / entry.array / "c" / str(entry.index) / "0" / "0"
        return cls(path, entry.experts, manifest.layout(block).slot_bytes)

    @property
    def data_bytes(self) -> int:
        """Bytes of all records with their checksums."""
        return self.experts * self.slot_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of the index with its checksum."""
        return 16 * self.experts + CHECKSUM_BYTES

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.data_bytes + self.index_bytes

    @property
    def offsets(self) -> range:
        """Offsets of records that lie in the order of their experts, as the writer writes them."""
        return range(0, self.data_bytes, self.slot_bytes)

    def make_index(self) -> bytes:
        """Encode the index of records that lie in the order of their experts."""
        pairs = np.empty((self.experts, 2), "<u8")
        pairs[:, 0] = self.offsets
        pairs[:, 1] = self.slot_bytes
        payload = pairs.tobytes()
        return payload + checksum_bytes(crc32c(payload))

    def parse_index(self, index: bytes) -> tuple[int, ...]:
        """Parse an index into the records' offsets, -1 for a missing record. Raises ValueError for a wrong index."""
        payload, stored = index[:-CHECKSUM_BYTES], index[-CHECKSUM_BYTES:]
        if checksum_bytes(crc32c(payload)) != stored:
            raise ValueError("the checksum of its index does not match")
        offsets: list[int] = []
        for expert, (offset, size) in enumerate(np.frombuffer(payload, "<u8").reshape(-1, 2).tolist()):
            if offset == size == EMPTY:
                offsets.append(-1)
                continue
            if size != self.slot_bytes:
                raise ValueError(f"expert {expert} has {size:,} bytes in its index, expected {self.slot_bytes:,}")
            if offset % PAGE:
                raise ValueError(f"expert {expert} begins at {offset:,}, which is not a multiple of {PAGE}")
            if offset + size > self.data_bytes:
                raise ValueError(
                    f"expert {expert} would end at {offset + size:,}, behind its {self.data_bytes:,} bytes of data"
                )
            offsets.append(offset)
        placed = sorted(offset for offset in offsets if offset >= 0)
        if any(after - before < self.slot_bytes for before, after in pairwise(placed)):
            raise ValueError("two experts overlap in its index")
        return tuple(offsets)


def stored_checksums(place: str | Path, offsets: Iterable[int], slot_bytes: int) -> Iterator[int]:
    """Yield the checksum stored after each record of the shard at ``place``.

    To read from the very file that a descriptor refers to, give ``/proc/self/fd/N``.
    """
    with open(place, "rb", buffering=0) as stream:  # noqa: PTH123 - a new open file description, without O_DIRECT
        descriptor = stream.fileno()
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # four bytes a record: no read-ahead
        for offset in offsets:
            yield int.from_bytes(os.pread(descriptor, CHECKSUM_BYTES, offset + slot_bytes - CHECKSUM_BYTES), "little")


def store_digest(checksums: Iterable[int]) -> str:
    """Compute the digest that identifies a store: sha256 over the CRC-32C (LE u32) of every record, block by block."""
    return hashlib.sha256(b"".join(map(checksum_bytes, checksums))).hexdigest()


@dataclass(frozen=True, slots=True)
class OpenShard:
    """An open shard whose index has been checked. Thread-safe, except for ``close``."""

    file: ShardFile
    descriptor: int
    offsets: tuple[int, ...]
    direct: bool  # O_DIRECT: buffers, offsets and lengths must be of whole pages

    @classmethod
    def open(cls, file: ShardFile, name: str, checksums: Sequence[int] = ()) -> OpenShard:
        """Open a shard, check its size and its index, and try O_DIRECT by a real read.

        Args:
            file: path and expected geometry.
            name: the block's name in errors.
            checksums: those of the records, if they are known. The last record's, which lies before the index, is
                compared; if it differs, all are, as the shard may belong to another conversion.

        Raises:
            MissingExpertError: the file or a record is missing.
            StoreFormatError: the file has another size, or a wrong index.
            ChecksumError: the records are those of another conversion.
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
            try:
                offsets = file.parse_index(end[CHECKSUM_BYTES:])
            except ValueError as error:
                raise StoreFormatError(
                    f"{name}: its shard {file.path} can't be used: {error}.",
                    REPAIR,
                ) from error
            if -1 in offsets:
                raise MissingExpertError(
                    f"{name}: its shard {file.path} has no record of expert {offsets.index(-1)}.",
                    "Convert the model again.",
                )
            last = offsets.index(file.data_bytes - file.slot_bytes)
            if checksums and checksums[last] != int.from_bytes(end[:CHECKSUM_BYTES], "little"):
                with read_errors(file.path):
                    stored = stored_checksums(f"/proc/self/fd/{descriptor}", offsets, file.slot_bytes)
                    differing = sum(map(operator.ne, stored, checksums))
                if differing > 1:  # a single one may be a flipped bit
                    raise foreign_record(f"{name}: its shard {file.path}", file.path)
            return cls(file, descriptor, offsets, _try_direct(descriptor))
        except BaseException:
            os.close(descriptor)
            raise

    def read(self, offset: int, view: memoryview) -> None:
        """Fill ``view``. Continues after short reads and retries once after EIO. Raises StoreReadError."""
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
        """Without O_DIRECT, drop a range from the page cache: the host tier is the cache."""
        if not self.direct:
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def foreign_record(what: str, path: Path) -> ChecksumError:
    """Make the error for intact records of another conversion: another model of the same shape, or other options."""
    return ChecksumError(
        f"{what} is not the one that the manifest knows: it is of another conversion.",
        f"Copy {path} again from where the model directory came from, or convert the model again with --overwrite.",
    )


def _try_direct(descriptor: int) -> bool:
    """Switch a descriptor to O_DIRECT if a read shows that the file system supports it. Return whether it does."""
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
