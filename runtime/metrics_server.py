"""Where Prometheus reads a daemon's metrics: an HTTP server of its own library."""

from __future__ import annotations

from prometheus_client import start_http_server
from prometheus_client.registry import CollectorRegistry

from moetier.tiers.errors import ConfigError


class MetricsServer:
    """Answers until it is closed. ``address`` is HOST:PORT."""

    def __init__(self, address: str, registry: CollectorRegistry) -> None:
        """Raises ConfigError where it can't listen there."""
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"Metrics can't be served on {address}: {getattr(error, 'strerror', None) or error}.",
                "See who listens there, or name another: --metrics HOST:PORT.",
            ) from None
        self.address = f"{host}:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
