"""The link to a daemon: the order of messages, and open requests when a stream or a daemon ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import grpc
import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
from control_hosts import DIGEST, Host
from readers import PATIENCE
from stores import keys, make_plan
from threads import wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreServicer, add_ExpertStoreServicer_to_server
from moetier.runtime.client import daemon_link as link_module
from moetier.runtime.client.daemon_link import Link, SlotAnswer, SlotRequest
from moetier.runtime.client.mapped_arena import MappedArena
from moetier.runtime.wire.address import SOCKET
from moetier.runtime.wire.control import ControlConnection
from moetier.runtime.wire.status_codes import message_of
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import ClosedError, MissingExpertError
from moetier.tiers.host.demands import Failed, Granted
from moetier.tiers.inbox import Inbox
from moetier.tiers.layout import ExpertKey


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


class Daemon(ExpertStoreServicer):
    """A daemon that answers only what a test tells it to, in this process."""

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "daemon"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def daemon(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setattr(link_module, "FIRST_PAUSE", 0.01)
    daemon = Daemon(folder)
    with daemon.running():
        yield daemon


@pytest.fixture
def link(daemon: Daemon, folder: Path) -> Iterator[Link]:
    arena = MappedArena(Arena.create(ArenaLayout.of(make_plan(), {"records": 4})))
    link = Link(folder, DIGEST, ControlConnection.open(folder, DIGEST), lambda control: arena)
    yield link
    link.close()
    arena.close()


def request(link: Link, *experts: int) -> tuple[SlotRequest, Callable[[], SlotAnswer | None]]:
    """Send a request for experts of block 1, and return it with what takes its next answer."""
    answers = Inbox[SlotAnswer | None]()
    made = SlotRequest(1, dict.fromkeys(experts), answers)
    link.submit(made)
    return made, lambda: answers.get(PATIENCE)


def test_each_expert_is_granted_once_and_an_error_ends_the_request(link: Link, daemon: Daemon) -> None:
    stream = daemon.stream()
    made, next_answer = request(link, 2, 3)
    asked = stream.hear().acquire
    assert (asked.request, asked.block, list(asked.experts)) == (made.number, 1, [2, 3])
    for _ in range(2):
        stream.grant(made.number, 2, slot=3, generation=8)
    stream.answers.put(
        pb.ServerMessage(failed=pb.Failed(request=made.number, error=message_of(MissingExpertError("No.", "Ask."))))
    )
    granted, failed = next_answer(), next_answer()
    assert granted is not None
    assert granted.event == Granted(made.number, ExpertKey(1, 2), slot=3, generation=8)
    assert failed is not None
    assert isinstance(failed.event, Failed)
    assert isinstance(failed.event.error, MissingExpertError)
    assert made.is_over
    link.cancel(made)
    link.prefetch(0, [])
    assert stream.hear().WhichOneof("message") == "prefetch", "the daemon knows that the request is over"


@pytest.mark.parametrize("status", [None, grpc.StatusCode.UNAVAILABLE], ids=["the daemon ends it", "it breaks"])
def test_what_is_still_awaited_is_requested_again_on_the_next_stream(
    link: Link, daemon: Daemon, status: grpc.StatusCode | None
) -> None:
    stream = daemon.stream()
    made, next_answer = request(link, 2, 3)
    assert stream.hear().HasField("acquire")
    stream.grant(made.number, 2)
    assert (granted := next_answer()) is not None
    assert isinstance(granted.event, Granted)
    stream.answers.put(status)
    stream = daemon.stream()
    again = stream.hear().acquire
    assert (again.request, list(again.experts)) == (made.number, [3])
    assert next_answer() is None, "the caller looks whether its leases still hold"
    assert link.away_since is None
    assert link.connections == (2 if status is None else 1), "a broken stream needs no other control connection"


def test_one_release_cancels_a_request(link: Link, daemon: Daemon) -> None:
    stream = daemon.stream()
    made, _ = request(link, 2, 3)
    assert stream.hear().HasField("acquire")
    link.release(made, 2)
    link.cancel(made)
    link.cancel(made)
    link.prefetch(0, [1])
    released, cancelled, after = (stream.hear() for _ in range(3))
    assert (released.release.request, list(released.release.experts)) == (made.number, [2])
    assert (cancelled.release.request, list(cancelled.release.experts)) == (made.number, [])
    assert list(after.prefetch.requested.experts) == [1]


def test_hits_are_reported_block_by_block_ahead_of_the_next_request(link: Link, daemon: Daemon) -> None:
    stream = daemon.stream()
    link.report_uses([*keys(0, 3, 1), *keys(2, 2), *keys(0, 0)])
    request(link, 5)
    used = stream.hear().uses
    assert [(entry.block, list(entry.experts)) for entry in used.blocks] == [(0, [3, 1]), (2, [2]), (0, [0])]
    assert stream.hear().HasField("acquire")


def test_closing_reports_the_last_hits_and_wakes_who_waits(link: Link, daemon: Daemon) -> None:
    stream = daemon.stream()
    _, next_answer = request(link, 1)
    assert stream.hear().HasField("acquire")
    link.report_uses(keys(0, 2))
    link.close()
    link.close()
    assert list(stream.hear().uses.blocks[0].experts) == [2]
    assert next_answer() is None
    with pytest.raises(ClosedError):
        request(link, 1)


def test_requests_wait_for_the_next_daemon_and_those_cancelled_meanwhile_are_not_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "FIRST_PAUSE", 0.01)
    arena = MappedArena(Arena.create(ArenaLayout.of(make_plan(), {"records": 4})))
    first, second = Daemon(folder), Daemon(folder)
    with first.running():
        link = Link(folder, DIGEST, ControlConnection.open(folder, DIGEST), lambda control: arena)
        first.stream()
    try:
        wait_until(lambda: link.away_since is not None)
        kept, _ = request(link, 1)
        cancelled, _ = request(link, 2)
        link.cancel(cancelled)
        with second.running():
            stream = second.stream()
            asked = stream.hear().acquire
            assert (asked.request, list(asked.experts)) == (kept.number, [1])
            link.prefetch(0, [3])
            assert stream.hear().HasField("prefetch")
            assert link.connections == 2
            link.close()
    finally:
        link.close()
        arena.close()
