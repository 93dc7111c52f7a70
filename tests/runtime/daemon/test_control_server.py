"""The daemon's end of the control socket: clients that come, go, and send what they must not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_hosts import DIGEST, Host, hosting, private
from readers import PATIENCE
from threads import wait_until, without_thread

from moetier.runtime.daemon import control_server
from moetier.runtime.daemon.control_server import ControlServer, Welcome
from moetier.runtime.wire.address import CONTROL_SOCKET
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.errors import UnavailableError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return private(tmp_path / "daemon")


@pytest.fixture
def host(folder: Path) -> Iterator[Host]:
    with hosting(folder) as host:
        yield host


def test_a_killed_clients_place_is_free_within_a_second(host: Host) -> None:
    script = (
        "import sys; from pathlib import Path; from moetier.runtime.wire.control import ControlConnection\n"
        "c = ControlConnection.open(Path(sys.argv[1]), 'a' * 64); print(c.session_id, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(host.folder)]
    sessions: list[str] = []
    shortest, deadline = float("inf"), time.monotonic() + PATIENCE
    while shortest >= 1 and time.monotonic() < deadline:  # but for moments when the machine has other work
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            sessions.append(process.stdout.readline().strip())
            assert host.registered[-1] == (sessions[-1], DIGEST, process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
            began = time.monotonic()
            wait_until(lambda: host.left == sessions)
            shortest = min(shortest, time.monotonic() - began)
    assert shortest < 1


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"[]",
        b"null",
        b"{}",
        b'{"protocol": 2, "digest": null}',
        b'{"protocol": "1", "digest": null}',
        b'{"protocol": 1, "digest": 7}',
        b'{"protocol": 1, "digest": ["a"]}',
        b'{"protocol": 1, "digest": null}' + b" " * 5000,
        b"[" * 4000,
        b"\xff\xfe",
        b'{"protocol": 1, "digest": NaN}',
    ],
)
def test_a_greeting_that_is_none_gets_an_error_and_the_end(host: Host, packet: bytes) -> None:
    with host.raw() as end:
        end.send(packet)
        assert json.loads(end.recv(65536))["error"]["kind"] == "ProtocolError"
        assert end.recv(1) == b""
    assert not host.registered
    assert not host.left


def test_saying_more_ends_the_place(host: Host) -> None:
    with host.raw() as end:
        end.send(json.dumps({"protocol": 1, "digest": None}).encode())
        session = json.loads(end.recv(65536))["session"]
        end.send(b"more")
        assert end.recv(1) == b""
        wait_until(lambda: host.left == [session])


def test_saying_nothing_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_server, "PACKET_SECONDS", 0.05)
    host = Host(folder)
    with host.raw() as end:
        assert end.recv(1) == b""
    host.server.close()


def test_descriptors_that_come_along_are_not_kept(host: Host) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with host.raw() as end:
        socket.send_fds(end, [json.dumps({"protocol": 1, "digest": None}).encode()], [0] * 100)
        assert "session" in json.loads(end.recv(65536))
        assert len(list(Path("/proc/self/fd").iterdir())) == before + 2  # the two ends


def test_clients_are_bounded_and_so_are_all_connections(host: Host) -> None:
    clients = [ControlConnection.open(host.folder, DIGEST) for _ in range(4)]
    with pytest.raises(UnavailableError, match="4 clients"):
        ControlConnection.open(host.folder, DIGEST)
    lookers = [ControlConnection.open(host.folder, None) for _ in range(16)]
    with pytest.raises(UnavailableError):
        ControlConnection.open(host.folder, None)
    clients.pop().close()
    wait_until(lambda: len(host.left) == 1)
    clients.append(ControlConnection.open(host.folder, DIGEST))
    for connection in [*clients, *lookers]:
        connection.close()
    wait_until(lambda: len(host.left) == 21)


def threads_here() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_random_packets_do_no_harm(host: Host) -> None:
    random_, threads = random.Random(3), threads_here()  # those of earlier tests among them

    def nonsense() -> bytes:
        match random_.randrange(4):
            case 0:
                return random_.randbytes(random_.randrange(1, 6000))
            case 1:
                return b""
            case 2:
                greeting = bytearray(b'{"protocol": 1, "digest": null}')
                greeting[random_.randrange(len(greeting))] = random_.randrange(256)
                return bytes(greeting)
            case _:
                return json.dumps({"protocol": random_.choice([1, None, 2.5]), "digest": "x" * 70}).encode()

    for _ in range(2000):
        with host.raw() as end:
            for _ in range(random_.randrange(3)):
                try:
                    end.send(nonsense())
                except (BrokenPipeError, ConnectionResetError):
                    break
    wait_until(lambda: len(host.left) == len(host.registered))
    with ControlConnection.open(host.folder, DIGEST) as client:
        assert client.slots == {"records": 3}
    wait_until(lambda: threads_here() < threads + 5)


def test_without_descriptors_it_waits_until_there_are_some(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so once, however often it tries."""
    monkeypatch.setattr(control_server, "_PAUSE", 0.01)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(PATIENCE)
    used = max(int(link.name) for link in Path("/proc/self/fd").iterdir() if link.name != "")
    filler = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, limits[1]))
        try:
            while True:
                filler.append(os.dup(0))
        except OSError:
            pass
        end.connect(str(host.folder / CONTROL_SOCKET))
        end.send(json.dumps({"protocol": 1, "digest": None}).encode())
        time.sleep(0.3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in filler:
            os.close(descriptor)
    assert "session" in json.loads(end.recv(65536))
    end.close()
    assert caplog.messages.count("control-socket-paused") == 1


@contextlib.contextmanager
def only_descriptors(count: int) -> Iterator[None]:
    """No more than so many can be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(link.name) for link in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + count + 1, limits[1]))
    filler: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                filler.append(os.dup(0))
        for _ in range(count):
            os.close(filler.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in filler:
            os.close(descriptor)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_server_that_cannot_begin_leaves_nothing_open(folder: Path) -> None:
    """It takes one, of its socket."""
    before = open_descriptors()
    with only_descriptors(0), pytest.raises(OSError, match="Too many open files"):
        Host(folder)
    assert open_descriptors() == before
    with only_descriptors(1):
        host = Host(folder)
    host.server.close()
    assert open_descriptors() == before


def test_a_server_without_a_folder_leaves_nothing_open(folder: Path) -> None:
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        Host(folder / "missing")
    assert open_descriptors() == before


def test_closing_twice_closes_nothing_of_others(folder: Path) -> None:
    before = open_descriptors()
    host = Host(folder)
    host.server.close()
    others = [os.dup(0) for _ in range(4)]  # have the numbers of what was closed
    host.server.close()
    for descriptor in others:
        os.close(descriptor)
    assert open_descriptors() == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_client_whose_answer_cannot_be_made_is_removed_and_the_arena_closed(folder: Path, tmp_path: Path) -> None:
    arena, registered, left = tmp_path / "arena", list[str](), list[str]()
    arena.touch()

    def register(session: str, digest: str | None, pid: int) -> Welcome:
        registered.append(session)
        return Welcome("acme", {"records": object()}, os.open(arena, os.O_RDONLY | os.O_CLOEXEC))  # type: ignore[dict-item]

    with contextlib.closing(
        ControlServer(folder, register=register, unregister=left.append, max_clients=4, version="1")
    ):
        with pytest.raises(UnavailableError):
            ControlConnection.open(folder, DIGEST)
        wait_until(lambda: left == registered != [])
    assert not [link for link in Path("/proc/self/fd").iterdir() if link.resolve() == arena]


def test_without_a_thread_a_client_is_refused_and_the_next_one_is_served(host: Host) -> None:
    with (
        without_thread("moetier-greeter"),
        pytest.raises(UnavailableError, match="no thread moetier-greeter: can't start new thread") as caught,
    ):
        ControlConnection.open(host.folder, DIGEST)
    assert "ulimit -u" in caught.value.fix
    with ControlConnection.open(host.folder, DIGEST) as client:
        assert client.slots == {"records": 3}
