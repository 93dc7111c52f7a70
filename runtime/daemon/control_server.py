"""The daemon's end of its control socket, which gives clients a session id and the descriptor of an arena.

The session id is the client's credential for gRPC calls. This module does not use gRPC.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moetier.runtime.wire.address import CONTROL_SOCKET
from moetier.runtime.wire.control import PACKET_SECONDS, PROTOCOL, answer, check_peer, error_json, parse
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import SAME_VERSION, ExhaustedError, MoetierError, ProtocolError, UnavailableError
from moetier.tiers.threads import start_thread

from .log import RateLimitedLog

_MAX_GREETING = 4_096  # largest packet of a client, in bytes
_BACKLOG = 64
_OTHERS = 16  # connections besides those of a store's clients: for a session id only, or without a packet yet
_PAUSE = 0.2  # seconds without accepting after the process has run out of descriptors
_LINE_SECONDS = 60.0  # least time between two lines of the log that say so

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Welcome:
    """Answer to a client that is registered. ``descriptor`` refers to the arena; the server closes it after sending."""

    model: str
    slots: Mapping[str, int]  # number of slots for each record layout, by its zarr array
    descriptor: int | None = None


class ControlServer(Closeable):
    """Server of the control socket in a daemon's folder, with a thread for each connection.

    ``register(session, digest, pid)`` returns the answer to a client. If it raises a MoetierError, that is sent to the
    client instead. ``register`` raises OSError if the process has no descriptor left. ``unregister(session)`` is called
    when a client's connection has ended.
    """

    def __init__(
        self,
        folder: Path,
        *,
        register: Callable[[str, str | None, int], Welcome],
        unregister: Callable[[str], None],
        max_clients: int,
        version: str,
    ) -> None:
        """Listen on the control socket, and replace a stale one. Raises OSError if the socket can't be created."""
        self._register = register
        self._unregister = unregister
        self._max_clients = max_clients
        self._version = version
        self._refusals = RateLimitedLog(_log, "client-refused")
        self._pauses = RateLimitedLog(_log, "control-socket-paused", pause=_LINE_SECONDS)
        self._closed = threading.Event()
        self._state = threading.Lock()  # guards: ``_connections``
        self._connections: dict[socket.socket, bool] = {}  # True: counts as a client of a store
        self._threads = weakref.WeakSet[threading.Thread]()  # threads of the connections
        path = folder / CONTROL_SOCKET
        with contextlib.ExitStack() as undo:
            self._listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
            undo.callback(path.unlink, missing_ok=True)
            path.chmod(0o600)
            self._listener.listen(_BACKLOG)
            self._thread = start_thread("moetier-control", self._accept)
            self._release = undo.pop_all().close

    def close(self) -> None:
        """End every connection and remove the socket. Idempotent."""
        if not self._closed.is_set():
            self._closed.set()
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
            self._thread.join()
            with self._state:
                connections = list(self._connections)
            for end in connections:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # wakes its thread
            for thread in list(self._threads):
                thread.join()
            self._release()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                end, _ = self._listener.accept()
            except OSError as error:
                if not self._closed.is_set():  # out of descriptors: the connection waits in the kernel's queue
                    self._pauses.log(cause=error.strerror)
                    self._closed.wait(_PAUSE)
                continue
            pid: int | str = "?"
            try:
                pid = check_peer(end, "the client")
                with self._state:
                    if len(self._connections) >= self._max_clients + _OTHERS:
                        raise self._full()
                    self._connections[end] = False
                self._threads.add(start_thread("moetier-greeter", self._serve, end, pid))
            except ExhaustedError as error:  # there is no thread for it: the client tries again, or another daemon
                self._refuse(end, pid, UnavailableError(error.cause, error.fix))
            except MoetierError as error:
                self._refuse(end, pid, error)

    def _serve(self, end: socket.socket, pid: int) -> None:
        """Answer a client's packet, and wait for the end of its connection. Any further packet ends it too."""
        leaving = contextlib.ExitStack()
        try:
            end.settimeout(PACKET_SECONDS)
            # without room for descriptors, so that the kernel drops any that are sent
            packet, _, flags, _ = end.recvmsg(_MAX_GREETING)
            if packet:
                self._greet(end, pid, leaving, b"" if flags & socket.MSG_TRUNC else packet)
                end.settimeout(None)
                end.recv(1)
        except MoetierError as error:
            self._refuse(end, pid, error)
        except OSError:  # the client was silent for too long, or is gone
            pass
        finally:
            self._remove(end)
            end.close()
            leaving.close()

    def _greet(self, end: socket.socket, pid: int, leaving: contextlib.ExitStack, packet: bytes) -> None:
        """Answer a client's first packet. ``leaving`` will end its session. Raises the MoetierError to send instead."""
        session = secrets.token_hex(16)
        greeting = parse(packet, "the client")
        digest = greeting.get("digest")
        if greeting.get("protocol") != PROTOCOL or not (digest is None or isinstance(digest, str)):
            raise ProtocolError(
                f"This daemon ({self._version}) speaks protocol {PROTOCOL} on its control socket; the client does not.",
                SAME_VERSION,
            )
        if digest is not None:
            with self._state:
                if sum(self._connections.values()) >= self._max_clients:
                    raise self._full()
                self._connections[end] = True
        try:
            welcome = self._register(session, digest, pid)
        except OSError as error:  # out of descriptors: other clients are still served
            raise UnavailableError(
                f"The daemon can't pass on its arena's descriptor: {error.strerror}.",
                "Raise the daemon's limit of open files (ulimit -n).",
            ) from None
        try:
            leaving.callback(self._unregister, session)
            reply = {
                "session": session,
                "model": welcome.model,
                "slots": dict(welcome.slots),
                "pid": os.getpid(),
                "version": self._version,
            }
            if not answer(end, reply, welcome.descriptor):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)  # makes room for another client at once
        finally:
            if welcome.descriptor is not None:
                os.close(welcome.descriptor)

    def _refuse(self, end: socket.socket, pid: int | str, error: MoetierError) -> None:
        self._remove(end)  # removed before the answer, after which the client may connect again
        self._refusals.log(pid=pid, cause=error.cause)
        # if the socket were closed with an unread packet, the peer would get an error instead of the answer
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RD)
            while end.recv(_MAX_GREETING):
                pass
        answer(end, {"error": error_json(error)})
        end.close()

    def _remove(self, end: socket.socket) -> None:
        with self._state:
            self._connections.pop(end, None)

    def _full(self) -> UnavailableError:
        return UnavailableError(
            f"The daemon has {self._max_clients} client{'s' * (self._max_clients != 1)}, the most that it accepts.",
            "Restart it with a higher --max-clients.",
        )
