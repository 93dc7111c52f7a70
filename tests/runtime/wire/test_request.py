"""Requests with a checksum: what is parsed is what was sent, and older daemons and clients understand it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetier.proto.expert_store_pb2 import ComputeRequest, FetchRequest
from moetier.runtime.wire.request import decode_request, encode_request
from moetier.tiers.errors import MoetierError
from moetier.tiers.store.checksum import crc32c

FETCH = FetchRequest(digest="0" * 64, block=7, expert=3, offset=1 << 20, length=4096)
COMPUTE = ComputeRequest(
    digest="0" * 64, block=6, experts=[1, 130], hidden_states=b"}1234" * 9, dtype="bfloat16", picked=[0, 3]
)


@pytest.mark.parametrize("request_", [FETCH, COMPUTE, FetchRequest()], ids=["fetch", "compute", "empty"])
def test_a_checksum_is_added_that_older_daemons_ignore(request_: FetchRequest | ComputeRequest) -> None:
    data, crc = encode_request(request_)
    assert crc == crc32c(request_.SerializeToString())
    assert len(data) == request_.ByteSize() + 5
    parsed = decode_request(type(request_), data)
    assert parsed.crc32c == crc
    parsed.ClearField("crc32c")
    assert parsed == request_


@pytest.mark.parametrize("request_", [FETCH, COMPUTE], ids=["fetch", "compute"])
def test_requests_of_older_clients_have_none(request_: FetchRequest | ComputeRequest) -> None:
    assert decode_request(type(request_), request_.SerializeToString()) == request_


@pytest.mark.parametrize("request_", [FETCH, COMPUTE], ids=["fetch", "compute"])
@given(st.data())
def test_a_changed_request_is_refused_or_answered_with_another_checksum(
    request_: FetchRequest | ComputeRequest, data: st.DataObject
) -> None:
    sent, crc = encode_request(request_)
    changed = bytearray(sent)
    for place in data.draw(st.sets(st.integers(0, 8 * len(sent) - 1), min_size=1, max_size=3)):
        changed[place // 8] ^= 1 << place % 8
    try:
        parsed = decode_request(type(request_), bytes(changed))
    except MoetierError:
        return
    assert not parsed.HasField("crc32c") or parsed.crc32c != crc


def test_a_checksum_that_is_not_last_is_refused() -> None:
    sent, _ = encode_request(FETCH)
    with pytest.raises(MoetierError, match="Checksum mismatch"):
        decode_request(FetchRequest, sent + FetchRequest(expert=4).SerializeToString())
