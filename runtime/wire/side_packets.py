"""What is said on the side socket of a daemon: packets, descriptors that come along, and who is at the other end.

A client sends one packet, ``{"protocol": 1, "digest": ...}``, and gets one, with the arena's read-only descriptor as
SCM_RIGHTS where it named a store by its digest. The connection then stays open, silent, for as long as the client
lives: the kernel ends it together with the process, and with it go the client's leases and its credential.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from array import array
from collections.abc import Mapping
from typing import Any

from moetier.tiers import errors
from moetier.tiers.errors import MoetierError, ProtocolError, RefusedError, UnavailableError

PROTOCOL = 1
PATIENCE = 5.0  # seconds that either end waits for the other's one packet
_PACKET = 65_536  # bytes at most


def receive(end: socket.socket) -> tuple[bytes, list[int]]:
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


def parse(packet: bytes, whose: str) -> dict[str, Any]:
    try:
        value = json.loads(packet)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ProtocolError(
            f"What {whose} said on the side socket is not what this version speaks.", "Use moetier in one version."
        )
    return value


def answer(end: socket.socket, reply: Mapping[str, Any], descriptor: int | None = None) -> bool:
    """Whether it could be said; the peer may be gone."""
    try:
        socket.send_fds(end, [json.dumps(reply).encode()], [] if descriptor is None else [descriptor])
    except OSError:
        return False
    return True


def check_peer(end: socket.socket, who: str) -> int:
    """The process at the other end. Raises RefusedError when it is another user's."""
    pid, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    if uid != os.getuid():
        raise RefusedError(f"User {uid} runs {who}, and user {os.getuid()} this process.", "Use a daemon of your own.")
    return int(pid)


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
