"""Scrub: read every record of a store and every file of the trunk, and compare them with their checksums."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from moetier.tiers.errors import ChecksumError, StoreError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey, RecordLayout
from moetier.tiers.manifest import Manifest
from moetier.tiers.source import RecordReader

from .trunk import check_sum

READS = 8  # number of parallel reads, enough to keep a disk busy
BUFFER_BYTES = 256 << 20  # memory for all parallel reads together, unless a single record is larger


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault of a store or of the trunk."""

    block: int | None  # number of the block; None if the fault is not in one block
    expert: int | None  # number of the expert in its block; None if the fault is not in one record
    file: str  # path of the file or folder
    cause: str  # what is wrong, as a sentence


class Records(RecordReader, Protocol):
    """Interface of what is scrubbed: the records of a store, or of a checkpoint."""

    @property
    def faults(self) -> Mapping[int, StoreError]:
        """The errors of bad files, by block."""

    @property
    def directory(self) -> Path:
        """The model directory."""

    def layout(self, block: int) -> RecordLayout:
        """The layout of a block's records."""

    def path(self, block: int) -> Path:
        """The file of a block's records."""

    def compare_digest(self, checksums: Sequence[int]) -> None:
        """Raise ChecksumError if all records together, with these checksums, are not those of the manifest."""


def scrub_trunk(directory: Path, manifest: Manifest, faults: Mapping[str, StoreError]) -> Iterator[int | Problem]:
    """Check the trunk's files. Yield each problem that is found. To show progress, also yield the size of each read.

    ``faults`` is a dictionary from file name to error, as ``trunk_faults`` returns it. These errors are yielded first,
    and their files are not read. Sizes are in bytes.
    """
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


def scrub(store: Records) -> Iterator[int | Problem]:
    """Check all records. Yield each problem that is found. To show progress, also yield the size of each record read.

    Several records are read at the same time, in their order on the disk. Sizes are in bytes.
    """
    for block, fault in store.faults.items():
        yield Problem(block, None, str(store.path(block)), fault.cause)
    good = not store.faults
    crcs = []
    for key, found in checksums(store):
        if isinstance(found, StoreError):
            good = False
            yield Problem(key.block, key.expert, str(store.path(key.block)), found.cause)
        else:
            crcs.append(found)
        yield store.layout(key.block).slot_bytes
    if good:
        try:
            store.compare_digest(crcs)
        except ChecksumError as error:
            yield Problem(None, None, str(store.directory), error.cause)


def checksums(store: Records) -> Iterator[tuple[ExpertKey, int | StoreError]]:
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
            return int.from_bytes(slot[-CHECKSUM_BYTES:], "little")
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
