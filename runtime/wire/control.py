"""Control socket of a daemon: the client's connection, and the packets that both ends exchange. gRPC is not used.

A client sends one packet, ``{"protocol": 1, "digest": ...}``, and gets one packet back. The answer contains a session
id, which is the client's credential for gRPC calls. If the client named a store by its digest, a read-only descriptor
of that store's arena comes with the answer (SCM_RIGHTS). The connection then stays open and silent. The kernel closes
it when the client's process ends. Then the daemon releases the client's leases and rejects its session id.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import time
import weakref
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetier.tiers import errors
from moetier.tiers.closeable import Closeable
from moetier.tiers.errors import (
    SAME_VERSION,
    MoetierError,
    NoDaemonError,
    ProtocolError,
    RefusedError,
    UnavailableError,
)

from .address import CONTROL_SOCKET, check_folder

PROTOCOL = 1
PACKET_SECONDS = 5.0  # seconds that each end waits for the other end's packet
_MAX_PACKET = 65_536  # bytes
_POLL = 0.01  # seconds between attempts to connect while the kernel's queue is full


class ControlConnection(Closeable):
    """A client's connection to the control socket of a daemon, open until ``close`` or the end of the process.

    A forked child closes its copy of the connection at once.
    """

    @classmethod
    def open(cls, folder: Path, digest: str | None, *, timeout: float = PACKET_SECONDS) -> ControlConnection:
        """Connect to the daemon in ``folder``.

        With the ``digest`` of a store, the daemon also passes the descriptor of that store's arena. With None it gives
        only a session id, which is the credential for its gRPC calls.

        Raises:
            NoDaemonError: no daemon runs in ``folder``.
            UnavailableError: the daemon does not answer within ``timeout`` seconds, or accepts no more clients.
            RefusedError: another user runs the daemon, or could enter or replace its folder.
            UnknownModelError: the daemon does not serve the store.
            ProtocolError: the daemon's answer is malformed.
        """
        try:
            check_folder(folder)
        except FileNotFoundError:
            raise _no_daemon(folder) from None
        try:
            end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # Python sets close-on-exec
        except OSError as error:
            raise UnavailableError(
                f"This process can't connect to the daemon in {folder}: {error.strerror}.",
                "Raise the limit of open files (ulimit -n), or free memory.",
            ) from None
        _opened_here.add(end)  # before it is connected, as another thread may fork while this one waits
        descriptors: list[int] = []
        try:
            end.settimeout(timeout)
            try:
                _connect(end, folder / CONTROL_SOCKET, timeout)
                check_peer(end, f"the daemon in {folder}")
                with contextlib.suppress(BrokenPipeError):  # the daemon has refused already, and its answer says why
                    end.send(json.dumps({"protocol": PROTOCOL, "digest": digest}).encode())
                packet, descriptors = _receive(end)
            except TimeoutError:
                raise UnavailableError(
                    f"The daemon in {folder} does not answer.", "Check whether it is stopped, or restart it."
                ) from None
            except OSError as error:
                raise _no_daemon(folder, error.strerror or "") from None
            if not packet:
                raise _no_daemon(folder, "it ended")
            reply = parse(packet, f"the daemon in {folder}")
            if "error" in reply:
                raise error_from(reply["error"])
            if len(descriptors) != (digest is not None):
                raise ProtocolError(f"The daemon in {folder} did not pass its shared memory.", SAME_VERSION)
            return cls(end, reply, descriptors[0] if descriptors else None)
        except BaseException:
            end.close()
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def __init__(self, end: socket.socket, reply: Mapping[str, Any], descriptor: int | None) -> None:
        try:
            self.session_id = str(reply["session"])
            self.slots = {str(array): int(count) for array, count in reply["slots"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(
                f"The daemon's answer on the control socket is malformed ({type(error).__name__}: {error}).",
                SAME_VERSION,
            ) from None
        self.descriptor = descriptor  # descriptor of the arena, read-only; closed together with the connection
        self._end = end
        _opened_here.add(self)

    def is_alive(self) -> bool:
        """Return whether the daemon still has its end of the connection open. False after ``close``."""
        if self._end.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._end, select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    def close(self) -> None:
        """Close the connection. The daemon then releases the client's leases and rejects its session id. Idempotent."""
        descriptor, self.descriptor = self.descriptor, None
        if descriptor is not None:
            os.close(descriptor)
        self._end.close()
        _opened_here.discard(self)


_opened_here: weakref.WeakSet[ControlConnection | socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """Close connections that a forked child has inherited, because they would keep its parent's connections alive."""
    for opened in list(_opened_here):
        opened.close()


os.register_at_fork(after_in_child=_close_in_child)


def _connect(end: socket.socket, path: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            end.connect(str(path))
            return
        except BlockingIOError:  # the kernel's queue of connections is full
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(_POLL)


def _no_daemon(folder: Path, why: str = "") -> NoDaemonError:
    return NoDaemonError(
        f"No daemon runs in {folder}" + (f" ({why})." if why else "."),
        "Start one: moetier daemon DIR; or name another by its folder, not its model: moetier ps lists them.",
    )


def _receive(end: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a packet and the descriptors that come with it, which are closed on exec.

    ``socket.recv_fds`` is not used, because in Python 3.11 it ignores its flags.
    """
    arguments = (_MAX_PACKET, socket.CMSG_LEN(array("i", [0]).itemsize), socket.MSG_CMSG_CLOEXEC)
    try:
        packet, ancillary, flags, _ = end.recvmsg(*arguments)
    except ConnectionResetError:  # the daemon refused before it read the packet; its answer is still there
        packet, ancillary, flags, _ = end.recvmsg(*arguments)
    descriptors = array("i")
    for level, message_type, data in ancillary:
        if (level, message_type) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if flags & socket.MSG_CTRUNC and not descriptors:
        raise UnavailableError(
            "This process can't open the daemon's arena, because it has too many open files.",
            "Raise the limit of open files (ulimit -n).",
        )
    return packet, list(descriptors)


def parse(packet: bytes, sender: str) -> dict[str, Any]:
    """Return the JSON object in ``packet``. Raises ProtocolError, which names the ``sender``, if there is none."""
    try:
        value = json.loads(packet)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ProtocolError(f"The packet that {sender} sent on the control socket is not a JSON object.", SAME_VERSION)
    return value


def answer(end: socket.socket, reply: Mapping[str, Any], descriptor: int | None = None) -> bool:
    """Send ``reply`` as a packet, with ``descriptor`` if it is not None. Return False if the peer is gone."""
    try:
        socket.send_fds(end, [json.dumps(reply).encode()], [] if descriptor is None else [descriptor])
    except OSError:
        return False
    return True


def check_peer(end: socket.socket, peer: str) -> int:
    """Return the id of the process at the other end of a Unix socket. Raises RefusedError if another user runs it."""
    pid, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid != os.getuid():
        raise RefusedError(
            f"User {uid} runs {peer}, but user {os.getuid()} runs this process.", "Use a daemon of your own."
        )
    return int(pid)


def error_json(error: MoetierError) -> dict[str, str]:
    """Return a JSON object that describes an error. ``error_from`` turns it back into the error."""
    return {"kind": type(error).__name__, "cause": error.cause, "fix": error.fix}


def error_from(value: object, otherwise: type[MoetierError] = errors.DaemonError) -> MoetierError:
    """Return the error of ``value``, a JSON object from ``error_json``.

    ``value`` comes from another process and may be any JSON value. ``otherwise`` is the class of the returned error if
    this version has no error class with the name in ``value``.
    """
    if not isinstance(value, dict):
        return ProtocolError("The daemon sent an error that can't be read.", SAME_VERSION)
    name, cause, fix = (" ".join(str(value.get(field, "")).split()) for field in ("kind", "cause", "fix"))
    named = getattr(errors, name, None)
    error_class = named if isinstance(named, type) and issubclass(named, MoetierError) else otherwise
    return error_class(cause or "The daemon gave no cause.", fix or "See the daemon's log.")
