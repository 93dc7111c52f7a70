"""Requests of Fetch and Compute on the wire: serialised with a checksum, which is verified when they are parsed.

TCP's checksum has 16 bits, so a network without TLS passes some changed packets on. The checksum is the last field, so
that it covers all bytes before it. Older daemons ignore it.
"""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError

from moetier.proto.expert_store_pb2 import ComputeRequest, FetchRequest
from moetier.tiers.errors import ChecksumError, ProtocolError
from moetier.tiers.store.checksum import checksum_bytes, crc32c

from .piece import CHECKSUM_TAG

RemoteRequest = TypeVar("RemoteRequest", FetchRequest, ComputeRequest)


def encode_request(request: FetchRequest | ComputeRequest) -> tuple[bytes, int]:
    """Serialise a request, with its checksum as the last field. Return it and the checksum."""
    data = request.SerializeToString()
    crc = crc32c(data)
    return b"".join((data, CHECKSUM_TAG, checksum_bytes(crc))), crc


def decode_request(request_class: type[RemoteRequest], data: bytes) -> RemoteRequest:
    """Parse a request. If it has a checksum, check it.

    Raises ProtocolError if it can't be parsed, and ChecksumError if it is not what the client has sent.
    """
    try:
        request = request_class.FromString(data)
    except DecodeError:
        raise ProtocolError(
            "A request can't be parsed.", "Use the same version of moetier on both sides, and check the network."
        ) from None
    if request.HasField("crc32c"):
        field = CHECKSUM_TAG + checksum_bytes(request.crc32c)
        if not data.endswith(field) or crc32c(memoryview(data)[: -len(field)]) != request.crc32c:
            raise ChecksumError(
                "Checksum mismatch in a request: it was changed on its way.", "Check the network, or use TLS."
            )
    return request
