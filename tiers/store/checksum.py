"""The checksum of records, shard indexes and trunk files: CRC-32C (Castagnoli), as in zarr's codec ``crc32c``.

Only this module imports the library that computes the checksum.
"""

from __future__ import annotations

import crc32c as _library

from moetier.tiers.layout import CHECKSUM_BYTES

PIECE_BYTES = 8 << 20  # size of the pieces in which a file or a record is read or written, and checksummed


def crc32c(data: memoryview | bytes, before: int = 0) -> int:
    """Return the CRC-32C of contiguous bytes. ``before`` is the CRC-32C of the bytes that precede ``data``, if any do.

    For 32 KiB or more, the GIL is released during the computation.
    """
    return _library.crc32c(data, before)


def checksum_bytes(crc: int) -> bytes:
    """Return a checksum as it is stored: 4 bytes, little endian."""
    return crc.to_bytes(CHECKSUM_BYTES, "little")
