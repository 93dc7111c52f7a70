"""The control socket: both ends for real, and ends that don't keep to it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from readers import PATIENCE
from threads import Task, wait_until
from users import NOBODY, as_nobody, become_nobody, need_root

from moetier.runtime.daemon import control_server
from moetier.runtime.daemon.control_server import ControlServer, Welcome
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

DIGEST = "a" * 64


class Host:
    """Admits everybody, with a file of its own as the arena."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.admitted: list[tuple[str, str | None, int]] = []
        self.left: list[str] = []
        self.server = ControlServer(
            folder, admit=self.admit, remove=self.left.append, version="1.2", **{"max_clients": 4, **options}
        )

    def admit(self, session: str, digest: str | None, pid: int) -> Welcome:
        if digest == "0" * 64:
            raise UnknownModelError("Not that.", "Another.")
        self.admitted.append((session, digest, pid))
        if digest is None:
            return Welcome("", {})
        return Welcome("acme", {"records": 3}, os.open(__file__, os.O_RDONLY | os.O_CLOEXEC))

    def raw(self) -> socket.socket:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.connect(str(self.folder / CONTROL_SOCKET))  # waits where many wait
        end.settimeout(PATIENCE)
        return end


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "daemon"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def host(folder: Path) -> Iterator[Host]:
    host = Host(folder)
    yield host
    host.server.close()
    assert not (folder / CONTROL_SOCKET).exists()


def test_a_client_gets_its_place_and_the_descriptor(host: Host) -> None:
    assert stat.S_IMODE((host.folder / CONTROL_SOCKET).stat().st_mode) == 0o600
    with ControlConnection.open(host.folder, DIGEST) as client:
        assert client.slots == {"records": 3}
        assert host.admitted == [(client.session_id, DIGEST, os.getpid())]
        assert len(client.session_id) == 32
        assert client.descriptor is not None
        assert os.fstat(client.descriptor).st_ino == Path(__file__).stat().st_ino
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
            ControlConnection.open(folder, None, patience=0.1)


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
                end.settimeout(1.0)
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
    assert not host.admitted


def test_a_killed_clients_place_is_free_within_a_second(host: Host) -> None:
    script = (
        "import sys; from pathlib import Path; from moetier.runtime.wire.control import ControlConnection\n"
        "c = ControlConnection.open(Path(sys.argv[1]), 'a' * 64); print(c.session_id, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(host.folder)]
    sessions: list[str] = []
    taken: list[float] = []
    while not taken or (min(taken) >= 1 and len(taken) < 3):  # but for moments when the machine has other work
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            sessions.append(process.stdout.readline().strip())
            assert host.admitted[-1] == (sessions[-1], DIGEST, process.pid)
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
            began = time.monotonic()
            wait_until(lambda: host.left == sessions)
            taken.append(time.monotonic() - began)
    assert min(taken) < 1


# -- a client that does not keep to it --------------------------------------------------------------------------------


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
    assert not host.admitted


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_client_whose_answer_can_not_be_made_is_removed_and_the_arena_closed(folder: Path, tmp_path: Path) -> None:
    arena, admitted, left = tmp_path / "arena", list[str](), list[str]()
    arena.touch()

    def admit(session: str, digest: str | None, pid: int) -> Welcome:
        admitted.append(session)
        return Welcome("acme", {"records": object()}, os.open(arena, os.O_RDONLY | os.O_CLOEXEC))  # type: ignore[dict-item]

    with contextlib.closing(ControlServer(folder, admit=admit, leave=left.append, max_clients=4, version="1")):
        with pytest.raises(UnavailableError):
            ControlConnection.open(folder, DIGEST)
        wait_until(lambda: left == admitted != [])
    assert not [link for link in Path("/proc/self/fd").iterdir() if link.resolve() == arena]


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


def test_random_packets_do_no_harm(host: Host) -> None:
    random_ = random.Random(3)

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
    wait_until(lambda: len(host.left) == len(host.admitted))
    with ControlConnection.open(host.folder, DIGEST) as client:
        assert client.slots == {"records": 3}
    assert len(list(Path("/proc/self/task").iterdir())) < 20


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
    assert caplog.messages.count("side-socket-paused") == 1


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


def test_a_server_that_can_not_begin_leaves_nothing_open(folder: Path) -> None:
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
        assert not host.admitted
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
