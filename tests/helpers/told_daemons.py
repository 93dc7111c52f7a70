"""A daemon in the test's own process that answers a client only what the test tells it to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import grpc
import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
from control_hosts import Host
from readers import PATIENCE

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer, add_ExpertStoreServicer_to_server
from moetier.runtime.wire.address import SOCKET
from moetier.runtime.wire.status_codes import message_of
from moetier.tiers.errors import MoetierError


class Stream:
    """A stream of the daemon: ``heard`` has the client's messages, and ``answer`` sends one."""

    def __init__(self) -> None:
        self.heard: SimpleQueue[pb.ClientMessage] = SimpleQueue()
        self.answers: SimpleQueue[pb.ServerMessage | grpc.StatusCode | None] = SimpleQueue()  # None ends the stream

    def hear(self) -> pb.ClientMessage:
        return self.heard.get(timeout=PATIENCE)

    def grant(self, request: int, expert: int, slot: int = 0, generation: int = 2) -> None:
        granted = pb.Granted(request=request, expert=expert, slot=slot, generation=generation)
        self.answers.put(pb.ServerMessage(granted=granted))

    def fail(self, request: int, error: MoetierError) -> None:
        self.answers.put(pb.ServerMessage(failed=pb.Failed(request=request, error=message_of(error))))


class ToldDaemon(ExpertStoreServicer):
    """Its clients wait until the test answers on the ``stream`` of each."""

    def __init__(self, folder: Path) -> None:
        self.streams: SimpleQueue[Stream] = SimpleQueue()
        self._folder = folder

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:
        return pb.DescribeReply()

    def Session(
        self, messages: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        stream = Stream()
        context.add_callback(lambda: stream.answers.put(None))
        self._readers.submit(self._read, messages, stream)
        self.streams.put(stream)
        while (answer := stream.answers.get()) is not None:
            if isinstance(answer, grpc.StatusCode):
                context.abort(answer, "as the test says")
            yield answer

    def _read(self, messages: Iterator[pb.ClientMessage], stream: Stream) -> None:
        with contextlib.suppress(Exception):  # gRPC raises once the client is gone
            for message in messages:
                stream.heard.put(message)
        stream.answers.put(None)

    def stream(self) -> Stream:
        """The next stream that the client opens."""
        return self.streams.get(timeout=PATIENCE)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        host = Host(self._folder)
        with ThreadPoolExecutor(8) as self._readers, ThreadPoolExecutor(8) as threads:
            server = grpc.server(threads)
            add_ExpertStoreServicer_to_server(self, server)
            server.add_insecure_port(f"unix:{self._folder / SOCKET}")
            server.start()
            try:
                yield
            finally:
                host.server.close()
                server.stop(0).wait()
