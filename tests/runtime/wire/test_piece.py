"""Pieces on the wire are what protocol buffers would write, and what they may write is read."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moetier.proto.expert_store_pb2 import Piece
from moetier.runtime.wire.piece import WIRE_PIECE_BYTES, decode_piece, encode_piece
from moetier.tiers.errors import ProtocolError

CHECKSUMS = st.none() | st.integers(0, 2**32 - 1)


def parsed(message: bytes) -> tuple[bytes, int | None]:
    piece = Piece.FromString(message)
    return piece.data, piece.crc32c if piece.HasField("crc32c") else None


@given(st.binary(min_size=1, max_size=300), CHECKSUMS)
@example(bytes(127), 7)
@example(bytes(128), 7)
@example(bytes(16_383), 7)
@example(bytes(16_384), 7)
@example(bytes(WIRE_PIECE_BYTES), 7)
def test_it_is_the_message(data: bytes, crc: int | None) -> None:
    message = Piece(data=data, crc32c=crc).SerializeToString()
    assert encode_piece(memoryview(data), crc) == message
    assert decode_piece(message) == (data, crc)


def test_nothing_is_a_piece_too() -> None:
    assert Piece.FromString(encode_piece(memoryview(b""))) == Piece()
    assert decode_piece(encode_piece(memoryview(b""))) == (b"", None)
    assert decode_piece(b"") == (b"", None)


@given(st.binary(max_size=40))
def test_anything_is_read_as_protocol_buffers_read_it(message: bytes) -> None:
    try:
        expected = parsed(message)
    except Exception:
        with pytest.raises(ProtocolError):
            decode_piece(message)
    else:
        assert decode_piece(message) == expected


@given(st.lists(st.binary(max_size=40), min_size=2, max_size=3), st.binary(max_size=5))
def test_fields_that_come_twice_and_unknown_ones(parts: list[bytes], unknown: bytes) -> None:
    other = b"\x12" + bytes([len(unknown)]) + unknown  # field 2
    message = other.join(Piece(data=part).SerializeToString() for part in parts) + other
    assert decode_piece(message) == parsed(message)
