"""The daemon's gRPC service: messages to and from its host tiers, and who may send them."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer
from moetier.tiers.errors import ArenaError, MoetierError, RefusedError, UnavailableError, UnknownModelError

from .exchange import Exchange
from .fetch import CALLS, SERVICE, add_service
from .hosted import Hosted
from .logfmt import Sparing, say
from .running import SHORT
from .side import Welcome
from .status import abort

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),  # a second daemon on the same port is an error
    # idle clients may ask whether the connection is alive, and are asked
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 1 << 20),
)
_SPARE = 8  # threads for calls that end at once
_QUEUED = 64  # calls that wait for a thread; more are refused
_HEALTH = "/grpc.health.v1.Health/"

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Client:
    """A side connection; ``model`` is None for who only looks."""

    pid: int
    model: Hosted | None
    exchange: Exchange | None = None


class Clients:
    """Who is connected, by the ids that the side socket issued; and whether they are still served."""

    def __init__(self, models: Mapping[str, Hosted], *, leases: int, patience: float) -> None:
        """``models`` by digest; a client has at most ``leases``; ``patience`` seconds for a slot."""
        self.models = models
        self._leases = leases
        self._patience = patience
        self._changed = threading.Condition()  # guards the three below
        self._clients: dict[str, _Client] = {}
        self._fetching = 0
        self._stopping = False

    # -- the side socket's --------------------------------------------------------------------------------------------

    def admit(self, session: str, digest: str | None, pid: int) -> Welcome:
        """Raises UnknownModelError; UnavailableError once the daemon is ending."""
        with self._changed:
            if digest is None:
                self._clients[session] = _Client(pid, None)
                return Welcome("", {})
            if self._stopping:
                raise _stopping()
            model = self.models.get(digest)
            if model is None:
                raise self._unknown(digest)
            welcome = Welcome(model.name, model.slots, model.host.export())
            self._clients[session] = _Client(pid, model)
        say(_log, "client", pid=pid, model=model.name)
        return welcome

    def leave(self, session: str) -> None:
        with self._changed:
            client = self._clients.pop(session)
        if client.exchange is not None:
            client.exchange.end(_left())
        if client.model is not None:
            say(_log, "client-gone", pid=client.pid, model=client.model.name)

    # -- the service's ------------------------------------------------------------------------------------------------

    def knows(self, session: str) -> bool:
        return session in self._clients

    def attach(self, session: str) -> Exchange:
        """The client's new stream; its former one ends. Raises MoetierError."""
        with self._changed:
            client = self._clients.get(session)
            if client is None:
                raise _left()
            if client.model is None:
                raise UnknownModelError("The credential is for no model.", "Name its digest on the side socket.")
            if self._stopping:
                raise _stopping()
            former = client.exchange
            client.exchange = exchange = Exchange(
                client.model, leases=self._leases, patience=self._patience, settled=self._settled
            )
        if former is not None:
            former.end(UnavailableError("The client has opened another stream.", "Use that."))
        return exchange

    def detach(self, session: str, exchange: Exchange) -> None:
        exchange.end()
        with self._changed:
            client = self._clients.get(session)
            if client is not None and client.exchange is exchange:
                client.exchange = None

    @contextlib.contextmanager
    def fetching(self, digest: str) -> Iterator[Hosted]:
        """While another host fetches of a model. Raises MoetierError."""
        with self._changed:
            if self._stopping:
                raise _stopping()
            model = self.models.get(digest)
            if model is None:
                raise self._unknown(digest)
            self._fetching += 1
        try:
            yield model
        finally:
            with self._changed:
                self._fetching -= 1
                self._changed.notify_all()

    def stats(self) -> list[pb.ModelStats]:
        with self._changed:
            clients = list(self._clients.values())
        found = []
        for model in self.models.values():
            of_model = [client for client in clients if client.model is model]
            exchanges = [client.exchange for client in of_model if client.exchange is not None]
            leases = sum(exchange.leases for exchange in exchanges)
            found.append(model.stats(clients=len(of_model), sessions=len(exchanges), leases=leases))
        return found

    # -- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Nobody is admitted, and nothing is asked for any more. What has been asked for is still answered."""
        with self._changed:
            self._stopping = True
            for exchange in self._exchanges():
                exchange.refuse(_stopping())

    def wait(self, seconds: float) -> bool:
        """Whether all that was asked for is over."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._fetching and all(exchange.is_settled for exchange in self._exchanges()),
                max(seconds, 0.0),
            )

    def end(self) -> None:
        """Of every stream."""
        with self._changed:
            exchanges = self._exchanges()
        for exchange in exchanges:
            exchange.end(_stopping())

    def _unknown(self, digest: str) -> UnknownModelError:
        names = ", ".join(f"{model.name} ({model.digest[:SHORT]})" for model in self.models.values())
        return UnknownModelError(
            f"This daemon does not serve the store {digest[:SHORT]!r}; it serves {names}.",
            "If the model was converted again meanwhile, start the daemon again; or name another (moetier ps).",
        )

    def _exchanges(self) -> list[Exchange]:
        return [client.exchange for client in self._clients.values() if client.exchange is not None]

    def _settled(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Service(ExpertStoreServicer):
    """For processes of this host."""

    def __init__(self, clients: Clients, description: pb.DescribeReply) -> None:
        self._clients = clients
        self._description = description
        self._began = time.monotonic()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        return self._description

    def Session(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.ServerMessage]:
        session = _bearer(context.invocation_metadata()) or ""
        with _answering(context):
            exchange = self._clients.attach(session)
            try:
                if context.add_callback(exchange.end):
                    threading.Thread(
                        target=exchange.hear, args=(request_iterator,), name="moetier-session", daemon=True
                    ).start()
                else:  # it is over already
                    exchange.end()
                yield from exchange.answers()
            finally:
                self._clients.detach(session, exchange)

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        with _answering(context), self._clients.fetching(request.digest) as model:
            yield from model.fetches.serve(request, context)

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsReply:
        return pb.StatsReply(models=self._clients.stats(), uptime_s=time.monotonic() - self._began)


class RemoteService(Service):
    """For other hosts."""

    def __init__(self, clients: Clients, description: pb.DescribeReply) -> None:
        super().__init__(clients, description)
        self._asked = Sparing(_log, "remote-client", logging.INFO)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        """What a client asks once for each connection."""
        self._asked.say(peer=_peer(context))
        return super().Describe(request, context)

    def Session(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.ServerMessage]:
        abort(context, ArenaError("A session is about an arena, and that is on the daemon's own host.", "Use Fetch."))


@contextlib.contextmanager
def _answering(context: grpc.ServicerContext) -> Iterator[None]:
    """Errors as status codes."""
    try:
        yield
    except MoetierError as raised:
        error: Exception = raised
    except Exception as raised:
        if not context.is_active():
            raise
        _log.exception("fault")
        error = raised
    else:
        return
    abort(context, error)


def local_server(
    service: Service, checks: health.HealthServicer, *, clients: Clients, sessions: int, models: int
) -> grpc.Server:
    """On a Unix socket: every call shows the id of a side connection that is open. ``sessions`` have a thread each,
    whatever is fetched meanwhile."""
    return _server(service, checks, clients.knows, sessions + CALLS * models + _SPARE)


def remote_server(
    service: RemoteService, checks: health.HealthServicer, *, token: str | None, models: int
) -> grpc.Server:
    """On TCP: every call shows the token, if there is one."""

    def is_token(bearer: str) -> bool:
        return token is None or hmac.compare_digest(bearer.encode(), token.encode())

    return _server(service, checks, is_token, CALLS * models + _SPARE, anonymous=token is None)


def reflect(servers: list[grpc.Server]) -> None:
    """Tells who may call what the messages are."""
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    for server in servers:
        reflection.enable_server_reflection(names, server)


def health_checks() -> health.HealthServicer:
    checks = health.HealthServicer()
    checks.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    return checks


def _server(
    service: Service,
    checks: health.HealthServicer,
    accepts: Callable[[str], bool],
    threads: int,
    *,
    anonymous: bool = False,
) -> grpc.Server:
    server = grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="moetier-grpc"),
        interceptors=[_Gate(accepts, anonymous=anonymous)],
        options=OPTIONS,
        maximum_concurrent_rpcs=threads + _QUEUED,
    )
    add_service(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    return server


class _Gate(grpc.ServerInterceptor):
    """Lets those calls in whose bearer is accepted; to health checks everybody."""

    def __init__(self, accepts: Callable[[str], bool], *, anonymous: bool) -> None:
        self._accepts = accepts
        self._anonymous = anonymous
        self._refusals = Sparing(_log, "client-refused")

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_HEALTH) or self._anonymous:
            return handler
        bearer = _bearer(handler_call_details.invocation_metadata)
        if bearer is not None and self._accepts(bearer):
            return handler
        cause = "no credential" if bearer is None else "a credential that is not known"
        return self._refusal(handler, cause)

    def _refusal(self, handler: Any, cause: str) -> Any:
        """A handler of the same kind that refuses."""

        def refuse(request: object, context: grpc.ServicerContext) -> NoReturn:
            self._refusals.say(peer=_peer(context), cause=cause)
            abort(
                context,
                RefusedError(
                    "The call shows no credential that this daemon has issued or knows.",
                    "Give its token (--token-file); over a Unix socket, connect to its side socket first.",
                ),
            )

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(refuse)


def _peer(context: grpc.ServicerContext) -> str:
    """Where a call comes from: "ipv4:10.0.0.7:51234", "unix:"."""
    return unquote(context.peer())


def _bearer(metadata: Any) -> str | None:
    """What a call shows; None when that is nothing, or several things."""
    shown = [value for name, value in metadata or () if name == "authorization"]
    if len(shown) != 1 or not isinstance(shown[0], str):
        return None
    scheme, _, bearer = shown[0].partition(" ")
    return bearer if scheme.lower() == "bearer" and bearer else None


def _stopping() -> UnavailableError:
    return UnavailableError("The daemon is ending.", "Use another one, or the store itself.")


def _left() -> RefusedError:
    return RefusedError("The side connection of this credential has ended.", "Connect to the side socket again.")


def describe(models: Mapping[str, Hosted], version: str) -> pb.DescribeReply:
    return pb.DescribeReply(
        version=version,
        pid=os.getpid(),
        started_unix_ms=int(time.time() * 1e3),
        models=[model.describe() for model in models.values()],
    )
