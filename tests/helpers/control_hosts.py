"""A control server that registers each client."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from readers import PATIENCE

from moetier.runtime.daemon.control_server import ControlServer, Welcome
from moetier.runtime.wire.address import CONTROL_SOCKET
from moetier.tiers.errors import UnknownModelError

DIGEST = "a" * 64
ARENA = Path(__file__)  # in place of an arena


def private(folder: Path) -> Path:
    """Make a folder that only its owner may enter, as a control server asks for."""
    folder.mkdir(mode=0o700)
    return folder


@contextmanager
def hosting(folder: Path) -> Iterator[Host]:
    """Yield a host, whose socket is gone afterwards."""
    host = Host(folder)
    yield host
    host.server.close()
    assert not (folder / CONTROL_SOCKET).exists()


class Host:
    """Admits each client, and gives it ARENA."""

    def __init__(self, folder: Path, **options: object) -> None:
        self.folder = folder
        self.registered: list[tuple[str, str | None, int]] = []
        self.left: list[str] = []
        self.server = ControlServer(
            folder, register=self.register, unregister=self.left.append, version="1.2", **{"max_clients": 4, **options}
        )

    def register(self, session: str, digest: str | None, pid: int) -> Welcome:
        if digest == "0" * 64:
            raise UnknownModelError("Not that.", "Another.")
        self.registered.append((session, digest, pid))
        if digest is None:
            return Welcome("", {})
        return Welcome("acme", {"records": 3}, os.open(ARENA, os.O_RDONLY | os.O_CLOEXEC))

    def raw(self) -> socket.socket:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.connect(str(self.folder / CONTROL_SOCKET))  # waits where many wait
        end.settimeout(PATIENCE)
        return end
