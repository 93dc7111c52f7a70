"""The daemon's gRPC service: calls, answered out of its host tiers."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping

import grpc

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer
from moetier.runtime.wire.status_codes import abort
from moetier.tiers.errors import ArenaError, MoetierError

from .caller import bearer_of, peer_of
from .clients import Clients
from .log import Sparing
from .model import Hosted

_log = logging.getLogger(__name__)


class Service(ExpertStoreServicer):
    """For processes of this host."""

    def __init__(self, clients: Clients, description: pb.DescribeReply) -> None:
        self._clients = clients
        self._description = description
        self._began = time.monotonic()

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        """Without the models that turned out not to be what their digest says."""
        found = pb.DescribeReply()
        found.CopyFrom(self._description)
        del found.models[:]
        found.models.extend(m for m in self._description.models if self._clients.models[m.digest].host.fault is None)
        return found

    def Session(self, request_iterator: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.ServerMessage]:
        session = bearer_of(context.invocation_metadata()) or ""
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
        with _answering(context):
            return pb.StatsReply(
                models=self._clients.stats(),
                uptime_s=time.monotonic() - self._began,
                details=self._clients.details() if request.details else (),
            )


class RemoteService(Service):
    """For other hosts."""

    def __init__(self, clients: Clients, description: pb.DescribeReply) -> None:
        super().__init__(clients, description)
        self._asked = Sparing(_log, "remote-client", logging.INFO)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        """What a client asks once for each connection."""
        self._asked.say(peer=peer_of(context))
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


def describe(models: Mapping[str, Hosted], version: str) -> pb.DescribeReply:
    return pb.DescribeReply(
        version=version,
        pid=os.getpid(),
        started_unix_ms=int(time.time() * 1e3),
        models=[model.describe() for model in models.values()],
    )
