"""ExtentStore, the SSD tier of a checkpoint: assembles records from extents of its files, and writes nothing.

Pages that cover an extent are read with O_DIRECT into a buffer that begins on a page, and the bytes are copied into the
slot. A record then has the layout and checksum of a record in a store, so nothing above can tell them apart. On a file
system without O_DIRECT, extents are read straight into the slot.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import numpy.typing as npt

from moetier.tiers.closeable import closed_on_error, descriptor_closed_on_error
from moetier.tiers.errors import DOWNLOAD_AGAIN, MissingExpertError, StoreError, StoreFormatError, StoreReadError
from moetier.tiers.headers.gguf import SUFFIX, digest_of
from moetier.tiers.headers.safetensors import MAX_HEADER_BYTES, read_header
from moetier.tiers.layout import PAGE_BYTES, ExpertKey
from moetier.tiers.locks import ForkGuard, UseCount
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.base import READERS, DirectoryStore, Pause
from moetier.tiers.store.checksum import READ_PIECE_BYTES, crc32c
from moetier.tiers.store.folder import command
from moetier.tiers.store.pieces import Read, RecordPart, as_bytes, read_in_pieces, run_reads
from moetier.tiers.store.scrubbable import Problem
from moetier.tiers.store.shard import read_at, try_direct
from moetier.tiers.store.unchanged import Unchanged

from .table import Extent, ExtentTable, Shard

BUFFER_BYTES = (4 << 20) + PAGE_BYTES  # of pages that are read at a time; with 1 MiB, the disk waits for copies


class OpenFile:
    """A shard of a checkpoint, open and compared with the table. Thread-safe, except for ``close``."""

    def __init__(self, path: Path, shard: Shard, fix: str) -> None:
        """Open a shard. ``fix`` is the fix in its errors.

        Raises MissingExpertError, StoreFormatError if it is not the file that the table describes, or StoreReadError.
        """
        self.path = path
        self.fix = fix
        with read_errors(path):
            try:
                self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise MissingExpertError(f"{path}, a file of the checkpoint, is missing.", fix) from None
        with descriptor_closed_on_error(self.descriptor):
            if header_digest(path) != shard.header:
                raise StoreFormatError(f"{path} has another header than before: it was replaced.", fix)
            self._compare(shard)
            self._unchanged = Unchanged(path, self.descriptor, fix)
            self.is_direct = try_direct(self.descriptor)

    def _compare(self, shard: Shard) -> None:
        """Raise StoreFormatError if the file's size, or the time of its last change, is not that of ``shard``."""
        status = os.fstat(self.descriptor)
        if status.st_size != shard.bytes:
            raise StoreFormatError(
                f"{self.path} has {status.st_size:,} bytes, and had {shard.bytes:,}: it was cut or replaced.", self.fix
            )
        if status.st_mtime_ns != shard.mtime_ns:
            raise StoreFormatError(f"{self.path} was changed or replaced: its modification time differs.", self.fix)

    def check_unchanged(self) -> None:
        """Raise StoreFormatError if the file was written to since it was opened."""
        self._unchanged.check()

    def read(self, offset: int, view: memoryview, buffers: SimpleQueue[mmap.mmap]) -> None:
        """Read the bytes from ``offset`` on into ``view``. Raises StoreReadError."""
        try:
            if not self.is_direct:
                read_at(self.path, self.descriptor, offset, view, direct=False)
                os.posix_fadvise(self.descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
                return
            target = np.frombuffer(view, np.uint8)
            with _borrowed(buffers) as buffer:
                source, end = np.frombuffer(buffer, np.uint8), offset + len(view)
                for first in range(offset - offset % PAGE_BYTES, end, BUFFER_BYTES):
                    least = min(end - first, BUFFER_BYTES)
                    pages = memoryview(buffer)[: -(-least // PAGE_BYTES) * PAGE_BYTES]
                    read_at(self.path, self.descriptor, first, pages, direct=True, least=least)
                    begin = max(offset - first, 0)
                    target[first + begin - offset : first + least - offset] = source[begin:least]  # releases the GIL
        except StoreReadError as error:
            raise StoreReadError(error.cause, self.fix) from error

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)


def header_digest(path: Path) -> str:
    """Return the sha256 of the header of a file in safetensors or GGUF.

    Raises StoreFormatError if it has no valid header, or StoreReadError.
    """
    try:
        with read_errors(path):
            is_gguf = path.suffix == SUFFIX
            if is_gguf:
                return digest_of(path)
            return hashlib.sha256(read_header(path, MAX_HEADER_BYTES)[0]).hexdigest()
    except ValueError as error:
        cause = f"{path} is truncated, or no {'GGUF' if is_gguf else 'safetensors'} file: {error}."
        raise StoreFormatError(cause, DOWNLOAD_AGAIN) from error


@contextlib.contextmanager
def _borrowed(buffers: SimpleQueue[mmap.mmap]) -> Iterator[mmap.mmap]:
    try:
        buffer = buffers.get_nowait()
    except Empty:
        buffer = mmap.mmap(-1, BUFFER_BYTES)
    try:
        yield buffer
    finally:
        buffers.put(buffer)


def _narrowed(numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Convert the bytes of fp32 numbers to those of bf16 numbers, rounded to the nearest, ties to even. NaN stays."""
    bits = numbers.view("<u4")
    rounded = np.where(np.isnan(numbers.view("<f4")), 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.frombuffer(rounded.astype("<u2").tobytes(), np.uint8)


def _scatter(rows: npt.NDArray[np.uint8], stride: int, begin: int, target: npt.NDArray[np.uint8]) -> None:
    """Scatter ``rows`` [n, bytes]: row i goes to ``target[begin + i * stride :]``. ``target`` is [bytes].

    ``begin`` may be negative. Bytes outside of ``target`` are left out.
    """
    count, row = rows.shape
    first = -(begin // stride)  # of the rows that lie inside
    end = max(first, min(count, (len(target) - begin - row) // stride + 1))
    if first < end:
        inside = target[begin + first * stride :]
        np.lib.stride_tricks.as_strided(inside, (end - first, row), (stride, 1))[:] = rows[first:end]
    for number in (*range(first), *range(end, count)):
        at = begin + number * stride
        low, high = max(at, 0), min(at + row, len(target))
        if low < high:
            target[low:high] = rows[number, low - at : high - at]


def read_ranges(path: Path, ranges: list[tuple[int, int]]) -> Iterator[memoryview]:
    """Read ranges (first byte, end) of a file in pieces, in order, past the page cache. Each is valid until the next.

    Raises StoreReadError.
    """
    buffer = memoryview(bytearray(READ_PIECE_BYTES))
    with read_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, end in ranges:
            for start in range(first, end, READ_PIECE_BYTES):
                piece = buffer[: min(READ_PIECE_BYTES, end - start)]
                read_at(path, descriptor, start, piece, direct=False)
                with read_errors(path):
                    os.posix_fadvise(descriptor, start, len(piece), os.POSIX_FADV_DONTNEED)
                yield piece
    finally:
        os.close(descriptor)


class ExtentStore(DirectoryStore):
    """The records of one checkpoint. One file descriptor is open for each shard.

    ``runtime.stores.checkpoint_store`` finds the table of a checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        table: ExtentTable,
        paths: Mapping[str, Path],
        *,
        readers: int = READERS,
        damaged: bool = False,
    ) -> None:
        """Open the shards, and compare sizes, times and headers with the table.

        Args:
            folder: the checkpoint.
            table: its extents.
            paths: the path of each shard, by name. The caller has made sure that they belong to the checkpoint.
            readers: number of threads that read pieces of large records.
            damaged: open the store even if shards are bad. The errors are in ``faults``, by block.

        Raises:
            MissingExpertError: a shard is missing.
            StoreFormatError: a shard is not the one that the table describes.
            StoreReadError: the disk has answered with an error.
        """
        self.directory = folder
        self.table = table
        self.manifest = table.manifest
        self.paths = [paths[shard.name] for shard in table.shards]  # of the shards, in the order of the table
        self._fork_guard = ForkGuard()
        self._files: dict[int, OpenFile] = {}
        self._faults: dict[int, StoreError] = {}
        self._file_faults: dict[int, StoreError] = {}  # errors of bad shards, by number
        self._use = UseCount(f"The checkpoint {folder}")
        self._buffers: SimpleQueue[mmap.mmap] = SimpleQueue()  # one for each read that was in progress at a time
        self._threads = ThreadPoolExecutor(readers, thread_name_prefix="moetier-store")  # starts no thread yet
        with closed_on_error(self):
            self._open(damaged)

    def _open(self, damaged: bool) -> None:
        fix = f"Get the checkpoint's own file again. If it was changed on purpose: {command('link', self.directory)}"
        faults = self._file_faults
        for number, shard in enumerate(self.table.shards):
            try:
                self._files[number] = OpenFile(self.paths[number], shard, fix)
            except StoreError as error:
                if not damaged:
                    raise
                faults[number] = error
        for block, extents in enumerate(self.table.blocks):
            if bad := faults.keys() & set(np.unique(extents.places[..., 0]).tolist()):
                self._faults[block] = faults[min(bad)]

    def check_unchanged(self) -> None:
        """Raise StoreFormatError if a shard was written to since it was opened."""
        for file in self._files.values():
            file.check_unchanged()

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """The errors of bad shards, by each block that needs them. It is empty unless opened with ``damaged``."""
        return self._faults

    @property
    def is_direct(self) -> bool:
        """Whether all shards are read with O_DIRECT."""
        return all(file.is_direct for file in self._files.values())

    @property
    def has_checksums(self) -> bool:
        """Whether ``moetier link`` has made checksums of the records."""
        return self.table.is_linked

    @property
    def fix(self) -> str:
        """The fix for damaged files, as a sentence for users."""
        return "Get the checkpoint's own files again. If they were changed on purpose, run moetier link again."

    @property
    def other_files(self) -> Mapping[Path, int]:
        """The shards, with the number of bytes of each that are in no record."""
        return {
            path: sum(end - first for first, end in ranges)
            for path, ranges in zip(self.paths, self.table.gaps(), strict=True)
        }

    def other_file_faults(self) -> dict[str, StoreError]:
        """Return the errors of bad shards, by name."""
        return {self.table.shards[number].name: fault for number, fault in self._file_faults.items()}

    def scrub_other_files(self) -> Iterator[int | Problem]:
        """Compare the bytes beside experts with their checksums. Yield problems, and sizes of reads as progress."""
        files = zip(self.paths, self.table.shards, self.table.gaps(), strict=True)
        for number, (path, shard, ranges) in enumerate(files):
            if number in self._file_faults:
                yield Problem(None, None, str(path), self._file_faults[number].cause)
                continue
            crc = 0
            try:
                for piece in read_ranges(path, ranges):
                    crc = crc32c(piece, crc)
                    yield len(piece)
            except StoreError as error:
                yield Problem(None, None, str(path), error.cause)
                continue
            if crc != shard.rest:
                cause = f"{path}: checksum mismatch in its tensors that are no experts, or in its header."
                yield Problem(None, None, str(path), cause)

    def path(self, block: int) -> Path:
        """Return the first of the files that have a block's records."""
        return self.paths[int(self.table.blocks[block].places[..., 0].min())]

    def read_into(self, key: ExpertKey, buffer: memoryview, pause: Pause | None = None) -> None:
        """Assemble a record and its checksum in ``buffer``.

        Raises, beside the errors that ``Store`` names:
            StoreReadError: the disk has answered with an error. EIO is raised only if a second try fails too.
            StoreFormatError: there are no checksums, and a file was written to since it was opened.
        """
        with self._use.use():
            self.manifest.check_keys(key.block, (key,))
            if key.block in self._faults:
                raise self._faults[key.block].fresh()
            view, extents = as_bytes(buffer), self.table.extents(key)
            assert len(view) == self.layout(key.block).slot_bytes, f"{len(view)} bytes are no slot"
            try:
                crc = read_in_pieces(view, pause, partial(self._read_part, extents))
                if not self.table.is_linked:  # else the checksum proves the bytes
                    for shard in {extent.shard for extent in extents}:
                        self._files[shard].check_unchanged()
            except StoreReadError as error:
                raise StoreReadError(f"{self._expert(key)}: {error.cause}", error.fix) from error
            self.check_record(key, view, crc)

    def _source(self, key: ExpertKey) -> str:
        """Return the names of all files that have parts of a record."""
        return " or ".join(sorted({str(self.paths[extent.shard]) for extent in self.table.extents(key)}))

    def _read_part(self, extents: list[Extent], part: RecordPart, crc: int) -> int:
        """Read a part of a record. See ``ReadPart``."""
        reads = [
            Read(self._threads, partial(self._assemble, extents, at, memory), payload)
            for at, memory, payload in part.pieces()
        ]
        return run_reads(reads, crc)

    def _assemble(self, extents: list[Extent], start: int, part: memoryview) -> None:
        """Assemble ``part``, which begins at ``start`` in the record: extents, and zeros between and after them."""
        done, stop = start, start + len(part)
        for extent in extents:
            first, end = max(extent.start, start), min(extent.start + extent.length, stop)
            if first >= end:
                continue
            if done < first:
                part[done - start : first - start] = bytes(first - done)
            self._read_extent(extent, first - extent.start, part[first - start : end - start])
            done = max(done, end)
        part[done - start :] = bytes(stop - done)

    def _read_extent(self, extent: Extent, skipped: int, part: memoryview) -> None:
        """Read a part of an extent into ``part``. In the record, it begins ``skipped`` bytes after the extent does."""
        if not extent.row_bytes and not extent.is_wide:
            self._files[extent.shard].read(extent.offset + skipped, part, self._buffers)
            return
        row, stride = (extent.row_bytes, extent.stride) if extent.row_bytes else (2, 2)
        first, last = skipped // stride, -(-(skipped + len(part)) // stride)  # rows that overlap with the part
        read = np.empty((last - first) * row * (2 if extent.is_wide else 1), np.uint8)
        offset = extent.offset + first * row * (2 if extent.is_wide else 1)
        self._files[extent.shard].read(offset, read.data, self._buffers)
        rows = (_narrowed(read) if extent.is_wide else read).reshape(-1, row)
        _scatter(rows, stride, first * stride - skipped, np.frombuffer(part, np.uint8))

    def _expert(self, key: ExpertKey) -> str:
        path = self.manifest.blocks[key.block].path
        return f"{self.manifest.model}, block {key.block} ({path}), expert {key.expert}"

    def close(self) -> None:
        """Wait for running reads, then end all threads and close all descriptors."""
        self._use.close()
        files, self._files = self._files, {}
        if self._fork_guard.is_owner:
            self._threads.shutdown()
        for file in files.values():
            file.close()
