"""gRPC servers of a daemon, on its Unix socket and on TCP, with their limits and credentials."""

from __future__ import annotations

import hmac
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import grpc
from grpc_reflection.v1alpha import reflection

from moetier.runtime.wire.channel import SERVICE, read_identity, read_pem
from moetier.tiers.errors import ConfigError

from .clients import Clients
from .fetch import CALLS
from .health import HEALTH, WATCHERS, Health
from .rpc import AuthInterceptor, RemoteService, Service, add_service

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # a second daemon on the same port is an error
    # keepalive pings both ways on idle connections
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 1 << 20),
    # calls that wait to be accepted; beyond gRPC's default of 1,000 it drops calls of any client
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 10_000),
)
# Anybody can reach a TCP port. Each connection takes memory (50 KB with TLS) and a descriptor.
_HANDSHAKE = 10_000  # milliseconds for the handshakes of TLS and HTTP/2
_CONNECTIONS = 4_096  # and at most half of the descriptors: shards and this host's clients need the rest
_CALLS = 100  # of a connection at once: a client that reads no answers could start any number
_SHORT_CALLS = 8  # threads for calls that end at once
_QUEUED = 64  # calls that wait for a thread; more are refused
_PATIENCE = 5.0  # seconds for gRPC to stop


def local_server(service: Service, health: Health, *, clients: Clients, sessions: int, models: int) -> grpc.Server:
    """Return the server of the Unix socket, where every call carries the id of an open control connection.

    Each of ``sessions`` clients has a thread for its session, whatever is fetched meanwhile.
    """
    auth = AuthInterceptor(clients.knows, exempt=HEALTH)
    return _server(service, health, auth, sessions + CALLS * models + WATCHERS + _SHORT_CALLS)


def remote_server(service: RemoteService, health: Health, *, token: str | None, models: int) -> grpc.Server:
    """Return the TCP server, where every call carries the ``token``, if there is one; health checks too."""

    def is_token(bearer: str | None) -> bool:
        return token is None or (bearer is not None and hmac.compare_digest(bearer.encode(), token.encode()))

    connections = min(_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    bounds = (
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", _CALLS),
    )
    return _server(service, health, AuthInterceptor(is_token), CALLS * models + WATCHERS + _SHORT_CALLS, bounds)


def reflect(servers: list[grpc.Server]) -> None:
    """Let clients that may call ask what the messages are (gRPC server reflection)."""
    names = (SERVICE, HEALTH, reflection.SERVICE_NAME)
    for server in servers:
        reflection.enable_server_reflection(names, server)


def _server(
    service: Service,
    health: Health,
    auth: AuthInterceptor,
    threads: int,
    bounds: tuple[tuple[str, int], ...] = (),
) -> grpc.Server:
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="moetier-grpc"),
        interceptors=[auth],
        options=(*OPTIONS, *bounds),
        maximum_concurrent_rpcs=threads + _QUEUED,
    )
    add_service(service, server)
    health.add_to(server)
    return server


def listen_unix(server: grpc.Server, path: Path) -> None:
    """Bind the Unix socket."""
    _bind(server, f"unix:{quote(str(path))}")  # a URI
    path.chmod(0o600)


def listen_tcp(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> str:
    """Bind the TCP address and return it, with the port that was chosen for 0. Raises ConfigError."""
    port = _bind(server, address, credentials)
    return f"{address.rpartition(':')[0]}:{port}"


def _bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"The daemon can't listen on {address}: it is taken, or not an address of this host.",
            "See who listens there, or name another.",
        ) from error


def server_credentials(cert: Path | None, key: Path | None, client_ca: Path | None) -> grpc.ServerCredentials | None:
    """Return the server's TLS credentials; None without TLS. Raises ConfigError for files that can't be used."""
    if cert is None or key is None:
        return None
    chain, private = read_identity(cert, key)
    ca = read_pem(client_ca, "client CA") if client_ca is not None else None
    return grpc.ssl_server_credentials([(private, chain)], ca, require_client_auth=ca is not None)


def stop(servers: Sequence[grpc.Server], grace: float = 0.0) -> None:
    """Stop the servers: no call begins, and calls under way end within ``grace`` seconds."""
    for stopped in [server.stop(grace) for server in servers]:
        stopped.wait(_PATIENCE)
