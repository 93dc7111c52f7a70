"""A daemon's hold on its folder: one at a time, by a lock that the kernel gives up when the process dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from moetier.runtime.wire.address import CARD, CONTROL_SOCKET, SOCKET, DaemonCard
from moetier.tiers.errors import AlreadyRunningError
from moetier.tiers.store.atomic import write_all

LOCK = "lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """The folder is this process's alone, and empty. Yields whether a daemon was killed here.

    Raises AlreadyRunningError, naming the daemon that runs there.
    """
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise _already_running(folder, pid) from None
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # a daemon that ended has just removed it
    try:
        os.ftruncate(descriptor, 0)
        write_all(descriptor, f"{os.getpid()}\n".encode(), 0)
        left = [
            path for path in folder.iterdir() if path.name in (SOCKET, CONTROL_SOCKET) or path.name.startswith(CARD)
        ]
        for stale in left:
            stale.unlink()
        yield bool(left)
    finally:
        path.unlink(missing_ok=True)  # before the lock is let go of: whoever has opened it looks again
        os.close(descriptor)


def _already_running(folder: Path, pid: str) -> AlreadyRunningError:
    card = DaemonCard.read(folder)
    serves = f" and serves {', '.join(model.name for model in card.models)}" if card is not None else ""
    return AlreadyRunningError(
        f"A daemon already runs in {folder}: it is process {pid or '?'}{serves}.",
        f"Use it, end it (kill {pid or 'PID'}), or start another: --folder NAME.",
    )
