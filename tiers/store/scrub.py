"""Scrub: read every record of a store, and compare them with their checksums."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from moetier.tiers.errors import ChecksumError, StoreError
from moetier.tiers.layout import ExpertKey

from .base import DirectoryStore
from .checksum import stored_checksum
from .scrubbable import Problem

READS = 8  # number of parallel reads, enough to keep a disk busy
BUFFER_BYTES = 256 << 20  # memory for all parallel reads together, unless a single record is larger


def scrub(store: DirectoryStore) -> Iterator[int | Problem]:
    """Check all records. Yield each problem that is found. To show progress, also yield the size of each record read.

    Several records are read at the same time, in their order on the disk. Sizes are in bytes.
    """
    for block, fault in store.faults.items():
        yield Problem(block, None, str(store.path(block)), fault.cause)
    good = not store.faults
    crcs = []
    for key, checksum in checksums(store):
        if isinstance(checksum, StoreError):
            good = False
            yield Problem(key.block, key.expert, str(store.path(key.block)), checksum.cause)
        else:
            crcs.append(checksum)
        yield store.layout(key.block).slot_bytes
    if good:
        try:
            store.compare_digest(crcs)
        except ChecksumError as error:
            yield Problem(None, None, str(store.directory), error.cause)


def checksums(store: DirectoryStore) -> Iterator[tuple[ExpertKey, int | StoreError]]:
    """Read all records but those of blocks with a fault. Yield each key with the record's checksum, or with the error.

    Several records are read at the same time, in their order on the disk.
    """
    largest = max(layout.slot_bytes for layout in store.manifest.layouts.values())
    reads = max(1, min(READS, BUFFER_BYTES // largest))
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(reads):
        buffers.put(memoryview(mmap.mmap(-1, largest)))

    def read(key: ExpertKey) -> int | StoreError:
        buffer = buffers.get()
        try:
            slot = buffer[: store.layout(key.block).slot_bytes]
            store.read_into(key, slot)
            return stored_checksum(slot)
        except StoreError as error:
            return error
        finally:
            buffers.put(buffer)

    keys = [
        ExpertKey(block, expert)
        for block, entry in enumerate(store.manifest.blocks)
        if block not in store.faults
        for expert in range(entry.experts)
    ]
    with ThreadPoolExecutor(reads, thread_name_prefix="moetier-verify") as pool:
        try:
            yield from zip(keys, pool.map(read, keys), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)
