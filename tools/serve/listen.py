"""HTTP server: the socket that it listens on, limits on its connections, and its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from moetier.tiers.errors import ConfigError

from .protocols.refusal import HEADER_BYTES, Refusal, headers_too_long

GRACE = 5  # seconds in which clients can receive their last answers when the server shuts down
HEADER_SECONDS = 20.0  # longest wait for all headers of a request, from the connection or the previous answer on
LINGER_SECONDS = 2.0  # longest time in which a client that was refused may go on to send
ANSWER_SECONDS = 60.0  # longest time in which a client may read nothing of its answer
BACKLOG = 128  # maximum number of connections that wait in the kernel until the server accepts them
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to ``host`` and ``port``, but does not listen yet.

    So no client can connect while the model loads. Raises ConfigError if the address can't be used.
    """
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
            f"The server can't listen on {host} port {port}: {said}.", "Give another --host or --port."
        ) from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Return whether a socket's address is reachable from this machine only."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


def is_wildcard(bound: socket.socket) -> bool:
    """Return whether a socket is bound to all addresses of this machine."""
    return ipaddress.ip_address(bound.getsockname()[0].partition("%")[0]).is_unspecified


def url_of(bound: socket.socket, name: str | None = None) -> str:
    """Return the URL of a bound socket on this machine, or with another ``name`` of its host."""
    host, port = bound.getsockname()[:2]
    if is_wildcard(bound):
        host = "::1" if ":" in host else "127.0.0.1"
    host = name or host
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class LingeringTransport:
    """Transport that closes its connection in two steps if ``is_unread`` says that the client may still be sending.

    The first step sends the answer and closes our side of the connection. The second step follows when the client
    closes its side, or after LINGER_SECONDS. If the connection were closed with data unread, the kernel would reset it,
    and the client could lose the answer.
    """

    def __init__(self, transport: asyncio.Transport, is_unread: Callable[[], bool]) -> None:
        self._transport = transport
        self._is_unread = is_unread
        self._lingers = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether the connection is closed or being closed."""
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        """Close the connection."""
        if self.is_closing():
            return
        if not self._is_unread():
            self._transport.close()
            return
        self._lingers = True
        asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.close)
        try:
            self._transport.write_eof()
            self._transport.resume_reading()
        except OSError:  # the client has reset the connection
            self._transport.abort()


class BoundedProtocol(H11Protocol):
    """HTTP connection with limits that no ASGI application can set: on idle connections and on clients that don't read.

    A connection is idle until all headers of a request have arrived, and again after the request was answered. It is
    closed once it has been idle for ``header_seconds``. If there are already ``most_connections``, a new connection
    replaces the one that has been idle longest; if none is idle, the new connection is refused. A connection is aborted
    if its client reads nothing of a response for ``answer_seconds``.
    """

    most_connections: int
    header_seconds = HEADER_SECONDS
    answer_seconds = ANSWER_SECONDS
    idle: asyncio.TimerHandle | None = None  # timer that runs while the connection is idle
    _untaken: asyncio.TimerHandle | None = None  # timer that runs while the write buffer is full

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the idle timer. If there are too many connections, first abort the one that has been idle longest.

        If no connection is idle, refuse this one.
        """
        super().connection_made(LingeringTransport(transport, self._is_unread))  # type: ignore[arg-type]
        if len(self.connections) > self.most_connections:
            others = (each for each in self.connections if isinstance(each, BoundedProtocol))
            idle = {each.idle.when(): each for each in others if each.idle is not None}
            if idle:
                idle[min(idle)].drop()
            else:
                transport.write(TOO_MANY)
                transport.close()
                return
        self._rest()

    def data_received(self, data: bytes) -> None:
        """Handle data from the client, and stop the idle timer once all headers of a request have arrived.

        Data that comes after a refusal is ignored.
        """
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._work()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not HTTP, or whose headers are too long, and close the connection."""
        is_under_way = self.cycle is not None and not self.cycle.response_complete
        is_long = not is_under_way and len(self.conn.trailing_data[0]) > HEADER_BYTES
        refusal = headers_too_long() if is_long else Refusal(400, msg, headers={"Connection": "close"})
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = refusal.response()
            head = h11.Response(status_code=response.status_code, headers=response.raw_headers)
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if is_under_way:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def on_response_complete(self) -> None:
        """Start the idle timer again, unless the next request has already arrived."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._rest()

    def pause_writing(self) -> None:
        """Start the timer that aborts the connection if the client reads nothing more of its answer."""
        super().pause_writing()
        self._untaken = self.loop.call_later(self.answer_seconds, self.drop)

    def resume_writing(self) -> None:
        """Stop the timer that ``pause_writing`` started, because the client reads again."""
        if self._untaken is not None:
            self._untaken.cancel()
            self._untaken = None
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel both timers."""
        self._work()
        if self._untaken is not None:
            self._untaken.cancel()
        super().connection_lost(exc)

    def drop(self) -> None:
        """Close the connection at once, and stop counting it."""
        self._work()
        self.connections.discard(self)
        self.transport.abort()

    def _is_unread(self) -> bool:
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _rest(self) -> None:
        self._work()
        self.idle = self.loop.call_later(self.header_seconds, self.transport.close)

    def _work(self) -> None:
        if self.idle is not None:
            self.idle.cancel()
            self.idle = None


class Server(uvicorn.Server):
    """HTTP server with at most ``connections`` connections at a time.

    It calls ``ready`` when it listens, and ``ending`` when a signal shuts it down. Afterwards it sends the last
    answers, for at most GRACE seconds.
    """

    def __init__(
        self,
        app: Any,
        *,
        connections: int,
        ready: Callable[[], None],
        ending: Callable[[], None],
        **seconds: float,
    ) -> None:
        """Serve ``app``. ``seconds`` replaces ``header_seconds`` and ``answer_seconds`` of BoundedProtocol."""
        protocol = type("Protocol", (BoundedProtocol,), {"most_connections": connections, **seconds})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                loop="asyncio",  # the same loop whether uvloop is installed or not
                backlog=BACKLOG,
                log_config=None,
                h11_max_incomplete_event_size=HEADER_BYTES,
                lifespan="off",  # the application needs none, and uvicorn prints a traceback if a signal cuts it off
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=GRACE,
            )
        )
        self._ready = ready
        self._ending = ending

    def serve_until_told(self, bound: socket.socket) -> None:
        """Serve until SIGTERM or SIGINT. A second SIGINT ends the server without waiting for answers."""
        with contextlib.ExitStack() as former:
            # uvicorn finally restores the handlers that it found and raises the signal again: with the default
            # handlers that would end the process
            for number in (signal.SIGTERM, signal.SIGINT):
                former.callback(signal.signal, number, signal.signal(number, self.handle_exit))
            self.run([bound])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then call ``ready``."""
        try:
            await super().startup(sockets)
        except OSError as error:  # another server was bound to the address, too, and has begun to listen
            address = "".join(map(url_of, sockets or ()))
            raise ConfigError(
                f"The server can't listen on {address}: {error.strerror}.", "Give another --host or --port."
            ) from None
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call ``ending``, then shut down within GRACE seconds."""
        self._ending()
        await super().shutdown(sockets)
