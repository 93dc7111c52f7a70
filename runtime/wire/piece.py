"""Serialisation of the message Piece (proto/expert_store.proto) with fewer copies than protobuf makes.

Protobuf for Python copies a bytes field when it serialises and when it parses a message. For a large record that takes
longer than sending it. ``encode_piece`` writes the same bytes as protobuf, and ``decode_piece`` reads whatever protobuf
may write.
Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from moetier.proto.expert_store_pb2 import Piece
from moetier.tiers.errors import SAME_VERSION, ProtocolError
from moetier.tiers.layout import CHECKSUM_BYTES
from moetier.tiers.store.checksum import checksum_bytes

WIRE_PIECE_BYTES = 1 << 20  # largest part of a record in one message
CHECKSUM_TAG = b"\x7d"  # field 15, 32 bits: the checksum of a piece or a request
_TAG = 0x0A  # field 1, length-delimited


def encode_piece(data: memoryview, crc: int | None = None) -> bytes:
    """Serialise ``Piece(data=data, crc32c=crc)`` with one copy."""
    header = bytearray([_TAG])
    length = len(data)
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return b"".join((header, data) if crc is None else (header, data, CHECKSUM_TAG, checksum_bytes(crc)))


def decode_piece(message: bytes) -> tuple[memoryview, int | None]:
    """Return the data of a serialised Piece, and its checksum or None. Copies nothing if ``encode_piece`` wrote it.

    Raises ProtocolError if ``message`` is not a Piece.
    """
    if len(message) > 1 and message[0] == _TAG:
        length, at = 0, 1
        while at < min(len(message), 6):
            byte = message[at]
            length |= (byte & 0x7F) << 7 * (at - 1)
            at += 1
            if byte <= 0x7F:
                end = at + length
                if end == len(message):
                    return memoryview(message)[at:], None
                if end + 1 + CHECKSUM_BYTES == len(message) and message[end : end + 1] == CHECKSUM_TAG:
                    return memoryview(message)[at:end], int.from_bytes(message[end + 1 :], "little")
                break
    try:  # written by a later version with other fields, or without data
        piece = Piece.FromString(message)
        return memoryview(piece.data), piece.crc32c if piece.HasField("crc32c") else None
    except DecodeError:
        raise ProtocolError(
            "A daemon sent a message that can't be parsed as a part of its answer.", SAME_VERSION
        ) from None
