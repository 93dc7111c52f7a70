"""Between a daemon's gRPC socket and a client: counts what passes, or flips bits of it."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from moetier.runtime.wire.address import CONTROL_SOCKET, SOCKET

UP, DOWN = range(2)  # directions: to the daemon, and to the client


class Wire:
    """Passes on what comes to ``listener`` and its answers; ``bytes`` passed in both directions together."""

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self.bytes = 0
        self._connect = connect
        self._ends: list[socket.socket] = []
        self._cut: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = listener
        self._start(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends, *self._cut):
            end.close()

    def cut(self) -> None:
        """Breaks the connections that there are."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._cut += ends

    def _start(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, name="relay", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._ends.append(near)
                far = self._connect()
                self._ends.append(far)
                self._start(self._pass, near, far, UP)
                self._start(self._pass, far, near, DOWN)

    def _pass(self, source: socket.socket, target: socket.socket, way: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.bytes += len(data)
                target.sendall(self._change(data, way))
            target.shutdown(socket.SHUT_WR)

    def _change(self, data: bytes, way: int) -> bytes:
        return data


class Relay(Wire):
    """Between the Unix socket of the daemon in ``to`` and a client; ``folder`` is what the client connects to."""

    def __init__(self, to: Path, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700)
        (folder / CONTROL_SOCKET).symlink_to(to / CONTROL_SOCKET)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / SOCKET))
        listener.listen()

        def connect() -> socket.socket:
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(to / SOCKET))
            return far

        super().__init__(listener, connect)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.folder)


class Flips(Wire):
    """Between a daemon at HOST:PORT, without TLS, and a client, which connects to ``address``. Flips bits on the way.

    ``passed``: bytes in each direction, to the daemon (UP) and to the client (DOWN). ``flipped``: flipped bits.
    """

    def __init__(self, to: str) -> None:
        host, _, port = to.rpartition(":")
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        self.passed = [0, 0]
        self.flipped = 0
        self._next: dict[tuple[int, int], int] = {}  # by direction and number of a byte: the bit to flip
        self._lock = threading.Lock()  # guards the fields above
        super().__init__(listener, lambda: socket.create_connection((host, int(port))))

    def flip(self, way: int, at: int, bit: int) -> None:
        """Flip a bit of the byte before which ``at`` others pass from now on in a direction."""
        with self._lock:
            self._next[way, self.passed[way] + at] = bit

    def forget(self) -> None:
        """Flip nothing of what was asked for and has not passed."""
        with self._lock:
            self._next.clear()

    def _change(self, data: bytes, way: int) -> bytes:
        changed = bytearray(data)
        with self._lock:
            first = self.passed[way]
            self.passed[way] += len(data)
            for of, place in list(self._next):
                if of == way and first <= place < self.passed[way]:
                    changed[place - first] ^= 1 << self._next.pop((of, place))
                    self.flipped += 1
        return bytes(changed)


@contextlib.contextmanager
def relay(to: Path, folder: Path) -> Iterator[Relay]:
    made = Relay(to, folder)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def flips(to: str) -> Iterator[Flips]:
    made = Flips(to)
    try:
        yield made
    finally:
        made.close()
