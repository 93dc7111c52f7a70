"""The checksum of records, shard indexes and trunk files: CRC-32C (Castagnoli), zarr's codec ``crc32c``.

This is a module of its own so that only one place depends on the library that computes the checksum.
"""

from __future__ import annotations

import crc32c as _library

from moetier.tiers.layout import CHECKSUM_BYTES

PIECE_BYTES = 8 << 20  # bytes that are read or written and checksummed at a time, as a piece of a file or record


def crc32c(data: memoryview | bytes, before: int = 0) -> int:
    """Compute the CRC-32C of contiguous ``data``, continuing from ``before``, the CRC-32C of the bytes that precede it.

    The GIL is released for data of 32 KiB or more, so several threads can check records while another one decodes.
    """
    return _library.crc32c(data, before)


def checksum_bytes(crc: int) -> bytes:
    """Encode a checksum as a store holds it: 4 bytes, little endian."""
    return crc.to_bytes(CHECKSUM_BYTES, "little")
