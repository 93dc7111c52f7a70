"""gRPC servers of a daemon, on its Unix socket and on TCP: limits, TLS, the check of bearer tokens, and health."""

from __future__ import annotations

import hmac
import logging
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1.health_pb2 import DESCRIPTOR, HealthCheckResponse
from grpc_reflection.v1alpha import reflection

from moetier.runtime.wire.channel import MESSAGE_BYTES, SERVICE, read_identity, read_pem
from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import ConfigError, ExhaustedError, RefusedError

from .clients import Clients
from .leases import CALLS
from .log import RateLimitedLog
from .rpc import Service, add_service, bearer_of, peer_of

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # so that a second daemon can't listen on the same port
    # keepalive pings both ways on idle connections
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # calls that wait to be accepted; beyond this number (gRPC's default: 1,000) gRPC drops calls of any client
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 10_000),
)
HEALTH: str = DESCRIPTOR.services_by_name["Health"].full_name
WATCHERS = 8  # most health watches at once: each takes a thread of its server
# Any process can reach a TCP port. Each connection takes memory (50 KB with TLS) and a descriptor.
_HANDSHAKE = 10_000  # milliseconds for the handshakes of TLS and HTTP/2
_CONNECTIONS = 4_096  # but at most half of the descriptors, as shards and local clients need the rest
_CALLS = 100  # most calls at once on a connection: a client that reads no answers could start any number
_SHORT_CALLS = 8  # threads for calls that end at once
_QUEUED = 64  # most calls that wait for a thread; further calls are refused
_STOP_SECONDS = 5.0  # longest wait for gRPC to stop
_POLL = 0.1  # seconds between checks of the health for watches

_log = logging.getLogger(__name__)


def local_server(clients: Clients, *, sessions: int) -> grpc.Server:
    """Return the gRPC server of the Unix socket.

    Every call except a health check must carry the session id of an open control connection as its bearer token. The
    server has a thread for each of ``sessions`` possible sessions, besides the threads for fetches. So fetches can't
    keep a session waiting.
    """
    return _server(Service(clients), clients, AuthInterceptor(clients.knows, exempt=HEALTH), sessions)


def remote_server(clients: Clients, *, token: str | None) -> grpc.Server:
    """Return the gRPC server for TCP. Every call, even a health check, must carry ``token``, unless that is None."""

    def is_token(bearer: str | None) -> bool:
        return token is None or (bearer is not None and hmac.compare_digest(bearer.encode(), token.encode()))

    connections = min(_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
    bounds = (
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", _CALLS),
    )
    return _server(Service(clients, is_remote=True), clients, AuthInterceptor(is_token), 0, bounds)


def _server(
    service: Service,
    clients: Clients,
    auth: AuthInterceptor,
    sessions: int,
    bounds: tuple[tuple[str, int], ...] = (),
) -> grpc.Server:
    threads = sessions + 2 * CALLS * len(clients.models) + WATCHERS + _SHORT_CALLS
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="moetier-grpc"),
        interceptors=[auth],
        options=(*SERVER_OPTIONS, *bounds),
        maximum_concurrent_rpcs=threads + _QUEUED,
    )
    add_service(service, server)
    _add_health(server, lambda: clients.is_serving)
    return server


def reflect(server: grpc.Server) -> None:
    """Let accepted clients ask for the service's methods and messages (gRPC server reflection)."""
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)


def bind(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Listen on an address: a URI of a Unix socket, or HOST:PORT. Return the port. Raises ConfigError if that fails."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"The daemon can't listen on {address}: it is in use, or not an address of this host.",
            "Check which process listens there, or give the daemon another address with --listen.",
        ) from error


def server_credentials(cert: Path | None, key: Path | None, client_ca: Path | None) -> grpc.ServerCredentials | None:
    """Return the server's TLS credentials; None without TLS. Raises ConfigError for files that can't be used."""
    if cert is None or key is None:
        return None
    chain, private = read_identity(cert, key)
    ca = read_pem(client_ca, "client CA") if client_ca is not None else None
    return grpc.ssl_server_credentials([(private, chain)], ca, require_client_auth=ca is not None)


def stop(servers: Sequence[grpc.Server], grace: float = 0.0) -> None:
    """Stop the servers. No new call begins, and calls under way are cancelled after ``grace`` seconds."""
    for stopped in [server.stop(grace) for server in servers]:
        stopped.wait(_STOP_SECONDS)


# -- auth -------------------------------------------------------------------------------------------------------------


class AuthInterceptor(grpc.ServerInterceptor):
    """Interceptor that refuses a call without an accepted bearer token as soon as its headers have come.

    A refusal waits for no message of the call, takes no thread of the server, and does not count as a call under way.
    So clients without a token can't slow down accepted calls, however many calls they leave half-open.
    """

    def __init__(self, accepts: Callable[[str | None], bool], *, exempt: str | None = None) -> None:
        """Accept a call if ``accepts`` returns True for its bearer token, or for None if it has no token.

        Calls of the service ``exempt`` need no token.
        """
        self._accepts = accepts
        self._exempt = f"/{exempt}/"
        self._refusals = RateLimitedLog(_log, "client-refused")

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        """Return the handler of an accepted or exempt call; for any other call, a handler that refuses it."""
        bearer = bearer_of(handler_call_details.invocation_metadata)
        if self._accepts(bearer) or handler_call_details.method.startswith(self._exempt):
            return continuation(handler_call_details)
        cause = "no credential" if bearer is None else "a credential that is not known"

        def refuse(requests: object, context: grpc.ServicerContext) -> NoReturn:
            self._refusals.log(peer=peer_of(context), cause=cause)
            abort(
                context,
                RefusedError(
                    "The call has no token or session id that this daemon accepts.",
                    "Give the daemon's token (`credentials.token_file`). Over a Unix socket, first connect to the "
                    "daemon's control socket.",
                ),
            )

        # a stream, whatever the call is: gRPC waits for the message of a unary call before it runs the handler
        return grpc.stream_stream_rpc_method_handler(_run_inline(refuse))


class _InlineExecutor(ThreadPoolExecutor):
    """Executor that runs a function in the thread that submits it, and has no threads."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        # ``function`` is gRPC's own, and catches what a handler raises
        future.set_result(function(*arguments, **named))
        return future


_INLINE = _InlineExecutor()


def _run_inline(handler: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Return ``handler``, marked to be run by the thread that accepts calls. The handler must neither wait nor yield.

    Such a call needs no thread of the pool, and is over before the next call is counted.
    """
    handler.experimental_thread_pool = _INLINE  # type: ignore[attr-defined]
    return handler


# -- health -----------------------------------------------------------------------------------------------------------


def _add_health(server: grpc.Server, is_serving: Callable[[], bool]) -> None:
    """Add gRPC's standard health service. It reports on the daemon as a whole, whichever service a request names.

    It does not wait for the request, so a call of which only the headers have come takes no thread. The servicer of
    grpcio-health-checking is not used, because it can deadlock: it sends while it holds a lock, and the thread that has
    to complete the sending needs that lock when a call ends. A Watch that begins while another one ends can then stop
    the server for good.
    """
    watchers = threading.BoundedSemaphore(WATCHERS)

    def check(requests: object, context: grpc.ServicerContext) -> HealthCheckResponse:
        return HealthCheckResponse(status="SERVING" if is_serving() else "NOT_SERVING")

    def watch(requests: object, context: grpc.ServicerContext) -> Iterator[HealthCheckResponse]:
        if not watchers.acquire(blocking=False):
            abort(
                context,
                ExhaustedError(
                    f"{WATCHERS} calls of Watch are open, the most that the daemon allows.",
                    "Use Check, or end one of them.",
                ),
            )
        try:
            over = threading.Event()
            context.add_callback(over.set)
            told: HealthCheckResponse | None = None
            while context.is_active():
                if (now := check(requests, context)) != told:
                    yield now
                    told = now
                over.wait(_POLL)
        finally:
            watchers.release()

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Check": grpc.stream_unary_rpc_method_handler(
            _run_inline(check), response_serializer=HealthCheckResponse.SerializeToString
        ),
        "Watch": grpc.stream_stream_rpc_method_handler(
            watch, response_serializer=HealthCheckResponse.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(HEALTH, handlers),))
