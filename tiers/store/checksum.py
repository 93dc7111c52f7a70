"""The checksum of records, shard indexes and trunk files: CRC-32C (Castagnoli), as in zarr's codec ``crc32c``.

Only this module imports the library that computes the checksum: ``crc32c(data, before)`` returns the CRC-32C of
contiguous bytes, where ``before`` is that of the bytes that precede ``data``, if any do. For 32 KiB or more, it
releases the GIL.
"""

from __future__ import annotations

from crc32c import crc32c as crc32c

from moetier.tiers.layout import CHECKSUM_BYTES

READ_PIECE_BYTES = 8 << 20  # size of the pieces in which a file or a record is read or written, and checksummed


def stored_checksum(slot: memoryview) -> int:
    """Return the checksum that a slot has behind its record."""
    return int.from_bytes(slot[-CHECKSUM_BYTES:], "little")


def checksum_bytes(crc: int) -> bytes:
    """Return a checksum as it is stored: 4 bytes, little endian."""
    return crc.to_bytes(CHECKSUM_BYTES, "little")
