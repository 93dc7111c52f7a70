"""The checksum of records, shard indexes and trunk files: CRC-32C (Castagnoli), zarr's codec ``crc32c``.

This is the only module that knows which library computes it: the reason why so small a module stands alone.
"""

from __future__ import annotations

import crc32c as _library

from moetier.tiers.layout import CHECKSUM_BYTES

PIECE_BYTES = 8 << 20  # of a file, read or written and checksummed at a time; larger records are read in several pieces


def crc32c(data: memoryview | bytes, before: int = 0) -> int:
    """Compute the CRC-32C of contiguous ``data``, continuing from ``before``, the CRC-32C of the bytes that precede it.

    Releases the GIL for data of 32 KiB and more: threads check records on several cores while another thread decodes.
    """
    return _library.crc32c(data, before)


def checksum_bytes(crc: int) -> bytes:
    """Encode a checksum as a store holds it."""
    return crc.to_bytes(CHECKSUM_BYTES, "little")
