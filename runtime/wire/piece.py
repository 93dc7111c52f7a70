"""The message Piece on the wire (proto/expert_store.proto), written from a record and read into one.

Protocol buffers for Python copy a bytes field on its way in and out: of a large record that takes more time than its
transport. What is written here is what they would write, and what they can write is read.
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from moetier.proto.expert_store_pb2 import Piece
from moetier.tiers.errors import ProtocolError

PIECE_BYTES = 1 << 20  # of the record, in one message
_TAG = 0x0A  # field 1, length-delimited


def encode_piece(data: memoryview) -> bytes:
    """``Piece(data=data)``, serialised, with one copy."""
    header = bytearray([_TAG])
    length = len(data)
    while length > 0x7F:
        header.append(length & 0x7F | 0x80)
        length >>= 7
    header.append(length)
    return b"".join((header, data))


def decode_piece(message: bytes) -> memoryview:
    """The data of a serialised Piece, without a copy where it is what ``encode_piece`` writes. Raises ProtocolError."""
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
    try:  # other fields too, of a later version; or none
        return memoryview(Piece.FromString(message).data)
    except DecodeError:
        raise ProtocolError("What a daemon sent is no piece of a record.", "Update moetier on both hosts.") from None
