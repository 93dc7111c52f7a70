"""Where a server listens, and until when."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from moetier.tiers.errors import ConfigError

GRACE = 5  # seconds for clients to take what is still sent to them


def bind(host: str, port: int) -> socket.socket:
    """A socket that has its address, and does not listen yet: nobody waits for a model that is being loaded. Raises
    ConfigError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{host} port {port} can't be listened on: {said}.", "Give another --host or --port."
        ) from None
    return bound


def is_loopback(bound: socket.socket) -> bool:
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Calls ``ready`` when it listens, and ``ending`` when a signal tells it to end: then it waits for the last answers
    to be sent, for GRACE seconds."""

    def __init__(self, app: Any, *, ready: Callable[[], None], ending: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                lifespan="on",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._ready = ready
        self._ending = ending

    def serve_until_told(self, bound: socket.socket) -> None:
        """Until SIGTERM or SIGINT; a second SIGINT does not wait."""
        with contextlib.ExitStack() as former:
            for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when it has ended: it has, then
                former.callback(signal.signal, number, signal.signal(number, self.handle_exit))
            self.run([bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._ending()
        await super().shutdown(sockets)
