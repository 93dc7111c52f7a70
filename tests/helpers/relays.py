"""Between a daemon's gRPC socket and a client: counts what passes."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from moetier.runtime.wire.address import CONTROL_SOCKET, SOCKET


class Relay:
    """``folder`` is what the client connects to; ``bytes`` passed in both directions together."""

    def __init__(self, to: Path, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        self._to = to / SOCKET
        folder.mkdir(mode=0o700)
        (folder / CONTROL_SOCKET).symlink_to(to / CONTROL_SOCKET)
        self._ends: list[socket.socket] = []
        self._cut: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(folder / SOCKET))
        self._listener.listen()
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
        shutil.rmtree(self.folder)

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
                far = socket.socket(socket.AF_UNIX)
                far.connect(str(self._to))
                self._ends += [near, far]
                self._start(self._pass, near, far)
                self._start(self._pass, far, near)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.bytes += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def relay(to: Path, folder: Path) -> Iterator[Relay]:
    made = Relay(to, folder)
    try:
        yield made
    finally:
        made.close()
