"""Nonsense by the thousand, on every socket of a real daemon: it stays up, serves right records, and keeps nothing."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from daemons import DaemonProcess, running_daemon
from raw_client import RawClient
from readers import PATIENCE
from stores import layout_of, make_store
from threads import wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.wire.address import CONTROL_SOCKET, SOCKET, Address, Credentials
from moetier.runtime.wire.channel import open_channel
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest

SLOT = layout_of().slot_bytes
METHODS = ("Describe", "Session", "Fetch", "Stats", "Nothing")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, dict[ExpertKey, bytes]]:
    folder = tmp_path_factory.mktemp("store")
    records = make_store(folder, experts=8)
    return folder, read_manifest(folder / "experts.zarr"), records


@pytest.fixture
def attacked(store: tuple[Path, Manifest, dict[ExpertKey, bytes]], tmp_path: Path) -> Iterator[DaemonProcess]:
    """What is checked of it behind the attack is here."""
    extra = ["--listen", "127.0.0.1:0", "--insecure", "--wait", "0.05"]
    with running_daemon(store[0], ram=12 * SLOT, folder=tmp_path / "d", extra=extra) as daemon:

        def serves() -> None:
            with RawClient(daemon.folder, store[1]) as client:
                for block in range(3):
                    client.acquire(block, block, [1, 6])
                    for _ in range(2):
                        lease = client.granted()
                        assert client.record(lease.slot) == store[2][ExpertKey(block, lease.expert)]

        for _ in range(20):  # its pools of threads grow up to their size as they are used
            serves()
        daemon.wait_for("clients == 0")
        before = resources(daemon.pid)
        yield daemon
        assert daemon.process.poll() is None, daemon.log
        serves()
        stats = daemon.wait_for("clients == 0 and leases == 0 and sessions == 0")
        assert stats.host.slots == 12
        wait_until(lambda: resources(daemon.pid)[0] <= before[0])
        # the pools have at most 64 + 24 + 8 and 24 + 8 threads; gRPC's own grow with the cores
        assert resources(daemon.pid)[1] <= before[1] + 128
        began = time.monotonic()
        assert daemon.stop() == 0, daemon.log
        assert time.monotonic() - began < PATIENCE / 2, "calls were never ended"
        assert "traceback" not in daemon.log
        assert "Traceback" not in daemon.log


def resources(process: int) -> tuple[int, int]:
    """Descriptors and threads."""
    descriptors, threads = (sum(1 for _ in Path(f"/proc/{process}/{what}").iterdir()) for what in ("fd", "task"))
    return descriptors, threads


class Nonsense:
    """Messages that are right, nearly right, and not right at all."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self) -> int:
        return self._random.choice([0, 1, 2, 3, 7, 8, 10**9, 2**31, 2**32 - 1])

    def experts(self) -> list[int]:
        return [self.number() for _ in range(self._random.choice([0, 1, 1, 2, 3, 50]))]

    def message(self) -> pb.ClientMessage:
        request = self._random.choice([0, 1, 2, 3, 2**64 - 1])
        block = self._random.choice([0, 1, 2, 2, 3, 2**32 - 1])
        match self._random.randrange(6):
            case 0 | 1:
                deadline = self._random.choice([0, 1, 20, 2**32 - 1])
                experts = self._random.sample(range(8), self._random.randrange(1, 4))
                if self._random.random() < 0.05:
                    experts = self.experts()
                return pb.ClientMessage(
                    acquire=pb.Acquire(
                        request=self._random.randrange(2**64), block=block, experts=experts, timeout_ms=deadline
                    )
                )
            case 2:
                return pb.ClientMessage(release=pb.Release(request=request, experts=self.experts()))
            case 3:
                blocks = [pb.Experts(block=self._random.randrange(3), experts=[1, 2]) for _ in range(3)]
                if self._random.random() < 0.05:
                    blocks.append(pb.Experts(block=block, experts=self.experts()))
                return pb.ClientMessage(uses=pb.Uses(blocks=blocks))
            case 4:
                requested = pb.Experts(block=self._random.randrange(3), experts=self._random.sample(range(8), 3))
                return pb.ClientMessage(prefetch=pb.Prefetch(requested=requested))
            case _:
                return pb.ClientMessage()

    def bytes(self) -> bytes:
        message = bytearray(self.message().SerializeToString() or b"\x0a")
        match self._random.randrange(3):
            case 0:
                return self._random.randbytes(self._random.randrange(300))
            case 1:
                message[self._random.randrange(len(message))] = self._random.randrange(256)
                return bytes(message)
            case _:
                return bytes(message[: self._random.randrange(len(message) + 1)])


def finished(answers: Callable[[], object]) -> None:
    """Whatever they are; not a hang."""
    with contextlib.suppress(grpc.RpcError):
        answers()


def test_ten_thousand_messages_of_sessions(
    attacked: DaemonProcess, store: tuple[Path, Manifest, dict[ExpertKey, bytes]]
) -> None:
    nonsense = Nonsense(1)
    with (
        ControlConnection.open(attacked.folder, store[1].digest) as control,
        open_channel(attacked.address, Credentials(), bearer=control.session_id) as channel,
    ):
        stub = ExpertStoreStub(channel)
        for number in range(200):
            call = stub.Session(iter([nonsense.message() for _ in range(50)]), timeout=PATIENCE)
            if number % 3 == 0:
                call.cancel()
            finished(lambda call=call: list(call))  # type: ignore[misc]  # bound at once


def test_random_bytes_as_messages(
    attacked: DaemonProcess, store: tuple[Path, Manifest, dict[ExpertKey, bytes]]
) -> None:
    nonsense = Nonsense(2)
    targets = [attacked.address, Address(target=attacked.card.listen)]
    with ControlConnection.open(attacked.folder, store[1].digest) as control:
        for address in targets:
            with open_channel(address, Credentials(insecure=True), bearer=control.session_id) as channel:
                for number in range(400):
                    name = METHODS[number % len(METHODS)]
                    call = channel.stream_stream(f"/moetier.v1.ExpertStore/{name}")
                    parts = [nonsense.bytes() for _ in range(3)]
                    finished(lambda call=call, parts=parts: list(call(iter(parts), timeout=PATIENCE)))  # type: ignore[misc]


def test_metadata_of_all_types(attacked: DaemonProcess) -> None:
    random_ = random.Random(5)
    with open_channel(attacked.address, Credentials()) as channel:
        stub = ExpertStoreStub(channel)
        for _ in range(500):
            name = random_.choice(["authorization", "authorization-bin", "grpc-timeout-x", "x", "te-x", "cookie"])
            value: str | bytes = "".join(chr(random_.randrange(32, 127)) for _ in range(random_.randrange(200)))
            if name.endswith("-bin"):
                value = random_.randbytes(random_.randrange(200))
            metadata = [(name, value)] * random_.randrange(1, 30)
            with pytest.raises(grpc.RpcError) as refused:
                stub.Stats(pb.StatsRequest(), timeout=PATIENCE, metadata=metadata)
            assert refused.value.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize("place", ["unix", "tcp", "control"])
def test_random_bytes_on_a_socket(attacked: DaemonProcess, place: str) -> None:
    random_ = random.Random(6)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    def connect() -> socket.socket:
        if place == "tcp":
            host, _, port = attacked.card.listen.rpartition(":")
            return socket.create_connection((host, int(port)), PATIENCE)
        kind = socket.SOCK_SEQPACKET if place == "control" else socket.SOCK_STREAM
        end = socket.socket(socket.AF_UNIX, kind)
        end.connect(str(attacked.folder / (CONTROL_SOCKET if place == "control" else SOCKET)))
        return end

    for number in range(400):
        with connect() as end, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(random_.randrange(4)):
                data = random_.randbytes(random_.choice([1, 9, 100, 3000]))
                if place == "control" and number % 2:
                    data = json.dumps({"protocol": 1, "digest": random_.choice([None, 3, "x"]), "more": [1]}).encode()
                elif number % 3 == 0:
                    data = preface + data
                elif number % 3 == 1:  # a frame's head, right in its form
                    length = random_.choice([0, 5, 100, 2**14, 2**24 - 1]).to_bytes(3, "big")
                    kind, flags, stream = random_.randrange(12), random_.randrange(256), random_.randrange(2**31)
                    data = preface + length + bytes([kind, flags]) + stream.to_bytes(4, "big") + data
                end.send(data)


def test_streams_that_are_opened_and_left(
    attacked: DaemonProcess, store: tuple[Path, Manifest, dict[ExpertKey, bytes]]
) -> None:
    """More at once than there are threads: one client has one stream, whatever it opens."""
    with (
        ControlConnection.open(attacked.folder, store[1].digest) as control,
        open_channel(attacked.address, Credentials(), bearer=control.session_id) as channel,
    ):
        stub = ExpertStoreStub(channel)
        acquire = pb.ClientMessage(acquire=pb.Acquire(request=1, block=0, experts=[1, 2]))
        calls = [stub.Session(iter([acquire]), timeout=PATIENCE) for _ in range(300)]
        assert attacked.stats().sessions <= 1
        for call in calls:
            call.cancel()
