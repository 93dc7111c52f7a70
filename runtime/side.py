"""The side socket of a daemon: credentials, and the descriptor of an arena. Both ends; no gRPC.

A client sends one packet, ``{"protocol": 1, "digest": ...}``, and gets one, with the arena's read-only descriptor as
SCM_RIGHTS where it named a store by its digest. The connection then stays open, silent, for as long as the client
lives: the kernel ends it together with the process, and with it go the client's leases and its credential.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import selectors
import socket
import struct
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from moetier.tiers import errors
from moetier.tiers.errors import MoetierError, NobodyError, ProtocolError, RefusedError, UnavailableError
from moetier.tiers.monitor import Home

from .address import SIDE_SOCKET, check_folder
from .logfmt import Sparing, say

PROTOCOL = 1
PATIENCE = 5.0  # seconds that either end waits for the other's one packet
_PACKET = 65_536  # bytes at most
_GREETING = 4_096  # bytes of a client's packet at most
_BACKLOG = 64
_POLL = 0.01  # seconds
_VISITORS = 16  # connections beyond the clients: those who have not said yet what they want, and those who only look
_PAUSE = 0.2  # seconds without accepting where the process can open no more descriptors

_log = logging.getLogger(__name__)


# -- the client's end -------------------------------------------------------------------------------------------------


class SideConnection:
    """A client's place at a daemon, until it is closed or the process ends. A forked child has none."""

    @classmethod
    def open(cls, folder: Path, digest: str | None, *, patience: float = PATIENCE) -> SideConnection:
        """At the daemon of a folder: with ``digest`` as a client of that store, without it for a credential alone.

        Raises NobodyError when nobody listens, UnavailableError when nobody answers, RefusedError for another user's,
        UnknownModelError for a store that it does not serve, ProtocolError.
        """
        try:
            check_folder(folder)
        except FileNotFoundError:
            raise _nobody(folder) from None
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # closed on exec, as all of Python's
        descriptors: list[int] = []
        try:
            end.settimeout(patience)
            try:
                _connect(end, folder / SIDE_SOCKET, patience)
                _check_peer(end, f"the daemon in {folder}")
                with contextlib.suppress(BrokenPipeError):  # refused already: the answer says why
                    end.send(json.dumps({"protocol": PROTOCOL, "digest": digest}).encode())
                packet, descriptors = _receive(end)
            except TimeoutError:
                raise UnavailableError(
                    f"The daemon in {folder} does not answer.", "See whether it is stopped; or start it again."
                ) from None
            except OSError as error:
                raise _nobody(folder, error.strerror or "") from None
            if not packet:
                raise _nobody(folder, "it ended")
            reply = _parse(packet, f"the daemon in {folder}")
            if "error" in reply:
                raise error_from(reply["error"])
            if len(descriptors) != (digest is not None):
                raise ProtocolError(f"The daemon in {folder} passed no arena.", "Use a daemon of this version.")
            return cls(end, reply, descriptors[0] if descriptors else None)
        except BaseException:
            end.close()
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def __init__(self, end: socket.socket, reply: Mapping[str, Any], descriptor: int | None) -> None:
        try:
            self.session_id = str(reply["session"])
            self.model = str(reply["model"])
            self.slots = {str(array): int(count) for array, count in reply["slots"].items()}
            self.pid = int(reply["pid"])
            self.version = str(reply["version"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(
                f"The daemon's greeting is malformed ({type(error).__name__}: {error}).", "Use one of this version."
            ) from None
        self.descriptor = descriptor  # of the arena, read-only; closed together with the connection
        self._end = end
        self._home = Home()
        _open_here.add(self)

    def fileno(self) -> int:
        """Becomes readable when the daemon is gone: it says no more on this socket."""
        self._home.check()
        return self._end.fileno()

    def is_alive(self) -> bool:
        """Whether the daemon still holds the other end. Raises ClosedError in a forked child."""
        self._home.check()
        if self._end.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._end, select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    def close(self) -> None:
        """Gives up all leases and the credential. Idempotent."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        self._end.close()
        _open_here.discard(self)

    def __enter__(self) -> SideConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_open_here: weakref.WeakSet[SideConnection] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child must not keep its parent's place alive."""
    for connection in list(_open_here):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)


def _connect(end: socket.socket, path: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            end.connect(str(path))
            return
        except BlockingIOError:  # more wait to be accepted than the kernel queues
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(_POLL)


def _receive(end: socket.socket) -> tuple[bytes, list[int]]:
    """A packet and its descriptors, closed on exec. (``socket.recv_fds`` of Python 3.11 ignores its flags.)"""
    arguments = (_PACKET, socket.CMSG_LEN(array("i", [0]).itemsize), socket.MSG_CMSG_CLOEXEC)
    try:
        packet, ancillary, flags, _ = end.recvmsg(*arguments)
    except ConnectionResetError:  # refused before the greeting was read; the answer is still there
        packet, ancillary, flags, _ = end.recvmsg(*arguments)
    descriptors = array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if flags & socket.MSG_CTRUNC and not descriptors:
        raise UnavailableError(
            "This process can open no more files: it can't get the daemon's arena.", "Raise its limit (ulimit -n)."
        )
    return packet, list(descriptors)


def _nobody(folder: Path, why: str = "") -> NobodyError:
    return NobodyError(
        f"No daemon runs in {folder}" + (f" ({why})." if why else "."),
        "Start one: moetier daemon DIR; or name another (moetier ps lists them).",
    )


# -- the daemon's end -------------------------------------------------------------------------------------------------


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


class SideServer:
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
        self._path = folder / SIDE_SOCKET
        self._places: set[_Place] = set()
        self._refusals = Sparing(_log, "client-refused")
        self._paused_until = 0.0
        self._open = True
        self._selector = selectors.DefaultSelector()
        self._wake, self._bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
            self._listener.bind(str(self._path))
            self._path.chmod(0o600)
            self._listener.listen(_BACKLOG)
        except BaseException:
            self._release()
            raise
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="moetier-side", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends every connection; nobody is admitted any more, and the socket is gone. Idempotent."""
        if self._open:
            self._open = False
            os.write(self._bell, b"x")
            self._thread.join()
            self._release()

    def _release(self) -> None:
        self._selector.close()
        self._listener.close()
        os.close(self._wake)
        os.close(self._bell)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

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
            pid = _check_peer(end, "the client")
            if len(self._places) >= self._max_clients + _VISITORS:
                raise self._full()
        except MoetierError as error:
            self._refusals.say(pid=pid, cause=error.cause)
            # a greeting that is closed upon unread would be the peer's error, in place of the answer
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)
                while end.recv(_GREETING):
                    pass
            _answer(end, {"error": error_json(error)})
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
            greeting = _parse(b"" if cut else packet, "the client")
            digest = greeting.get("digest")
            if greeting.get("protocol") != PROTOCOL or not (digest is None or isinstance(digest, str)):
                raise ProtocolError(
                    f"This daemon ({self._version}) speaks protocol {PROTOCOL} on its side socket, and the client not.",
                    "Use moetier in one version.",
                )
            if digest is not None and sum(other.maps for other in self._places) >= self._max_clients:
                raise self._full()
            welcome = self._admit(session, digest, place.pid)
        except MoetierError as error:
            self._refusals.say(pid=place.pid, cause=error.cause)
            _answer(place.end, {"error": error_json(error)})
            return False
        except OSError as error:  # no descriptor to be had: the others are served all the same
            self._refusals.say(pid=place.pid, cause=error.strerror)
            full = UnavailableError(
                f"The daemon can't pass its arena on: {error.strerror}.", "Raise its limit of open files (ulimit -n)."
            )
            _answer(place.end, {"error": error_json(full)})
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
            return _answer(place.end, reply, welcome.descriptor)
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


# -- both -------------------------------------------------------------------------------------------------------------


def error_json(error: MoetierError) -> dict[str, str]:
    return {"kind": type(error).__name__, "cause": error.cause, "fix": error.fix}


def error_from(value: object, otherwise: type[MoetierError] = errors.DaemonError) -> MoetierError:
    """The error that ``error_json`` described: of the same class, or ``otherwise`` where there is none of that name."""
    if not isinstance(value, dict):
        return ProtocolError("An error came over the wire that is none.", "Use moetier in one version.")
    kind, cause, fix = (" ".join(str(value.get(name, "")).split()) for name in ("kind", "cause", "fix"))
    named = getattr(errors, kind, None)
    known = named if isinstance(named, type) and issubclass(named, MoetierError) else otherwise
    return known(cause or "The daemon gave no cause.", fix or "See the daemon's log.")


def _parse(packet: bytes, whose: str) -> dict[str, Any]:
    try:
        value = json.loads(packet)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ProtocolError(
            f"What {whose} said on the side socket is not what this version speaks.", "Use moetier in one version."
        )
    return value


def _answer(end: socket.socket, reply: Mapping[str, Any], descriptor: int | None = None) -> bool:
    """Whether it could be said; the peer may be gone."""
    try:
        socket.send_fds(end, [json.dumps(reply).encode()], [] if descriptor is None else [descriptor])
    except OSError:
        return False
    return True


def _check_peer(end: socket.socket, who: str) -> int:
    """The process at the other end. Raises RefusedError when it is another user's."""
    pid, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid != os.getuid():
        raise RefusedError(f"User {uid} runs {who}, and user {os.getuid()} this process.", "Use a daemon of your own.")
    return int(pid)
