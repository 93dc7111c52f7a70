"""Callers without a credential, half-open calls and idle connections take nothing from those that are served."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
import trustme
from daemons import DaemonProcess, running_daemon
from grpc_health.v1 import health_pb2, health_pb2_grpc
from half_open import connect, half_open
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_store
from threads import Task, best_time, wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.daemon.server import WATCHERS
from moetier.runtime.wire.address import SOCKET, Address, Credentials
from moetier.runtime.wire.channel import open_channel
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest

SLOT = layout_of().slot_bytes
SERVICE = "/moetier.v1.ExpertStore"
METHODS = [f"{SERVICE}/{name}" for name in ("Describe", "Stats", "Fetch", "Session")]
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("store")
    make_store(folder, experts=8)
    return folder, read_manifest(folder / "experts.zarr")


class Served:
    """A daemon on TCP, and its authorised clients."""

    def __init__(self, daemon: DaemonProcess, manifest: Manifest, credentials: Credentials) -> None:
        self.daemon = daemon
        self.target = daemon.card.listen
        self.tls = not credentials.insecure
        self._manifest = manifest
        self.credentials = credentials

    @contextlib.contextmanager
    def remote(self) -> Iterator[grpc.Channel]:
        with open_channel(Address(target=self.target), self.credentials) as channel:
            yield channel

    def use(self) -> None:
        """Describe, Session and Fetch, each by a client that is new."""
        with self.remote() as channel:
            stub = ExpertStoreStub(channel)
            assert stub.Describe(pb.DescribeRequest(), timeout=PATIENCE).pid == self.daemon.pid
            fetch = pb.FetchRequest(digest=self._manifest.digest, block=1, expert=2)
            assert list(stub.Fetch(fetch, timeout=PATIENCE))
        with RawClient(self.daemon.folder, self._manifest) as client:
            client.acquire(1, 0, [3])
            assert client.granted().expert == 3

    def is_available(self) -> bool:
        """Whether the daemon takes a connection and a call now."""
        with self.remote() as channel:
            try:
                ExpertStoreStub(channel).Describe(pb.DescribeRequest(), timeout=PATIENCE)
            except grpc.RpcError as error:
                return error.code() is not grpc.StatusCode.UNAVAILABLE
        return True

    def check_is_quick(self) -> None:
        """The best of some rounds takes less than a second: whatever blocks the clients blocks each of them."""
        assert best_time(self.use, 1) < 1


@pytest.fixture(scope="module", params=["plain", "tls"])
def served(
    request: pytest.FixtureRequest, store: tuple[Path, Manifest], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("daemon")
    token = folder / "token"
    token.write_text("s3cret\n")
    token.chmod(0o600)
    extra: list[str | Path] = ["--listen", "127.0.0.1:0", "--token-file", token]
    credentials = Credentials(token_file=token, insecure=True)
    if request.param == "tls":
        authority = trustme.CA()
        identity = authority.issue_cert("127.0.0.1")
        for pem, name in (
            (authority.cert_pem, "ca"),
            (identity.private_key_pem, "key"),
            (identity.cert_chain_pems[0], "cert"),
        ):
            pem.write_to_path(folder / f"{name}.pem")
        extra += ["--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem"]
        credentials = Credentials(token_file=token, ca=folder / "ca.pem")
    with running_daemon(store[0], ram=12 * SLOT, folder=folder / "d", extra=extra) as daemon:
        yield Served(daemon, store[1], credentials)
        assert daemon.stop() == 0
        assert "traceback" not in daemon.log


@pytest.mark.parametrize("token", [None, "s3cres"])
@pytest.mark.parametrize("methods", [METHODS, [CHECK]], ids=["store", "health"])
def test_half_open_calls_without_the_token(served: Served, token: str | None, methods: list[str]) -> None:
    with half_open(20, served.target, tls=served.tls, token=token) as connections:
        opened = [
            (one, one.open(methods[number % len(methods)], 25)) for one in connections for number in range(len(methods))
        ]
        served.check_is_quick()
        for connection, calls in opened:
            connection.wait(calls)  # each is refused, although it never sends a message


def test_half_open_calls_that_are_repeated_without_end(served: Served) -> None:
    begun, over = threading.Event(), threading.Event()

    def attack() -> None:
        with half_open(20, served.target, tls=served.tls, token="wrong") as connections:
            while not over.is_set():
                opened = [(one, one.open(METHODS[0], 25)) for one in connections]
                begun.set()
                for connection, calls in opened:
                    connection.wait(calls)

    attacker = Task(attack, "attacker")
    try:
        assert begun.wait(PATIENCE)
        served.check_is_quick()
    finally:
        over.set()
    attacker.result()


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_a_client_that_reads_no_answers_takes_no_memory(served: Served) -> None:
    """Each call is refused, and what is not sent yet is kept: so a connection may have a few calls at a time."""
    before = resident(served.daemon.pid)
    with half_open(1, served.target, tls=served.tls) as (connection,):
        for _ in range(60):
            connection.open(METHODS[0], 1000)
        served.check_is_quick()
        assert resident(served.daemon.pid) - before < 64 << 20


def test_health_checks_over_tcp_need_the_token(served: Served) -> None:
    request = health_pb2.HealthCheckRequest()
    with served.remote() as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    strange = Credentials(insecure=True) if not served.tls else Credentials(ca=served.credentials.ca)
    with open_channel(Address(target=served.target), strange) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        calls: list[Callable[[], object]] = [
            lambda: stub.Check(request, timeout=PATIENCE),
            lambda: list(stub.Watch(request, timeout=PATIENCE)),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is UNAUTHENTICATED


def test_half_open_calls_on_the_unix_socket(served: Served) -> None:
    """Calls of the store are refused, health checks are answered: at once, and without a message."""
    with half_open(4, served.daemon.folder / SOCKET) as connections:
        opened = [(one, one.open(method, 125)) for one in connections for method in (*METHODS, CHECK)]
        watching = [(one, one.open(WATCH, 30)) for one in connections]
        served.check_is_quick()
        for connection, calls in opened:
            connection.wait(calls)
        for connection, calls in watching:
            assert not connection.ended.intersection(calls)


def test_watches_that_begin_and_end_in_numbers(served: Served) -> None:
    """A few are answered, the others refused; those that have ended make room."""
    for _ in range(5):
        with half_open(4, served.daemon.folder / SOCKET) as connections:
            for connection in connections:
                connection.open(WATCH, 30)
    served.check_is_quick()
    deadline = time.monotonic() + PATIENCE
    with open_channel(served.daemon.address, Credentials()) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        calls = []  # one that is not referred to any more is cancelled

        def watch() -> grpc.StatusCode | None:
            """How a call that watches has ended; None while it goes on."""
            call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            calls.append(call)
            try:
                assert next(call).status == health_pb2.HealthCheckResponse.SERVING
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()  # type: ignore[attr-defined]
                return code
            return None

        while watch() is not None:  # until the former are gone
            assert time.monotonic() < deadline
        ends = [watch() for _ in range(WATCHERS + 20)]
        assert ends.count(None) < WATCHERS
        assert set(ends) - {None} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        served.use()


@pytest.mark.parametrize("sent", [None, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"], ids=["silent", "half a handshake"])
def test_connections_that_never_become_one_of_http2(served: Served, sent: bytes | None) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            end = stack.enter_context(connect(served.target))
            if sent is not None:
                end.sendall(sent)
        served.check_is_quick()


def test_connections_without_calls(served: Served) -> None:
    with half_open(120, served.target, tls=served.tls):
        served.check_is_quick()


@pytest.mark.slow
def test_a_connection_without_a_handshake_is_closed(served: Served) -> None:
    with connect(served.target) as silent:
        while silent.recv(1 << 16):  # without TLS the server's settings come first
            pass


def test_connections_leave_descriptors_for_this_hosts_clients(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s3cret\n")
    token.chmod(0o600)
    extra = ["--listen", "127.0.0.1:0", "--token-file", token]
    prefix = ["prlimit", "--nofile=200:200"]
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=extra, prefix=prefix) as daemon:
        served = Served(daemon, store[1], Credentials(token_file=token, insecure=True))
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(connect(served.target))
            with RawClient(daemon.folder, store[1]) as client:
                client.acquire(1, 2, [5])
                assert client.granted().expert == 5
        wait_until(served.is_available)  # their places are free again, once the daemon has seen them close
        served.use()
        assert daemon.stop() == 0


def test_connections_to_the_metrics_leave_descriptors_too(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    """Those that have been open for longest make room, whatever trickles in there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    extra = ["--metrics", f"127.0.0.1:{port}"]
    prefix = ["prlimit", "--nofile=200:200"]
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=extra, prefix=prefix) as daemon:
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                stack.enter_context(connect(f"127.0.0.1:{port}")).sendall(b"GET /healthz HTTP/1.1\r\nX-A: ")
            with connect(f"127.0.0.1:{port}") as probe:
                probe.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert b"200 OK" in probe.recv(1 << 16)
            assert len(list(Path(f"/proc/{daemon.pid}/fd").iterdir())) < 150
            with RawClient(daemon.folder, store[1]) as client:
                client.acquire(1, 2, [5])
                assert client.granted().expert == 5
        assert daemon.stop() == 0
        assert "traceback" not in daemon.log.lower()
