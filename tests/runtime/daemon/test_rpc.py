"""Sessions, as a client sees them that speaks the contract itself: real daemons, real sockets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
from daemons import DaemonProcess, running_daemon
from faults import flip_bit
from grpc_health.v1 import health_pb2, health_pb2_grpc
from local_daemons import local_daemon
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_store

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.daemon.hosted_model import HostedModel
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.status_codes import error_from_message, error_of
from moetier.tiers.errors import (
    ArenaError,
    ChecksumError,
    ExhaustedError,
    MissingExpertError,
    ProtocolError,
    RefusedError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.host.session import Session
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest
from moetier.tiers.store.reader import ShardStore

SLOT = layout_of().slot_bytes
Store = tuple[Path, Manifest, dict[ExpertKey, bytes]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """3 blocks of 8 experts, top 2."""
    folder = tmp_path_factory.mktemp("store")
    records = make_store(folder, experts=8)
    return folder, read_manifest(folder / "experts.zarr"), records


@pytest.fixture(scope="module")
def lasting_daemon(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("lasting") / "d"
    with running_daemon(store[0], ram=12 * SLOT, folder=folder, extra=["--wait", "0.2"]) as daemon:
        yield daemon


@pytest.fixture
def lasting(lasting_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    """The same for all who ask it for what is refused; nobody is left in it."""
    yield lasting_daemon
    lasting_daemon.wait_for("clients == 0 and sessions == 0 and leases == 0")


@pytest.fixture
def daemon(store: Store, tmp_path: Path) -> Iterator[DaemonProcess]:
    """With 12 slots: 4 a block."""
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=["--wait", "0.2"]) as daemon:
        yield daemon
        assert daemon.process.poll() is None, daemon.log
        assert daemon.stop() == 0
        assert "traceback" not in daemon.log


def test_it_says_what_it_is(daemon: DaemonProcess, store: Store) -> None:
    with daemon.stub() as stub:
        reply = stub.Describe(pb.DescribeRequest(), timeout=PATIENCE)
    (model,) = reply.models
    assert reply.pid == daemon.pid
    assert (model.name, model.digest) == (store[1].model, store[1].digest)
    assert dict(model.slots) == {"records": 12}
    assert (model.budget_bytes, model.directory) == (12 * SLOT, str(store[0]))


def test_what_is_granted_is_the_record(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.acquire(1, 0, [3, 5])
        granted = [client.granted(), client.granted()]
        assert {(lease.request, lease.expert) for lease in granted} == {(1, 3), (1, 5)}
        for lease in granted:
            assert client.record(lease.slot) == store[2][ExpertKey(0, lease.expert)]
            assert lease.generation % 2 == 0
        stats = daemon.stats()
        assert (stats.clients, stats.sessions, stats.leases, stats.requests) == (1, 1, 2, 1)
        assert (stats.host.misses, stats.host.bytes_in) == (2, 2 * SLOT)
        client.release(1, [3])
        daemon.wait_for("leases == 1")
        client.release(1)
        daemon.wait_for("leases == 0")
        client.acquire(1, 0, [5])  # the number is free again, the record resident
        assert client.granted().slot == next(lease.slot for lease in granted if lease.expert == 5)
        assert daemon.stats().host.hits == 1


def test_hits_are_counted_and_requested_prefetches_are_loaded(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.send(prefetch=pb.Prefetch(requested=pb.Experts(block=1, experts=[0, 7])))
        daemon.wait_for("host.ready == 2")
        client.send(uses=pb.Uses(blocks=[pb.Experts(block=1, experts=[0, 7])]))
        stats = daemon.wait_for("reported_hits == 2")
        assert (stats.host.hits, stats.host.misses, stats.host.prefetched) == (2, 0, 2)


def details(daemon: DaemonProcess) -> pb.Details:
    with daemon.stub() as stub:
        (found,) = stub.Stats(pb.StatsRequest(details=True), timeout=PATIENCE).details
    return found


def test_details_are_told_on_request(daemon: DaemonProcess, store: Store) -> None:
    """Who asked for what, what is there, and how often each expert was wanted: over all streams of a client."""
    with daemon.stub() as stub:
        assert not stub.Stats(pb.StatsRequest(), timeout=PATIENCE).details
    with RawClient(daemon.folder, store[1]) as client, RawClient(daemon.folder, store[1]):
        client.acquire(1, 0, [3, 5])
        client.granted()
        client.granted()
        client.send(uses=pb.Uses(blocks=[pb.Experts(block=0, experts=[5, 5])]))
        daemon.wait_for("reported_hits == 2")
        client.open_stream()
        client.acquire(1, 2, [7])
        client.granted()
        found = details(daemon)
        pid = os.getpid()
        assert [(one.number, one.pid, one.reported_hits, one.requested) for one in found.clients] == [
            (1, pid, 2, 3),
            (2, pid, 0, 0),
        ]
        assert [one.leases for one in found.clients] == [1, 0]
        assert found.clients[0].connected_s >= found.clients[1].connected_s > 0
        assert [list(block.ready) for block in found.blocks] == [[3, 5], [], [7]]
        assert [list(block.uses) for block in found.blocks] == [[0, 0, 0, 1, 0, 3, 0, 0], [0] * 8, [0] * 7 + [1]]
    daemon.wait_for("clients == 0")
    assert not details(daemon).clients


def test_messages_of_a_later_version_are_ignored(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.send()  # a oneof that this version has no name for reads as none
        client.acquire(1, 0, [0])
        assert client.granted().expert == 0


@pytest.mark.parametrize(("block", "experts"), [(2**32 - 1, [0]), (3, [0]), (0, [10**9]), (0, [0, 8]), (0, range(9))])
def test_what_the_model_does_not_have_is_missing(
    lasting: DaemonProcess, store: Store, block: int, experts: list[int]
) -> None:
    with RawClient(lasting.folder, store[1]) as client:
        client.acquire(7, block, experts)
        failed = client.failed()
        assert failed.request == 7
        assert isinstance(error_from_message(failed.error), MissingExpertError)
        assert lasting.stats().leases == 0
        client.acquire(7, 0, [1])  # the stream goes on
        assert client.record(client.granted().slot) == store[2][ExpertKey(0, 1)]


@pytest.mark.parametrize("fault", ["twice", "none", "in use", "missing used", "missing prefetch", "too many requests"])
def test_nonsense_ends_the_stream_and_its_leases(lasting: DaemonProcess, store: Store, fault: str) -> None:
    with RawClient(lasting.folder, store[1]) as client:
        client.acquire(1, 0, [0, 1])
        client.granted()
        client.granted()
        match fault:
            case "twice":
                client.acquire(2, 0, [2, 2])
            case "none":
                client.acquire(2, 0, [])
            case "in use":
                client.acquire(1, 0, [2])
            case "missing used":
                client.send(uses=pb.Uses(blocks=[pb.Experts(block=9, experts=[1])]))
            case "missing prefetch":
                client.send(prefetch=pb.Prefetch(requested=pb.Experts(block=0, experts=[10**9])))
            case _:
                for request in range(2, 300):
                    client.acquire(request, 0, [0], timeout_ms=600_000)  # none fails before the last is sent
        error = client.ended()
        assert error is not None
        assert error.code() is (
            grpc.StatusCode.NOT_FOUND if fault.startswith("missing") else grpc.StatusCode.INVALID_ARGUMENT
        )
        assert isinstance(error_of(error), (MissingExpertError, ProtocolError))
        lasting.wait_for("leases == 0")
        client.open_stream()  # with the same credential
        client.acquire(1, 0, [0])
        assert client.record(client.granted().slot) == store[2][ExpertKey(0, 0)]


def test_a_message_that_is_too_long_is_refused(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.acquire(1, 0, range(2**20))
        error = client.ended()
        assert error is not None
        assert isinstance(error_of(error), ProtocolError)  # gRPC's own answer: RESOURCE_EXHAUSTED
        client.open_stream()
        client.acquire(1, 0, [0])
        assert client.granted().expert == 0


def test_a_second_stream_takes_the_place_of_the_first(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.acquire(1, 0, [0])
        client.granted()
        first, reader = client.stream, client.reader
        said, client.messages = client.messages, SimpleQueue()  # the first is not ended from here
        client.open_stream()
        client.acquire(1, 0, [1])
        assert client.granted().expert == 1
        reader.result()
        assert first.code() is grpc.StatusCode.UNAVAILABLE
        said.put(None)
        stats = daemon.wait_for("leases == 1")
        assert stats.sessions == 1


def test_leases_end_with_the_stream(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.acquire(1, 0, [0])
        client.granted()
        client.stream.cancel()
        daemon.wait_for("leases == 0 and sessions == 0")
        assert daemon.stats().clients == 1


def test_leases_and_credential_end_with_the_control_connection(daemon: DaemonProcess, store: Store) -> None:
    with RawClient(daemon.folder, store[1]) as client:
        client.acquire(1, 0, [0])
        client.granted()
        client.control.close()
        error = client.ended()
        assert error is not None
        assert isinstance(error_of(error), RefusedError)
        daemon.wait_for("leases == 0 and clients == 0")
        with pytest.raises(grpc.RpcError) as refused:
            client.stub.Describe(pb.DescribeRequest(), timeout=PATIENCE)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_all_slots_leased_is_reported_after_a_bounded_wait(daemon: DaemonProcess, store: Store) -> None:
    with contextlib.ExitStack() as closing:
        clients = [closing.enter_context(RawClient(daemon.folder, store[1])) for _ in range(4)]
        for block, client in enumerate(clients[:3]):
            client.acquire(1, block, range(4))
        leases = [[client.granted() for _ in range(4)] for client in clients[:3]]
        assert daemon.stats().leases == 12
        other = clients[3]
        for request, deadline in ((1, 0), (2, 30)):  # the daemon's own bound, and the request's
            other.acquire(request, 2, [7], timeout_ms=deadline)
            failed = other.failed()
            assert failed.request == request
            assert isinstance(error_from_message(failed.error), ExhaustedError)
        other.acquire(3, 0, [leases[0][0].expert])  # what is there is had all the same
        assert other.granted().slot == leases[0][0].slot
        assert daemon.stats().host.slots == daemon.stats().host.ready == 12
        other.release(3)
        other.acquire(4, 2, [7], timeout_ms=60_000)
        clients[0].release(1)
        lease = other.granted()
        assert other.record(lease.slot) == store[2][ExpertKey(2, 7)]


def test_a_damaged_record_is_named_and_others_are_served(tmp_path: Path) -> None:
    records = make_store(tmp_path / "store")
    manifest = read_manifest(tmp_path / "store" / "experts.zarr")
    flip_bit(tmp_path / "store" / "experts.zarr/records/c/1/0/0", 2 * SLOT + 100)  # block 1, expert 2
    with (
        running_daemon(tmp_path / "store", folder=tmp_path / "d") as daemon,
        RawClient(daemon.folder, manifest) as client,
        RawClient(daemon.folder, manifest) as other,
    ):
        client.acquire(1, 1, [2])
        other.acquire(1, 1, [1, 3])
        error = error_from_message(client.failed().error)
        assert isinstance(error, ChecksumError)
        assert "expert 2" in error.cause
        for _ in range(2):
            lease = other.granted()
            assert other.record(lease.slot) == records[ExpertKey(1, lease.expert)]
        assert daemon.stats().host.failures == 1
        client.acquire(2, 1, [1])
        assert client.granted().expert == 1


def test_a_fault_of_ours_is_told_and_logged(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And does not look like the end of a connection, after which a client would come again and again."""

    def fault(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with (
        ShardStore.open(store[0]) as opened,
        HostTier(opened, slots={"records": 6}) as host,
        local_daemon(host, store[1], store[0], tmp_path / "d") as folder,
        RawClient(folder, store[1]) as client,
    ):
        with monkeypatch.context() as broken:
            broken.setattr(Session, "note_uses", fault)
            client.acquire(1, 0, [0])
            client.granted()
            client.send(uses=pb.Uses(blocks=[pb.Experts(block=0, experts=[0])]))
            error = client.ended()
        assert error is not None
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "ZeroDivisionError" in error_of(error).cause
        assert any(record.exc_info for record in caplog.records), "with its traceback"
        client.open_stream()
        client.acquire(1, 0, [0])
        assert client.granted().expert == 0


def test_a_fault_of_ours_in_a_single_call_is_told_and_logged(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(_: object) -> None:
        raise ZeroDivisionError

    with (
        ShardStore.open(store[0]) as opened,
        HostTier(opened, slots={"records": 6}) as host,
        local_daemon(host, store[1], store[0], tmp_path / "d") as folder,
        RawClient(folder, store[1]) as client,
    ):
        with monkeypatch.context() as broken:
            broken.setattr(HostedModel, "describe", fault)
            with pytest.raises(grpc.RpcError) as caught:
                client.stub.Describe(pb.DescribeRequest(), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "ZeroDivisionError" in error_of(caught.value).cause
        assert any(record.exc_info for record in caplog.records), "with its traceback"
        assert client.stub.Describe(pb.DescribeRequest(), timeout=PATIENCE).pid == os.getpid()
    caplog.clear()  # a kept traceback has the frames of gRPC's call, and these the server's threads


# -- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer "),),
        (("authorization", ""),),
        (("authorization", "Basic SESSION"),),
        (("authorization", "Bearer " + "0" * 32),),
        (("authorization", "Bearer SESSIONx"),),
        (("authorization", "Bearer SESSION"), ("authorization", "Bearer SESSION")),
        (("authorization-bin", b"Bearer SESSION"),),
        (("authorization", "Bearer " + "x" * 4000),),
    ],
    ids=str,
)
def test_nothing_is_served_without_a_credential(
    lasting: DaemonProcess, store: Store, metadata: tuple[tuple[str, str | bytes], ...]
) -> None:
    with (
        ControlConnection.open(lasting.folder, store[1].digest) as control,
        open_channel(Address.of(lasting.folder), Credentials()) as channel,
    ):
        shown = [
            (name, value.replace("SESSION", control.session_id) if isinstance(value, str) else value)
            for name, value in metadata
        ]
        stub = ExpertStoreStub(channel)
        fetch = pb.FetchRequest(digest=store[1].digest, block=0, expert=0)
        calls = [
            lambda: stub.Describe(pb.DescribeRequest(), timeout=PATIENCE, metadata=shown),
            lambda: stub.Stats(pb.StatsRequest(), timeout=PATIENCE, metadata=shown),
            lambda: list(stub.Fetch(fetch, timeout=PATIENCE, metadata=shown)),
            lambda: list(stub.Session(iter([pb.ClientMessage()]), timeout=PATIENCE, metadata=shown)),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert isinstance(error_of(refused.value), RefusedError)
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "moetier.v1.ExpertStore"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_process_that_only_looks_has_no_session(daemon: DaemonProcess) -> None:
    with daemon.stub() as stub, pytest.raises(grpc.RpcError) as refused:
        list(stub.Session(iter([]), timeout=PATIENCE))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert daemon.stats().clients == 0


def test_another_models_digest_is_unknown(daemon: DaemonProcess, store: Store) -> None:
    for digest in ("0" * 64, "", "\n", "x" * 3000):
        with pytest.raises(UnknownModelError, match="does not serve") as caught:
            ControlConnection.open(daemon.folder, digest)
        assert f"it serves {store[1].model} ({store[1].digest[:12]})" in caught.value.cause
        assert "restart the daemon" in caught.value.fix
    with daemon.stub() as stub, pytest.raises(grpc.RpcError) as unknown:
        list(stub.Fetch(pb.FetchRequest(digest="0" * 64), timeout=PATIENCE))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
    assert isinstance(error_of(unknown.value), UnknownModelError)


def test_clients_are_bounded(store: Store, tmp_path: Path) -> None:
    with running_daemon(store[0], folder=tmp_path / "d", extra=["--max-clients", "2"]) as daemon:
        with RawClient(daemon.folder, store[1]), RawClient(daemon.folder, store[1]):
            with pytest.raises(UnavailableError, match="2 clients"):
                ControlConnection.open(daemon.folder, store[1].digest)
            assert daemon.stats().clients == 2  # who only looks is not one
            refused = (
                f'event=client-refused pid={os.getpid()} cause="The daemon has 2 clients, the most that it accepts."'
            )
            assert refused in daemon.log
        daemon.wait_for("clients == 0")
        with RawClient(daemon.folder, store[1]) as client:
            client.acquire(1, 0, [0])
            assert client.granted().expert == 0


def test_leases_of_one_client_are_bounded(store: Store, tmp_path: Path) -> None:
    with (
        running_daemon(store[0], folder=tmp_path / "d", extra=["--leases", "2"]) as daemon,
        RawClient(daemon.folder, store[1]) as client,
    ):
        client.acquire(1, 0, range(8))
        seen = set()
        for _ in range(8):
            lease = client.granted()
            assert client.record(lease.slot) == store[2][ExpertKey(0, lease.expert)]
            assert daemon.stats().leases <= 2
            seen.add(lease.expert)
            client.release(1, [lease.expert])
        assert seen == set(range(8))


def test_over_tcp_there_is_a_token_and_no_session(store: Store, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    extra = ["--listen", "127.0.0.1:0", "--token-file", token]
    with running_daemon(store[0], folder=tmp_path / "d", extra=extra) as daemon:
        address = Address(target=daemon.card.listen)
        wrong = tmp_path / "wrong"
        wrong.write_text("s3cres\n")
        with ControlConnection.open(daemon.folder, store[1].digest) as control:
            for bearer in (None, "s3cre", "s3crett", control.session_id):
                with (
                    open_channel(address, Credentials(insecure=True), bearer=bearer) as channel,
                    pytest.raises(grpc.RpcError) as refused,
                ):
                    ExpertStoreStub(channel).Describe(pb.DescribeRequest(), timeout=PATIENCE)
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with open_channel(address, Credentials(token_file=token, insecure=True)) as channel:
            stub = ExpertStoreStub(channel)
            assert stub.Describe(pb.DescribeRequest(), timeout=PATIENCE).pid == daemon.pid
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Session(iter([]), timeout=PATIENCE))
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert isinstance(error_of(refused.value), ArenaError)


def test_reflection_is_behind_a_flag_and_a_credential(store: Store, tmp_path: Path) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    asked = [reflection_pb2.ServerReflectionRequest(list_services="")]

    def services(daemon: DaemonProcess, bearer: str | None) -> set[str]:
        with open_channel(daemon.address, Credentials(), bearer=bearer) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            (reply,) = stub.ServerReflectionInfo(iter(asked), timeout=PATIENCE)
            return {service.name for service in reply.list_services_response.service}

    with running_daemon(store[0], folder=tmp_path / "d", extra=["--reflection"]) as daemon:
        with ControlConnection.open(daemon.folder, None) as control:
            assert "moetier.v1.ExpertStore" in services(daemon, control.session_id)
        with pytest.raises(grpc.RpcError) as refused:
            services(daemon, None)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    with (
        running_daemon(store[0], folder=tmp_path / "d") as daemon,
        ControlConnection.open(daemon.folder, None) as control,
        pytest.raises(grpc.RpcError) as refused,
    ):
        services(daemon, control.session_id)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
