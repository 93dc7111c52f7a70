"""The client's end of a daemon's side socket: its credential, and the descriptor of an arena. No gRPC."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moetier.tiers.errors import NobodyError, ProtocolError, UnavailableError
from moetier.tiers.locks import Home

from .address import SIDE_SOCKET, check_folder
from .side_packets import PATIENCE, PROTOCOL, check_peer, error_from, parse, receive

_POLL = 0.01  # seconds


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
        try:
            end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # closed on exec, as all of Python's
        except OSError as error:
            raise UnavailableError(
                f"This process can't connect to the daemon in {folder}: {error.strerror}.",
                "Raise its limit of open files (ulimit -n), or free what is short.",
            ) from None
        _open_here.add(end)  # another thread may fork while this one waits
        descriptors: list[int] = []
        try:
            end.settimeout(patience)
            try:
                _connect(end, folder / SIDE_SOCKET, patience)
                check_peer(end, f"the daemon in {folder}")
                with contextlib.suppress(BrokenPipeError):  # refused already: the answer says why
                    end.send(json.dumps({"protocol": PROTOCOL, "digest": digest}).encode())
                packet, descriptors = receive(end)
            except TimeoutError:
                raise UnavailableError(
                    f"The daemon in {folder} does not answer.", "See whether it is stopped; or start it again."
                ) from None
            except OSError as error:
                raise _nobody(folder, error.strerror or "") from None
            if not packet:
                raise _nobody(folder, "it ended")
            reply = parse(packet, f"the daemon in {folder}")
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


_open_here: weakref.WeakSet[SideConnection | socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A child must not keep its parent's place alive, nor one that its parent just asks for."""
    for opened in list(_open_here):
        opened.close()


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


def _nobody(folder: Path, why: str = "") -> NobodyError:
    return NobodyError(
        f"No daemon runs in {folder}" + (f" ({why})." if why else "."),
        "Start one: moetier daemon DIR; or name another (moetier ps lists them).",
    )
