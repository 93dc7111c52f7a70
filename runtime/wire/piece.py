"""Serialisation of the message Piece (proto/expert_store.proto) with fewer copies than protobuf makes.

Protobuf for Python copies a bytes field when it serialises and when it parses a message. For a large record that takes
longer than sending it. ``encode_piece`` writes the same bytes as protobuf, and ``decode_piece`` reads whatever protobuf
may write.
Source: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from moetier.proto.expert_store_pb2 import Piece
from moetier.tiers.errors import ProtocolError

PIECE_BYTES = 1 << 20  # largest part of a record in one message
_TAG = 0x0A  # field 1, length-delimited


def encode_piece(data: memoryview) -> bytes:
    """Serialise ``Piece(data=data)`` with one copy."""
    header = bytearray([_TAG])
    length = len(data)
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return b"".join((header, data))


def decode_piece(message: bytes) -> memoryview:
    """Return the data of a serialised Piece, without a copy if ``encode_piece`` wrote it.

    Raises ProtocolError if ``message`` is not a Piece.
    """
    if len(message) > 1 and message[0] == _TAG:
        length, at = 0, 1
        while at < min(len(message), 6):
            byte = message[at]
            length |= (byte & 0x7F) << 7 * (at - 1)
            at += 1
            if byte <= 0x7F:
                if at + length == len(message):
                    return memoryview(message)[at:]
                break
    try:  # written by a later version with other fields, or without data
        return memoryview(Piece.FromString(message).data)
    except DecodeError:
        raise ProtocolError(
            "A daemon sent a message that is not a piece of a record.", "Use the same version of moetier on both sides."
        ) from None
