"""HTTP server of a daemon's metrics, by Prometheus's own library, and of its health."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import start_http_server
from prometheus_client.registry import CollectorRegistry

from moetier.tiers.errors import ConfigError


class MetricsServer:
    """Answers until it is closed. ``address`` is HOST:PORT."""

    def __init__(self, address: str, registry: CollectorRegistry, is_serving: Callable[[], bool]) -> None:
        """``/healthz`` is 200 while ``is_serving`` says so, else 503; every other path has the metrics. Raises
        ConfigError where it can't listen there."""
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"Metrics can't be served on {address}: {getattr(error, 'strerror', None) or error}.",
                "See who listens there, or name another: --metrics HOST:PORT.",
            ) from None
        metrics: Any = self._server.get_app()

        def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            if environ["PATH_INFO"] != "/healthz":
                return metrics(environ, start_response)  # type: ignore[no-any-return]
            status, text = ("200 OK", b"SERVING\n") if is_serving() else ("503 Service Unavailable", b"NOT_SERVING\n")
            start_response(status, [("Content-Type", "text/plain"), ("Cache-Control", "no-store")])
            return [text]

        self._server.set_app(answer)
        self._server.RequestHandlerClass = _Handler
        self._server.socket.listen(128)  # in place of 5: beyond that a connection is made a second late
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds to wait for a request, or for its answer to be taken: each connection has a thread

    def handle(self) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a scrape every few seconds says nothing new."""
