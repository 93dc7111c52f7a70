"""Protocol between a service and systemd: readiness, and descriptors that outlive the process.

Source: sd_notify(3), sd_pid_notify_with_fds(3) and sd_listen_fds(3). Without systemd every call does nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import MutableMapping, Sequence

from moetier.tiers.closeable import Closeable

_FIRST = 3  # number of the first descriptor that systemd passes


class ServiceManager(Closeable):
    """Connection to the service manager that the environment variable NOTIFY_SOCKET names.

    This variable and those of passed descriptors are removed from ``environment``, as they are not for child processes.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._socket = environment.pop("NOTIFY_SOCKET", "")
        pid, count, names = (environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
        self.passed: list[tuple[str, int]] = []  # (name, descriptor) of each passed descriptor that is open
        if pid == str(os.getpid()) and count.isdecimal():
            named = names.split(":") if names else []
            named += ["unknown"] * (int(count) - len(named))
            for descriptor, name in enumerate(named[: int(count)], start=_FIRST):
                with contextlib.suppress(OSError):
                    os.set_inheritable(descriptor, False)
                    self.passed.append((name, descriptor))

    def ready(self, status: str) -> None:
        """Report that the service is ready."""
        self._send(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """Report that the service is stopping."""
        self._send("STOPPING=1")

    def store(self, name: str, descriptor: int) -> None:
        """Let systemd keep a copy of a descriptor for the next start."""
        self._send(f"FDSTORE=1\nFDNAME={name}", [descriptor])

    def remove(self, name: str) -> None:
        """Let systemd close all descriptors that it keeps under a name."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def close(self) -> None:
        """Close the descriptors that were passed to this process. Idempotent."""
        while self.passed:
            os.close(self.passed.pop()[1])

    def _send(self, state: str, descriptors: Sequence[int] = ()) -> None:
        if not self._socket:
            return
        address = "\0" + self._socket[1:] if self._socket.startswith("@") else self._socket
        # the service works without a manager too
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.connect(address)
            socket.send_fds(end, [state.encode()], list(descriptors))
