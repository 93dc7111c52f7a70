"""HTTP server of a daemon's metrics, in Prometheus's own form, and of its health."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app
from prometheus_client.registry import CollectorRegistry

from moetier.tiers.errors import ConfigError

CONNECTIONS = 64  # at once: each has a thread and a descriptor


class MetricsServer:
    """Answers until it is closed. ``address`` is HOST:PORT."""

    def __init__(self, address: str, registry: CollectorRegistry, is_serving: Callable[[], bool]) -> None:
        """``/healthz`` is 200 while ``is_serving`` says so, else 503; every other path has the metrics. Raises
        ConfigError where it can't listen there."""
        host, _, port = address.rpartition(":")
        try:
            family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, place)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"Metrics can't be served on {address}: {getattr(error, 'strerror', None) or error}.",
                "See who listens there, or name another: --metrics HOST:PORT.",
            ) from None
        metrics: Any = make_wsgi_app(registry)

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ["PATH_INFO"] != "/healthz":
                return metrics(environ, start_response)  # type: ignore[no-any-return]
            status, text = ("200 OK", b"SERVING\n") if is_serving() else ("503 Service Unavailable", b"NOT_SERVING\n")
            start_response(status, [("Content-Type", "text/plain"), ("Cache-Control", "no-store")])
            return [text]

        self._server.set_app(answer)
        self._thread = threading.Thread(target=self._server.serve_forever, name="moetier-metrics", daemon=True)
        self._thread.start()
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection; beyond CONNECTIONS the oldest makes room for a new one."""

    daemon_threads = True
    request_queue_size = 128  # in place of 5: beyond that a connection is made a second late

    def __init__(self, family: int, place: Any) -> None:
        self.address_family = family
        self._open: dict[socket.socket, None] = {}  # in the order of their coming
        self._state = threading.Lock()  # guards it
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        super(WSGIServer, self).server_bind()  # without HTTPServer's look at the name service
        name, self.server_port, *_ = self.server_address
        self.server_name = str(name)
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._state:
            if len(self._open) >= CONNECTIONS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and closes it
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._state:
            self._open.pop(request, None)
            super().shutdown_request(request)


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds to wait for a request, or for its answer to be taken: each connection has a thread

    def handle(self) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape every few seconds says nothing new."""
