"""Link a checkpoint: read it once, and make the checksums of its records and of all bytes beside them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from moetier.tiers.errors import StoreError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.checksum import PIECE_BYTES, crc32c
from moetier.tiers.store.scrub import BUFFER_BYTES, READS, Problem
from moetier.tiers.store.shard import read_at

from .reader import ExtentStore
from .table import ExtentTable


def link(store: ExtentStore) -> Iterator[int | ExtentTable]:
    """Read a checkpoint whose table has no checksums. Yield the sizes of reads, as progress, and at last the table.

    ``store`` is open over all shards. Raises StoreReadError.
    """
    manifest = store.manifest
    largest = max(layout.slot_bytes for layout in manifest.layouts.values())
    reads = max(1, min(READS, BUFFER_BYTES // largest))
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(reads):
        buffers.put(memoryview(mmap.mmap(-1, largest)))

    def read(key: ExpertKey) -> bytes:
        """Return the checksum of a record."""
        buffer = buffers.get()
        try:
            slot = buffer[: store.layout(key.block).slot_bytes]
            store.read_into(key, slot)
            return bytes(slot[-CHECKSUM_BYTES:])
        finally:
            buffers.put(buffer)

    keys = [ExpertKey(block, expert) for block, entry in enumerate(manifest.blocks) for expert in range(entry.experts)]
    checksums = []
    with ThreadPoolExecutor(reads, thread_name_prefix="moetier-link") as pool:
        try:
            for key, checksum in zip(keys, pool.map(read, keys), strict=True):
                checksums.append(checksum)
                yield store.layout(key.block).payload_bytes
        finally:
            pool.shutdown(cancel_futures=True)
    sums = []
    for path, ranges in zip(store.paths, store.table.rest(), strict=True):
        crc = 0
        for piece in read_ranges(path, ranges):
            crc = crc32c(piece, crc)
            yield len(piece)
        sums.append(crc)
    store.check_unchanged()
    shards = (replace(shard, rest=crc) for shard, crc in zip(store.table.shards, sums, strict=True))
    linked = replace(manifest, record_checksums=b"".join(checksums))
    yield ExtentTable(linked, tuple(shards), store.table.blocks)


def scrub_rest(store: ExtentStore) -> Iterator[int | Problem]:
    """Compare the bytes beside experts with their checksums. Yield problems, and the sizes of reads as progress."""
    rest = zip(store.paths, store.table.shards, store.table.rest(), strict=True)
    for number, (path, shard, ranges) in enumerate(rest):
        if number in store.file_faults:
            yield Problem(None, None, str(path), store.file_faults[number].cause)
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


def read_ranges(path: Path, ranges: list[tuple[int, int]]) -> Iterator[memoryview]:
    """Read ranges (first byte, end) of a file in pieces, in order, past the page cache. Each is valid until the next.

    Raises StoreReadError.
    """
    buffer = memoryview(bytearray(PIECE_BYTES))
    with read_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for first, end in ranges:
            for start in range(first, end, PIECE_BYTES):
                piece = buffer[: min(PIECE_BYTES, end - start)]
                read_at(path, descriptor, start, piece, direct=False)
                os.posix_fadvise(descriptor, start, len(piece), os.POSIX_FADV_DONTNEED)
                yield piece
    finally:
        os.close(descriptor)
