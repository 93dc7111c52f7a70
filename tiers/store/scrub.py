"""Scrub: compare every record of a store and every file of its trunk with their checksums."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from moetier.tiers.errors import StoreError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest

from .reader import ExpertStore
from .shard import foreign_shards, store_digest
from .trunk import check_sum

READS = 8  # reads in flight, enough to keep a disk busy
BUFFER_BYTES = 256 << 20  # most memory of all reads in flight, unless one record is larger


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that was found.

    ``block`` is None for a fault of the whole store or the trunk, ``expert`` for one of a block's whole file.
    """

    block: int | None
    expert: int | None
    file: str
    cause: str


def scrub_trunk(directory: Path, manifest: Manifest, faults: Mapping[str, StoreError]) -> Iterator[int | Problem]:
    """Check the trunk: yield its problems, ``faults`` first, and the number of bytes of each read."""
    for name, fault in faults.items():
        yield Problem(None, None, str(directory / name), fault.cause)
    for name, entry in sorted(manifest.trunk.items()):
        if name in faults:
            continue
        path = directory / name
        try:
            yield from check_sum(path, entry)
        except StoreError as error:
            yield Problem(None, None, str(path), error.cause)


def scrub(store: ExpertStore) -> Iterator[int | Problem]:
    """Check all records: yield problems as they are found, and the number of bytes of each record that was read.

    Several records are read at a time, in their order on the disk, into buffers that are reused.
    """
    manifest = store.manifest
    largest = max(layout.slot_bytes for layout in manifest.layouts.values())
    reads = max(1, min(READS, BUFFER_BYTES // largest))
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(reads):
        buffers.put(memoryview(mmap.mmap(-1, largest)))

    def check(key: ExpertKey) -> tuple[int, Problem | None]:
        """Return the stored checksum of a record, and its problem if it has one."""
        buffer = buffers.get()
        try:
            slot = buffer[: store.layout(key.block).slot_bytes]
            store.read_into(key, slot)
            return int.from_bytes(slot[-CHECKSUM_BYTES:], "little"), None
        except StoreError as error:
            return 0, Problem(key.block, key.expert, str(store.path(key.block)), error.cause)
        finally:
            buffers.put(buffer)

    for block, fault in store.faults.items():
        yield Problem(block, None, str(store.path(block)), fault.cause)
    good = not store.faults
    crcs = []
    keys = [
        ExpertKey(block, expert)
        for block, entry in enumerate(manifest.blocks)
        if block not in store.faults
        for expert in range(entry.experts)
    ]
    with ThreadPoolExecutor(reads, thread_name_prefix="moetier-verify") as pool:
        try:
            for key, (crc, problem) in zip(keys, pool.map(check, keys), strict=True):
                crcs.append(crc)
                if problem is not None:
                    good = False
                    yield problem
                yield store.layout(key.block).slot_bytes
        finally:
            pool.shutdown(cancel_futures=True)
    if good and (digest := store_digest(crcs)) != manifest.digest:
        yield Problem(None, None, str(store.folder), foreign_shards(manifest, digest, store.folder).cause)
