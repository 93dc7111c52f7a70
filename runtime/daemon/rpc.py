"""The daemon's gRPC service, answered from its host tiers, and the check of each call's credential."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer
from moetier.runtime.wire.channel import SERVICE
from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import ArenaError, MoetierError, RefusedError

from .clients import Clients
from .log import RateLimitedLog
from .model import HostedModel

_log = logging.getLogger(__name__)


class Service(ExpertStoreServicer):
    """The service for processes of this host."""

    def __init__(self, clients: Clients, description: pb.DescribeReply) -> None:
        self._clients = clients
        self._description = description
        self._began = time.monotonic()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        """Describe the daemon, without models that were condemned."""
        found = pb.DescribeReply()
        found.CopyFrom(self._description)
        del found.models[:]
        found.models.extend(m for m in self._description.models if self._clients.models[m.digest].host.fault is None)
        return found

    def Session(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.ServerMessage]:
        """Serve the stream of a client of this host."""
        session = bearer_of(context.invocation_metadata()) or ""
        with _errors_as_codes(context):
            call = self._clients.attach(session)
            try:
                if context.add_callback(call.end):
                    threading.Thread(
                        target=call.read, args=(request_iterator,), name="moetier-session", daemon=True
                    ).start()
                else:  # the call has ended already
                    call.end()
                yield from call.answers()
            finally:
                self._clients.detach(session, call)

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Send a record, or a part of it, as serialised pieces."""
        with _errors_as_codes(context), self._clients.fetching(request.digest) as model:
            yield from model.fetches.serve(request, context)

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsReply:
        """Return the counters of all models."""
        with _errors_as_codes(context):
            return pb.StatsReply(
                models=self._clients.stats(),
                uptime_s=time.monotonic() - self._began,
                details=self._clients.details() if request.details else (),
            )


class RemoteService(Service):
    """The service for other hosts, without sessions."""

    def __init__(self, clients: Clients, description: pb.DescribeReply) -> None:
        super().__init__(clients, description)
        self._connections = RateLimitedLog(_log, "remote-client", logging.INFO)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        """Describe the daemon. Clients ask once for each connection, so it is logged as one."""
        self._connections.log(peer=peer_of(context))
        return super().Describe(request, context)

    def Session(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.ServerMessage]:
        """Refuse the call."""
        abort(context, ArenaError("A session is about an arena, and that is on the daemon's own host.", "Use Fetch."))


@contextlib.contextmanager
def _errors_as_codes(context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with the status code of an error."""
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


def describe(models: Mapping[str, HostedModel], version: str) -> pb.DescribeReply:
    """Describe this process and the models that it serves."""
    return pb.DescribeReply(
        version=version,
        pid=os.getpid(),
        started_unix_ms=int(time.time() * 1e3),
        models=[model.describe() for model in models.values()],
    )


def add_service(servicer: ExpertStoreServicer, server: grpc.Server) -> None:
    """Add the service to a server, as protobuf's generated function does, but without (de)serialisation of streams.

    ``Fetch`` yields serialised pieces. ``Session`` gets serialised messages, as gRPC's server keeps a stream for ever
    in which a message can't be parsed.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
        ),
        "Session": grpc.stream_stream_rpc_method_handler(
            servicer.Session, response_serializer=pb.ServerMessage.SerializeToString
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(servicer.Fetch, pb.FetchRequest.FromString),
        "Stats": grpc.unary_unary_rpc_method_handler(
            servicer.Stats, pb.StatsRequest.FromString, pb.StatsReply.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


# -- auth -------------------------------------------------------------------------------------------------------------


class AuthInterceptor(grpc.ServerInterceptor):
    """Refuses calls without an accepted bearer token as soon as their headers are there.

    A refusal needs neither a message of the call nor a thread of the server's, and does not count as a call under way.
    So refused calls take nothing from accepted ones, however many are left half-open.
    """

    def __init__(self, accepts: Callable[[str | None], bool], *, exempt: str | None = None) -> None:
        """``accepts`` gets the bearer, None without one; calls of the service ``exempt`` need none."""
        self._accepts = accepts
        self._exempt = f"/{exempt}/"
        self._refusals = RateLimitedLog(_log, "client-refused")

    def intercept_service(self, continuation: Callable[..., Any], handler_call_details: Any) -> Any:
        """Return the handler of an accepted or exempt call; for any other call, one that refuses it."""
        bearer = bearer_of(handler_call_details.invocation_metadata)
        if self._accepts(bearer) or handler_call_details.method.startswith(self._exempt):
            return continuation(handler_call_details)
        cause = "no credential" if bearer is None else "a credential that is not known"

        def refuse(requests: object, context: grpc.ServicerContext) -> NoReturn:
            self._refusals.log(peer=peer_of(context), cause=cause)
            abort(
                context,
                RefusedError(
                    "The call shows no credential that this daemon has issued or knows.",
                    "Give its token (`credentials.token_file`); over a Unix socket, connect to its control socket "
                    "first.",
                ),
            )

        # a stream, whatever the call is: gRPC waits for the message of a unary call before it runs the handler
        return grpc.stream_stream_rpc_method_handler(run_inline(refuse))


class _InlineExecutor(ThreadPoolExecutor):
    """Runs what is submitted before it returns. It has no threads."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments, **named))  # gRPC's own function, which catches what a handler raises
        return future


_INLINE = _InlineExecutor()


def run_inline(handler: Callable[[Any, grpc.ServicerContext], Any]) -> Callable[[Any, grpc.ServicerContext], Any]:
    """Return ``handler``, to be run by the thread that accepts calls. It must neither wait nor yield.

    Without a thread of the pool the call is over before the next one is counted.
    """

    def run(requests: Any, context: grpc.ServicerContext) -> Any:
        return handler(requests, context)

    run.experimental_thread_pool = _INLINE  # type: ignore[attr-defined]
    return run


def peer_of(context: grpc.ServicerContext) -> str:
    """Return where a call comes from: "ipv4:10.0.0.7:51234", "unix:"."""
    return unquote(context.peer())


def bearer_of(metadata: Any) -> str | None:
    """Return the bearer token of a call; None if there is none, or more than one."""
    shown = [value for name, value in metadata or () if name == "authorization"]
    if len(shown) != 1 or not isinstance(shown[0], str):
        return None
    scheme, _, bearer = shown[0].partition(" ")
    return bearer if scheme.lower() == "bearer" and bearer else None
