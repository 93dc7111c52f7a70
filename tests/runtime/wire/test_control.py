"""The control socket: both ends for real, and ends that don't keep to it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_hosts import ARENA, DIGEST, Host, hosting, private
from readers import PATIENCE
from threads import Task, wait_until
from users import NOBODY, as_nobody, become_nobody, need_root

from moetier.runtime.daemon import control_server
from moetier.runtime.wire.address import CONTROL_SOCKET
from moetier.runtime.wire.control import ControlConnection, error_from, error_json
from moetier.testing import in_fork
from moetier.tiers.errors import (
    ChecksumError,
    DaemonError,
    ProtocolError,
    RefusedError,
    UnavailableError,
    UnknownModelError,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return private(tmp_path / "daemon")


@pytest.fixture
def host(folder: Path) -> Iterator[Host]:
    with hosting(folder) as host:
        yield host


def test_a_client_gets_its_place_and_the_descriptor(host: Host) -> None:
    assert stat.S_IMODE((host.folder / CONTROL_SOCKET).stat().st_mode) == 0o600
    with ControlConnection.open(host.folder, DIGEST) as client:
        assert client.slots == {"records": 3}
        assert host.registered == [(client.session_id, DIGEST, os.getpid())]
        assert len(client.session_id) == 32
        assert client.descriptor is not None
        assert os.fstat(client.descriptor).st_ino == ARENA.stat().st_ino
        assert not os.get_inheritable(client.descriptor)
        assert client.is_alive()
        with ControlConnection.open(host.folder, None) as other:
            assert other.descriptor is None
            assert other.session_id != client.session_id
            session = other.session_id
        wait_until(lambda: host.left == [session])
        session = client.session_id
    wait_until(lambda: session in host.left)
    client.close()
    assert not client.is_alive()


def test_errors_come_as_they_are_raised(host: Host) -> None:
    with pytest.raises(UnknownModelError) as unknown:
        ControlConnection.open(host.folder, "0" * 64)
    assert (unknown.value.cause, unknown.value.fix) == ("Not that.", "Another.")
    for error in (ChecksumError("a", "b"), DaemonError("c", "d")):
        copy = error_from(error_json(error))
        assert (type(copy), copy.cause, copy.fix) == (type(error), error.cause, error.fix)
    for junk in ({"kind": "SystemExit"}, {"kind": "annotations"}, {}, {"kind": ["x"], "cause": 3}):
        assert type(error_from(junk)) is DaemonError
    assert type(error_from("x")) is ProtocolError


def test_no_daemon_is_unavailable(host: Host, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="No daemon runs"):
        ControlConnection.open(tmp_path / "nothing", None)
    host.server.close()
    with pytest.raises(UnavailableError, match="No daemon runs"):
        ControlConnection.open(folder, None)
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(folder / CONTROL_SOCKET))
    stale.close()
    with pytest.raises(UnavailableError, match="refused"):
        ControlConnection.open(folder, None)
    again = Host(folder)  # what a killed daemon left is in nobody's way
    with ControlConnection.open(folder, None):
        pass
    again.server.close()


def test_a_daemon_that_says_nothing_is_unavailable(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.bind(str(folder / CONTROL_SOCKET))
        silent.listen(1)
        with pytest.raises(UnavailableError, match="does not answer"):
            ControlConnection.open(folder, None, timeout=0.1)


@pytest.mark.parametrize(
    "reply",
    [
        b"x",
        b"[]",
        b"{}",
        b'{"session": "s"}',
        b'{"session": "s", "model": "m", "slots": 3, "pid": 1, "version": "v"}',
        b'{"session": "s", "model": "m", "slots": {"r": "x"}, "pid": 1, "version": "v"}',
        b'{"error": 7}',
        b"[" * 5000,
    ],
)
@pytest.mark.parametrize("digest", [None, DIGEST])
def test_a_daemon_that_says_nonsense_is_refused_and_its_descriptor_closed(
    folder: Path, reply: bytes, digest: str | None
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as odd:
        odd.bind(str(folder / CONTROL_SOCKET))
        odd.listen(1)

        def serve() -> None:
            with odd.accept()[0] as end, Path(__file__).open() as file:
                end.recv(4096)
                socket.send_fds(end, [reply], [file.fileno()] * 3)

        task = Task(serve)
        with pytest.raises(ProtocolError):
            ControlConnection.open(folder, digest)
        task.result()


def test_an_open_folder_is_refused(host: Host) -> None:
    host.folder.chmod(0o755)
    with pytest.raises(RefusedError, match="open to other users"):
        ControlConnection.open(host.folder, None)


def test_the_end_of_the_daemon_is_seen(host: Host) -> None:
    with ControlConnection.open(host.folder, DIGEST) as client:
        host.server.close()
        assert not client.is_alive()
    assert host.left == [client.session_id]


def test_a_forked_child_does_not_keep_the_place(host: Host) -> None:
    with ControlConnection.open(host.folder, DIGEST) as client:
        descriptor = client.descriptor

        def look() -> str:
            try:
                os.fstat(descriptor or -1)
            except OSError:
                return "closed " + str(client.is_alive())
            return "open"

        assert in_fork(look) == "returned closed False"
        reading, writing = os.pipe()
        child = os.fork()
        if not child:  # lives on, and does nothing
            os.read(reading, 1)
            os._exit(0)
        try:
            assert client.is_alive()
            session = client.session_id
            client.close()
            wait_until(lambda: host.left == [session])
        finally:
            os.write(writing, b"x")
            os.waitpid(child, 0)
            os.close(reading)
            os.close(writing)


def test_a_child_that_is_forked_while_a_place_is_asked_for_does_not_keep_it(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.bind(str(folder / CONTROL_SOCKET))
        daemon.listen(1)
        asking = Task(lambda: ControlConnection.open(folder, None))
        end, _ = daemon.accept()
        with end:
            assert end.recv(65536)  # it waits for the answer now
            reading, writing = os.pipe()
            child = os.fork()
            if not child:  # lives on, and does nothing
                os.read(reading, 1)
                os._exit(0)
            try:
                end.send(b"{}")
                with pytest.raises(ProtocolError):
                    asking.result()
                end.settimeout(PATIENCE)
                assert end.recv(65536) == b"", "the only client has given up"
            finally:
                os.write(writing, b"x")
                os.waitpid(child, 0)
                os.close(reading)
                os.close(writing)


def test_without_a_descriptor_for_its_socket_a_client_is_told_so(host: Host) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)  # the number that a socket would get
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        with pytest.raises(UnavailableError, match="Too many open files"):
            ControlConnection.open(host.folder, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not host.registered


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that others can reach."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="moetier-test-") as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "daemon"
        folder.mkdir(mode=0o700)
        yield folder


@pytest.mark.parametrize("digest", [None, DIGEST])
@pytest.mark.parametrize("delay", [0, 0.05], ids=["at once", "behind the greeting"])
def test_another_user_gets_nothing(
    reachable: Path, digest: str | None, delay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_peer = control_server.check_peer

    def slow(end: socket.socket, who: str) -> int:
        time.sleep(delay)
        return check_peer(end, who)

    monkeypatch.setattr(control_server, "check_peer", slow)
    host = Host(reachable)

    def ask() -> object:
        with host.raw() as end:
            with contextlib.suppress(BrokenPipeError):
                end.send(json.dumps({"protocol": 1, "digest": digest}).encode())
            reply, descriptors, _, _ = socket.recv_fds(end, 65536, 4)
            return reply.decode(), descriptors

    try:
        assert "PermissionError" in as_nobody(ask)  # by the folder
        reachable.chmod(0o777)
        (reachable / CONTROL_SOCKET).chmod(0o666)
        refused = as_nobody(ask)  # and by who it is
        assert "RefusedError" in refused
        assert f"User {NOBODY} runs the client" in refused
        assert refused.endswith("[])")
        assert not host.registered
        assert "belongs to another user" in as_nobody(lambda: ControlConnection.open(reachable, digest))
    finally:
        host.server.close()


def test_another_users_daemon_gets_nothing(reachable: Path) -> None:
    """The folder is this user's, but who listens in it is not."""
    need_root()
    reachable.chmod(0o777)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            become_nobody()
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            listener.bind(str(reachable / CONTROL_SOCKET))
            listener.listen(1)
            os.write(writing, b"ready\n")
            end, _ = listener.accept()
            os.write(writing, b"heard %r" % end.recv(4096))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 100) == b"ready\n"
        reachable.chmod(0o700)
        with pytest.raises(RefusedError, match=str(NOBODY)):
            ControlConnection.open(reachable, DIGEST)
        assert os.read(reading, 100) == b"heard b''"
    finally:
        os.waitpid(child, 0)
        os.close(reading)
