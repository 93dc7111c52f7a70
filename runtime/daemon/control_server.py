"""The daemon's end of its control socket, which gives clients a credential and the descriptor of an arena. No gRPC."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetier.runtime.wire.address import CONTROL_SOCKET
from moetier.runtime.wire.control import PATIENCE, PROTOCOL, answer, check_peer, error_json, parse
from moetier.tiers.errors import MoetierError, ProtocolError, UnavailableError

from .log import RateLimitedLog, log_event

_MAX_GREETING = 4_096  # bytes of a client's packet
_BACKLOG = 64
_OTHERS = 16  # connections beyond the clients: those without a greeting yet, and those for a credential only
_PAUSE = 0.2  # seconds without accepting after the process has run out of descriptors

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to a client that is admitted. The server closes ``descriptor`` once it is passed on."""

    model: str
    slots: Mapping[str, int]  # by record geometry
    descriptor: int | None = None


@dataclass(slots=True, eq=False)
class _Connection:
    """A connection to the control socket."""

    end: socket.socket
    pid: int
    deadline: float  # for its greeting
    session: str = ""  # set by its greeting
    maps: bool = False  # it is a client of a store


class ControlServer:
    """Server of the control socket in a daemon's folder. One thread serves all connections.

    ``admit(session, digest, pid)`` returns what a client gets. It may raise a MoetierError, which the client gets
    instead, or OSError if the process is out of descriptors. ``leave(session)`` is called when a connection has ended.
    Both are called by the server's thread and must not wait.
    """

    def __init__(
        self,
        folder: Path,
        *,
        admit: Callable[[str, str | None, int], Welcome],
        leave: Callable[[str], None],
        max_clients: int,
        version: str,
    ) -> None:
        """Replace a stale socket, if there is one. Raises OSError if the socket can't be made."""
        self._admit = admit
        self._leave = leave
        self._max_clients = max_clients
        self._version = version
        self._path = folder / CONTROL_SOCKET
        self._connections: set[_Connection] = set()
        self._refusals = RateLimitedLog(_log, "client-refused")
        self._paused_until = 0.0
        self._open = True
        with contextlib.ExitStack() as undo:
            self._selector = undo.enter_context(selectors.DefaultSelector())
            wake, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, wake)
            undo.callback(os.close, self._waker)
            self._selector.register(wake, selectors.EVENT_READ)
            self._listener = undo.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            )
            self._path.unlink(missing_ok=True)
            self._listener.bind(str(self._path))
            undo.callback(self._path.unlink, missing_ok=True)
            self._path.chmod(0o600)
            self._listener.listen(_BACKLOG)
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._serve, name="moetier-control", daemon=True)
            self._thread.start()
            self._release = undo.pop_all().close

    def close(self) -> None:
        """End every connection and remove the socket. Idempotent."""
        if self._open:
            self._open = False
            os.write(self._waker, b"x")
            self._thread.join()
            self._release()

    def _serve(self) -> None:
        while self._open:
            for key, _ in self._selector.select(self._timeout()):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Connection):
                    self._read(key.data)
            self._check_deadlines()
        for connection in list(self._connections):
            self._end(connection)

    def _timeout(self) -> float | None:
        deadlines = [connection.deadline for connection in self._connections if not connection.session]
        deadlines += [self._paused_until] if self._paused_until else []
        return max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        for connection in [one for one in self._connections if not one.session and one.deadline <= now]:
            self._end(connection)
        if self._paused_until and self._paused_until <= now:
            self._paused_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors: the connection waits in the kernel's queue
            log_event(_log, "side-socket-paused", logging.WARNING, cause=error.strerror)
            self._selector.unregister(self._listener)
            self._paused_until = time.monotonic() + _PAUSE
            return
        end.setblocking(False)
        pid: int | str = "?"
        try:
            pid = check_peer(end, "the client")
            if len(self._connections) >= self._max_clients + _OTHERS:
                raise self._full()
        except MoetierError as error:
            self._refusals.log(pid=pid, cause=error.cause)
            # closing with an unread greeting would give the peer an error instead of the answer
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)
                while end.recv(_MAX_GREETING):
                    pass
            answer(end, {"error": error_json(error)})
            end.close()
            return
        connection = _Connection(end, pid, time.monotonic() + PATIENCE)
        self._connections.add(connection)
        self._selector.register(end, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection) -> None:
        """Read a connection's greeting, or end it: whatever comes after the greeting ends it too."""
        try:
            packet, _, flags, _ = connection.end.recvmsg(_MAX_GREETING)  # without room for descriptors that come along
        except BlockingIOError:
            return
        except OSError:
            packet, flags = b"", 0
        if not packet or connection.session or not self._greet(connection, packet, cut=bool(flags & socket.MSG_TRUNC)):
            self._end(connection)

    def _greet(self, connection: _Connection, packet: bytes, *, cut: bool) -> bool:
        session = secrets.token_hex(16)
        try:
            greeting = parse(b"" if cut else packet, "the client")
            digest = greeting.get("digest")
            if greeting.get("protocol") != PROTOCOL or not (digest is None or isinstance(digest, str)):
                raise ProtocolError(
                    f"This daemon ({self._version}) speaks protocol {PROTOCOL} on its control socket, the client not.",
                    "Use moetier in one version.",
                )
            if digest is not None and sum(other.maps for other in self._connections) >= self._max_clients:
                raise self._full()
            welcome = self._admit(session, digest, connection.pid)
        except MoetierError as error:
            self._refusals.log(pid=connection.pid, cause=error.cause)
            answer(connection.end, {"error": error_json(error)})
            return False
        except OSError as error:  # out of descriptors: other clients are still served
            self._refusals.log(pid=connection.pid, cause=error.strerror)
            full = UnavailableError(
                f"The daemon can't pass its arena on: {error.strerror}.", "Raise its limit of open files (ulimit -n)."
            )
            answer(connection.end, {"error": error_json(full)})
            return False
        connection.session, connection.maps = session, digest is not None
        try:
            reply = {
                "session": session,
                "model": welcome.model,
                "slots": dict(welcome.slots),
                "pid": os.getpid(),
                "version": self._version,
            }
            return answer(connection.end, reply, welcome.descriptor)
        finally:
            if welcome.descriptor is not None:
                os.close(welcome.descriptor)

    def _end(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._selector.unregister(connection.end)
        connection.end.close()
        if connection.session:
            self._leave(connection.session)

    def _full(self) -> UnavailableError:
        return UnavailableError(
            f"The daemon has {self._max_clients} client{'s' * (self._max_clients != 1)}, as many as it takes.",
            "Start it with more --max-clients.",
        )
