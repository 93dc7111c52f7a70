"""Link a checkpoint: read it once, and make the checksums of its records and of all bytes beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moetier.tiers.errors import StoreError
from moetier.tiers.store.atomic import read_errors
from moetier.tiers.store.checksum import PIECE_BYTES, checksum_bytes, crc32c
from moetier.tiers.store.scrub import Problem, checksums
from moetier.tiers.store.shard import read_at

from .reader import ExtentStore
from .table import ExtentTable


def link(store: ExtentStore) -> Iterator[int | ExtentTable]:
    """Read a checkpoint whose table has no checksums. Yield the sizes of reads, as progress, and at last the table.

    ``store`` is open over all shards. Raises StoreReadError.
    """
    found = []
    for key, crc in checksums(store):
        if isinstance(crc, StoreError):
            raise crc
        found.append(checksum_bytes(crc))
        yield store.layout(key.block).payload_bytes
    sums = []
    for path, ranges in zip(store.paths, store.table.rest(), strict=True):
        crc = 0
        for piece in read_ranges(path, ranges):
            crc = crc32c(piece, crc)
            yield len(piece)
        sums.append(crc)
    store.check_unchanged()
    shards = (replace(shard, rest=crc) for shard, crc in zip(store.table.shards, sums, strict=True))
    linked = replace(store.manifest, record_checksums=b"".join(found))
    yield replace(store.table, manifest=linked, shards=tuple(shards))


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
