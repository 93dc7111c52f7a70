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

from .log import Sparing, say

_GREETING = 4_096  # bytes of a client's packet at most
_BACKLOG = 64
_VISITORS = 16  # connections beyond the clients: those who have not said yet what they want, and those who only look
_PAUSE = 0.2  # seconds without accepting where the process can open no more descriptors

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a client gets. ``descriptor`` is the server's to close, once it is passed on."""

    model: str
    slots: Mapping[str, int]  # by record geometry
    descriptor: int | None = None


@dataclass(slots=True, eq=False)
class _Place:
    """One connection."""

    end: socket.socket
    pid: int
    deadline: float  # of its greeting
    session: str = ""  # from its greeting on
    maps: bool = False  # a client of a store


class ControlServer:
    """Listens in a daemon's folder. One thread serves all connections.

    ``admit(session, digest, pid)`` says what a client gets, or raises a MoetierError, which it gets instead, or OSError
    where there is no descriptor for it; ``leave(session)`` is called when its connection has ended. Both by the
    server's thread: they must not wait.
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
        """Raises OSError where the socket can't be made; a stale one is in nobody's way."""
        self._admit = admit
        self._leave = leave
        self._max_clients = max_clients
        self._version = version
        self._path = folder / CONTROL_SOCKET
        self._places: set[_Place] = set()
        self._refusals = Sparing(_log, "client-refused")
        self._paused_until = 0.0
        self._open = True
        with contextlib.ExitStack() as undo:
            self._selector = undo.enter_context(selectors.DefaultSelector())
            wake, self._bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, wake)
            undo.callback(os.close, self._bell)
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
        """Ends every connection; nobody is admitted any more, and the socket is gone. Idempotent."""
        if self._open:
            self._open = False
            os.write(self._bell, b"x")
            self._thread.join()
            self._release()

    def _serve(self) -> None:
        while self._open:
            for key, _ in self._selector.select(self._timeout()):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Place):
                    self._hear(key.data)
            self._look_at_the_clock()
        for place in list(self._places):
            self._end(place)

    def _timeout(self) -> float | None:
        deadlines = [place.deadline for place in self._places if not place.session]
        deadlines += [self._paused_until] if self._paused_until else []
        return max(min(deadlines) - time.monotonic(), 0.0) if deadlines else None

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        for place in [place for place in self._places if not place.session and place.deadline <= now]:
            self._end(place)
        if self._paused_until and self._paused_until <= now:
            self._paused_until = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        try:
            end, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # no descriptor to be had: the connection waits in the kernel's queue
            say(_log, "side-socket-paused", logging.WARNING, cause=error.strerror)
            self._selector.unregister(self._listener)
            self._paused_until = time.monotonic() + _PAUSE
            return
        end.setblocking(False)
        pid: int | str = "?"
        try:
            pid = check_peer(end, "the client")
            if len(self._places) >= self._max_clients + _VISITORS:
                raise self._full()
        except MoetierError as error:
            self._refusals.say(pid=pid, cause=error.cause)
            # a greeting that is closed upon unread would be the peer's error, in place of the answer
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)
                while end.recv(_GREETING):
                    pass
            answer(end, {"error": error_json(error)})
            end.close()
            return
        place = _Place(end, pid, time.monotonic() + PATIENCE)
        self._places.add(place)
        self._selector.register(end, selectors.EVENT_READ, place)

    def _hear(self, place: _Place) -> None:
        """A connection's greeting, or its end: whatever comes behind the greeting ends it too."""
        try:
            packet, _, flags, _ = place.end.recvmsg(_GREETING)  # descriptors that come along are never installed
        except BlockingIOError:
            return
        except OSError:
            packet, flags = b"", 0
        if not packet or place.session or not self._greet(place, packet, cut=bool(flags & socket.MSG_TRUNC)):
            self._end(place)

    def _greet(self, place: _Place, packet: bytes, *, cut: bool) -> bool:
        session = secrets.token_hex(16)
        try:
            greeting = parse(b"" if cut else packet, "the client")
            digest = greeting.get("digest")
            if greeting.get("protocol") != PROTOCOL or not (digest is None or isinstance(digest, str)):
                raise ProtocolError(
                    f"This daemon ({self._version}) speaks protocol {PROTOCOL} on its control socket, the client not.",
                    "Use moetier in one version.",
                )
            if digest is not None and sum(other.maps for other in self._places) >= self._max_clients:
                raise self._full()
            welcome = self._admit(session, digest, place.pid)
        except MoetierError as error:
            self._refusals.say(pid=place.pid, cause=error.cause)
            answer(place.end, {"error": error_json(error)})
            return False
        except OSError as error:  # no descriptor to be had: the others are served all the same
            self._refusals.say(pid=place.pid, cause=error.strerror)
            full = UnavailableError(
                f"The daemon can't pass its arena on: {error.strerror}.", "Raise its limit of open files (ulimit -n)."
            )
            answer(place.end, {"error": error_json(full)})
            return False
        place.session, place.maps = session, digest is not None
        try:
            reply = {
                "session": session,
                "model": welcome.model,
                "slots": dict(welcome.slots),
                "pid": os.getpid(),
                "version": self._version,
            }
            return answer(place.end, reply, welcome.descriptor)
        finally:
            if welcome.descriptor is not None:
                os.close(welcome.descriptor)

    def _end(self, place: _Place) -> None:
        self._places.discard(place)
        self._selector.unregister(place.end)
        place.end.close()
        if place.session:
            self._leave(place.session)

    def _full(self) -> UnavailableError:
        return UnavailableError(
            f"The daemon has {self._max_clients} client{'s' * (self._max_clients != 1)}, as many as it takes.",
            "Start it with more --max-clients.",
        )
