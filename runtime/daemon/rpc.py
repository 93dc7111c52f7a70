"""The daemon's gRPC service, through which clients use the daemon's host tiers."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer
from moetier.runtime.wire.channel import SERVICE
from moetier.runtime.wire.request import RemoteRequest, decode_request
from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import ArenaError, ExhaustedError, MoetierError
from moetier.tiers.threads import start_thread

from .clients import Clients
from .log import RateLimitedLog

_log = logging.getLogger(__name__)


class Service(ExpertStoreServicer):
    """The gRPC service for processes of this host; with ``is_remote``, for other hosts, which get no sessions."""

    def __init__(self, clients: Clients, *, is_remote: bool = False) -> None:
        self._clients = clients
        self._is_remote = is_remote
        self._connections = RateLimitedLog(_log, "remote-client", logging.INFO)
        self._version = version("moetier")

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        """Describe the daemon and its models, except those that were condemned."""
        with _errors_as_codes(context):
            if self._is_remote:  # clients call this once for each connection
                self._connections.log(peer=peer_of(context))
            return pb.DescribeReply(
                version=self._version,
                pid=os.getpid(),
                started_unix_ms=int(self._clients.started * 1e3),
                models=[model.describe() for model in self._clients.models.values() if model.host.fault is None],
            )

    def Session(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.ServerMessage]:
        """Serve the stream of a client on this machine: read its serialised messages, and yield the answers."""
        with _errors_as_codes(context):
            if self._is_remote:
                raise ArenaError(
                    "Sessions are only for clients on the daemon's host, because they use its arena.",
                    "Use Fetch instead.",
                )
            with self._clients.stream(bearer_of(context.invocation_metadata()) or "") as call:
                if context.add_callback(call.end):
                    try:
                        start_thread("moetier-session", call.read, request_iterator)
                    except ExhaustedError as error:
                        _log.warning("A client is refused: %s %s", error.cause, error.fix)
                        raise
                else:  # the call has ended already
                    call.end()
                yield from call.answers()

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Send a record, or a part of it, as serialised pieces."""
        with _errors_as_codes(context), self._clients.remote_call(request.digest) as model:
            yield from model.fetch_calls.serve(request, context)

    def Compute(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Compute experts for hidden states [tokens, hidden], and send the outputs as serialised pieces."""
        with _errors_as_codes(context), self._clients.remote_call(request.digest) as model:
            yield from model.open_compute_calls().serve(request, context)

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsReply:
        """Return the counters of all models."""
        with _errors_as_codes(context):
            return pb.StatsReply(
                models=self._clients.stats(),
                uptime_s=time.monotonic() - self._clients.started_monotonic,
                details=self._clients.details() if request.details else (),
            )


@contextlib.contextmanager
def _errors_as_codes(context: grpc.ServicerContext) -> Iterator[None]:
    """If an error is raised in the context, end the call with that error's status code."""
    try:
        yield
    except MoetierError as error:
        abort(context, error)
    except Exception as error:
        if not context.is_active():
            raise
        _log.exception("fault")
        abort(context, error)


def add_service(servicer: ExpertStoreServicer, server: grpc.Server) -> None:
    """Add the service to a server. Unlike protobuf's generated function, leave some messages of streams serialised.

    ``Fetch`` and ``Compute`` get checked requests, and yield serialised pieces. ``Session`` gets serialised messages,
    because gRPC's server would keep a stream open for ever once it could not parse one of its messages.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            servicer.Describe, pb.DescribeRequest.FromString, pb.DescribeReply.SerializeToString
        ),
        "Session": grpc.stream_stream_rpc_method_handler(
            servicer.Session, response_serializer=pb.ServerMessage.SerializeToString
        ),
        "Fetch": grpc.unary_stream_rpc_method_handler(_checked(servicer.Fetch, pb.FetchRequest)),
        "Compute": grpc.unary_stream_rpc_method_handler(_checked(servicer.Compute, pb.ComputeRequest)),
        "Stats": grpc.unary_unary_rpc_method_handler(
            servicer.Stats, pb.StatsRequest.FromString, pb.StatsReply.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _checked(
    call: Callable[[RemoteRequest, grpc.ServicerContext], Any], request_class: type[RemoteRequest]
) -> Callable[[bytes, grpc.ServicerContext], Any]:
    """Return a handler of serialised requests, which parses and checks them before it calls ``call``."""

    def handle(data: bytes, context: grpc.ServicerContext) -> Any:
        try:
            request = decode_request(request_class, data)
        except MoetierError as error:
            abort(context, error)
        return call(request, context)

    return handle


def peer_of(context: grpc.ServicerContext) -> str:
    """Return the address from which a call comes: "ipv4:10.0.0.7:51234", "unix:"."""
    return unquote(context.peer())


def bearer_of(metadata: Any) -> str | None:
    """Return the bearer token of a call; None if there is none, or more than one."""
    shown = [value for name, value in metadata or () if name == "authorization"]
    if len(shown) != 1 or not isinstance(shown[0], str):
        return None
    scheme, _, bearer = shown[0].partition(" ")
    return bearer if scheme.lower() == "bearer" and bearer else None
