"""Where the bytes of a store lie: names of its files, and the index at the end of each shard.

A shard file holds one block: ``experts`` records of ``slot_bytes`` (payload, crc32c), then the index of zarr's
``sharding_indexed`` codec: an (offset, size) pair of LE u64 for each record, then the crc32c of those pairs as LE u32.
https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moetier.tiers.layout import CHECKSUM_BYTES, PAGE
from moetier.tiers.manifest import Manifest

from .checksum import checksum_bytes, crc32c

GROUP = "experts.zarr"  # the store's folder in a model directory
METADATA = "zarr.json"  # of the group (holds the manifest, written last) and of each array
PLAN = "plan.json"  # the manifest of a conversion under way; gone when it is finished
JOURNAL = "conversion.json"  # beside the store, likewise: the converter's own notes, with the command that resumes it
ORIGIN = "origin.json"  # beside the store, of what is from the hub: the id and the commit
PARTIAL = ".partial"  # ends the names of files that are being written; zarr never looks for these
EMPTY = 2**64 - 1  # offset and size of a record that was not written

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ShardFile:
    """Name and geometry of one block's file."""

    path: Path
    experts: int
    slot_bytes: int

    @classmethod
    def of(cls, folder: Path, manifest: Manifest, block: int) -> ShardFile:
        entry = manifest.blocks[block]
        path = folder / entry.array / "c" / str(entry.index) / "0" / "0"
        return cls(path, entry.experts, manifest.layout(block).slot_bytes)

    @property
    def data_bytes(self) -> int:
        return self.experts * self.slot_bytes

    @property
    def index_bytes(self) -> int:
        return 16 * self.experts + CHECKSUM_BYTES

    @property
    def file_bytes(self) -> int:
        return self.data_bytes + self.index_bytes

    def make_index(self) -> bytes:
        """Of records that lie in the order of their experts."""
        pairs = np.empty((self.experts, 2), "<u8")
        pairs[:, 0] = np.arange(self.experts, dtype=np.uint64) * self.slot_bytes
        pairs[:, 1] = self.slot_bytes
        payload = pairs.tobytes()
        return payload + checksum_bytes(crc32c(payload))

    def parse_index(self, index: bytes) -> tuple[int, ...]:
        """The records' offsets; -1 where there is none. Raises ValueError, saying why, on anything else."""
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


def read_checksums(descriptor: int, offsets: Iterable[int], slot_bytes: int) -> tuple[int, ...]:
    """The crc32c stored behind each record of a shard, from a descriptor without O_DIRECT."""
    ends = (offset + slot_bytes - CHECKSUM_BYTES for offset in offsets)
    return tuple(int.from_bytes(os.pread(descriptor, CHECKSUM_BYTES, end), "little") for end in ends)


class StoreDigest:
    """sha256 over the crc32c of every record, LE u32, block by block: identifies a store."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, crcs: Iterable[int]) -> None:
        self._sha.update(b"".join(map(checksum_bytes, crcs)))

    def hexdigest(self) -> str:
        return self._sha.hexdigest()
