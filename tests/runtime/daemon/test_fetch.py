"""Fetch calls of other hosts: what they may ask for, which slots they hold, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from outlets import served_folder
from readers import PATIENCE
from stores import layout_of, make_plan, make_records, manifest_of, slot_of, slot_with, written
from threads import wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.wire.address import Address, Credentials
from moetier.tiers.errors import ExhaustedError, UnavailableError
from moetier.tiers.layout import ExpertKey

PLAIN = Credentials(insecure=True)
PLAN = make_plan(blocks=2, experts=3)
RECORDS = make_records(PLAN)
LARGE_PLAN = make_plan(blocks=1, experts=3, top_k=1, layout=layout_of(rows=1024, columns=2304))  # 14 MB
# 47 MB: more than sockets and HTTP/2 take in for a reader that stands still
HUGE_PLAN = make_plan(blocks=1, experts=3, top_k=1, layout=layout_of(rows=2048, columns=3840))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("small"), PLAN, RECORDS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("large"), LARGE_PLAN, make_records(LARGE_PLAN))


@pytest.fixture(scope="module")
def huge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("huge"), HUGE_PLAN, make_records(HUGE_PLAN))


def ask(address: Address, timeout: float | None, **request: int) -> Callable[[], bytes]:
    def call() -> bytes:
        with grpc.insecure_channel(address.target) as channel:
            fetch = channel.unary_stream(
                "/moetier.v1.ExpertStore/Fetch", pb.FetchRequest.SerializeToString, pb.Piece.FromString
            )
            return b"".join(piece.data for piece in fetch(pb.FetchRequest(**request), timeout=timeout))

    return call


def test_any_part_of_a_record_by_plain_protocol_buffers(small: Path) -> None:
    key = ExpertKey(1, 2)
    whole = slot_with(RECORDS[key])
    with served_folder(small) as (address, _, _):
        for offset, length in ((0, 0), (0, len(whole)), (1, 1), (len(whole) - 7, 5), (len(whole) - 2, 0), (4096, 9000)):
            got = ask(address, 10, block=1, expert=2, offset=offset, length=length)()
            assert got == whole[offset : offset + length if length else None]


@pytest.mark.parametrize(
    ("timeout", "request_", "code"),
    [
        (None, {}, grpc.StatusCode.INVALID_ARGUMENT),
        (1e6, {}, grpc.StatusCode.INVALID_ARGUMENT),
        (10, {"block": 2}, grpc.StatusCode.NOT_FOUND),
        (10, {"expert": 10**9}, grpc.StatusCode.NOT_FOUND),
        (10, {"offset": PLAN.layout(0).slot_bytes}, grpc.StatusCode.INVALID_ARGUMENT),
        (10, {"offset": 1, "length": PLAN.layout(0).slot_bytes}, grpc.StatusCode.INVALID_ARGUMENT),
        (10, {"offset": 2**64 - 1, "length": 2**64 - 1}, grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_what_cannot_be_asked(
    small: Path, timeout: float | None, request_: dict[str, int], code: grpc.StatusCode
) -> None:
    with served_folder(small) as (address, _, _):
        with pytest.raises(grpc.RpcError) as caught:
            ask(address, timeout, **request_)()
        assert caught.value.code() is code
        assert len(ask(address, 10)()) == PLAN.layout(0).slot_bytes


def start_and_stall(address: Address, stack: ExitStack, expert: int) -> grpc.Call:
    """A fetch whose reader takes one piece, and no more: not even into buffers, which may grow to a whole record."""
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    channel = stack.enter_context(grpc.insecure_channel(address.target, narrow))
    fetch = channel.unary_stream(
        "/moetier.v1.ExpertStore/Fetch", pb.FetchRequest.SerializeToString, pb.Piece.FromString
    )
    call = fetch(pb.FetchRequest(expert=expert), timeout=600)
    next(call)
    stack.callback(call.cancel)  # and so it lives as long: a lost call is cancelled
    return call


def test_a_reader_that_stands_still_holds_a_slot_for_a_bounded_time(huge: Path) -> None:
    with served_folder(huge, slots=1, stall=1.0) as (address, host, _), ExitStack() as stack:
        call = start_and_stall(address, stack, 0)
        assert host.stats().leased == 1
        assert len(list(host.acquire([ExpertKey(0, 1)]))) == 1, "waited for, and got"
        assert host.stats().leased == 0
        with pytest.raises(grpc.RpcError):
            list(call)


def test_a_client_that_goes_gives_its_slot_back(huge: Path) -> None:
    with served_folder(huge, slots=1, stall=600) as (address, host, _):
        with ExitStack() as stack:
            start_and_stall(address, stack, 0)
            assert host.stats().leased == 1
        wait_until(lambda: host.stats().leased == 0)
        assert len(list(host.acquire([ExpertKey(0, 1)]))) == 1


def test_fetches_leave_slots_to_others(huge: Path) -> None:
    """Three slots: fetches hold one at most, and who wants another record is refused after a bounded wait."""
    with served_folder(huge, slots=3, stall=600, timeout=0.3) as (address, host, _), ExitStack() as stack:
        start_and_stall(address, stack, 0)
        start_and_stall(address, stack, 0)  # of the same record: no further slot
        with RemoteStore(address, PLAIN, manifest_of(huge)) as reader:
            with pytest.raises(ExhaustedError):
                reader.read_into(ExpertKey(0, 1), slot_of(reader.manifest, ExpertKey(0, 1)))
            assert host.stats().leased == 1
            assert len(list(host.acquire([ExpertKey(0, 1), ExpertKey(0, 2)]))) == 2
            stack.close()
            wait_until(lambda: host.stats().leased == 0)
            reader.read_into(ExpertKey(0, 1), slot_of(reader.manifest, ExpertKey(0, 1)))


def test_a_slot_that_is_not_to_be_had_is_waited_for_a_bounded_time(large: Path) -> None:
    """Somebody of the daemon's own host holds the only one."""
    with (
        served_folder(large, slots=1, timeout=0.3) as (address, host, _),
        RemoteStore(address, PLAIN, manifest_of(large)) as reader,
    ):
        slot = slot_of(reader.manifest, ExpertKey(0, 1))
        leases = host.acquire([ExpertKey(0, 0)])
        next(leases)
        with pytest.raises(ExhaustedError):
            reader.read_into(ExpertKey(0, 1), slot)
        leases.close()
        reader.read_into(ExpertKey(0, 1), slot)
        wait_until(lambda: host.stats().leased == 0)
        assert slot == slot_with(make_records(LARGE_PLAN)[ExpertKey(0, 1)])


def test_a_call_that_waits_for_a_slot_is_answered_before_its_deadline(large: Path) -> None:
    """As long as both are as patient as they are by default."""
    with served_folder(large, slots=1, timeout=PATIENCE) as (address, host, _):
        leases = host.acquire([ExpertKey(0, 0)])
        next(leases)
        codes, errors = list[grpc.StatusCode](), list[Exception]()
        for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):  # a busy machine may need the second half of the time itself
            with pytest.raises(grpc.RpcError) as caught:
                ask(address, seconds, expert=1)()
            codes.append(caught.value.code())
            if codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED:
                break
        assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
        for seconds in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
            with RemoteStore(address, PLAIN, manifest_of(large), timeout=seconds, channels=1) as reader:
                with pytest.raises((ExhaustedError, UnavailableError)) as error:
                    reader.read_into(ExpertKey(0, 1), slot_of(reader.manifest, ExpertKey(0, 1)))
                errors.append(error.value)
            if isinstance(errors[-1], ExhaustedError):
                break
        assert isinstance(errors[-1], ExhaustedError)
        leases.close()


@pytest.mark.parametrize("how", ["its client goes", "its deadline passes", "the daemon ends"])
def test_no_call_waits_in_vain(large: Path, how: str) -> None:
    """A fetch is cancelled while it waits for a slot."""
    with served_folder(large, slots=1, timeout=600) as (address, host, fetches):
        leases = host.acquire([ExpertKey(0, 0)])
        next(leases)
        with grpc.insecure_channel(address.target) as channel:
            fetch = channel.unary_stream(
                "/moetier.v1.ExpertStore/Fetch", pb.FetchRequest.SerializeToString, pb.Piece.FromString
            )
            for seconds in (1, 4, 16, 64) if how == "its deadline passes" else (600,):
                before = host.stats().misses
                call = fetch(pb.FetchRequest(expert=1), timeout=seconds)
                wait_until(lambda call=call, before=before: host.stats().misses > before or not call.is_active())  # type: ignore[misc]
                if host.stats().misses > before:  # else the deadline has passed before the daemon had the call
                    break
            assert host.stats().misses > before
            if how == "its client goes":
                call.cancel()
            elif how == "the daemon ends":
                fetches.close()
            with pytest.raises(grpc.RpcError):
                next(call)
            if how != "the daemon ends":  # fetches may hold one record: another is waited for once the first is not
                before = host.stats().misses
                other = fetch(pb.FetchRequest(expert=2), timeout=600)
                wait_until(lambda: host.stats().misses > before)
                other.cancel()
        leases.close()
