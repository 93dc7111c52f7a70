"""Clients of a daemon and their streams, without sockets: what is registered, answered, refused and ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import Mock

import pytest
from readers import PATIENCE, GatedReader
from stores import make_plan, make_records
from threads import Task, wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.daemon.clients import MAX_REQUESTS, Clients, SessionCall
from moetier.runtime.daemon.hosted_model import HostedModel
from moetier.runtime.wire.status_codes import error_from_message
from moetier.tiers.errors import ProtocolError, RefusedError, UnavailableError, UnknownModelError
from moetier.tiers.host.session import Session
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey

MODEL = "ab" * 32
PLAN = replace(make_plan(blocks=2, experts=4), digest=MODEL)


@pytest.fixture
def gate() -> Iterator[GatedReader]:
    gate = GatedReader(PLAN, make_records(PLAN))
    yield gate
    gate.open()


@pytest.fixture
def clients(gate: GatedReader, tmp_path: Path) -> Iterator[Clients]:
    """They may hold 4 of 6 slots each."""
    with contextlib.closing(HostTier(gate, slots={"records": 6})) as host:
        model = HostedModel(PLAN, host, tmp_path, timeout=PATIENCE)
        clients = Clients({MODEL: model}, max_leases=4, timeout=PATIENCE)
        yield clients
        gate.open()
        clients.end()
        model.close()


def register(clients: Clients, session: str) -> None:
    """Register a client of the model."""
    descriptor = clients.register(session, MODEL, os.getpid()).descriptor
    assert descriptor is not None
    os.close(descriptor)


class Stream:
    """A client's stream: ``say`` hands over a message, ``answer`` is the next answer, None at the end."""

    def __init__(self, call: SessionCall) -> None:
        self.call = call
        self.messages: SimpleQueue[bytes | None] = SimpleQueue()
        self.answers: SimpleQueue[pb.ServerMessage | Exception | None] = SimpleQueue()
        self._tasks = [Task(lambda: call.read(iter(self.messages.get, None))), Task(self._collect)]

    def _collect(self) -> None:
        try:
            for message in self.call.answers():
                self.answers.put(message)
        except Exception as error:
            self.answers.put(error)
        self.answers.put(None)

    def say(self, **message: object) -> None:
        self.messages.put(pb.ClientMessage(**message).SerializeToString())

    def acquire(self, request: int, *experts: int) -> None:
        self.say(acquire=pb.Acquire(request=request, block=0, experts=experts))

    def answer(self) -> pb.ServerMessage | Exception | None:
        return self.answers.get(timeout=PATIENCE)

    def close(self) -> None:
        self.call.end()
        self.messages.put(None)
        for task in self._tasks:
            task.result()


@contextlib.contextmanager
def streaming(clients: Clients, session: str) -> Iterator[Stream]:
    with clients.stream(session) as call, contextlib.closing(Stream(call)) as stream:
        yield stream


def test_a_client_is_known_until_its_connection_ends(clients: Clients) -> None:
    register(clients, "a")
    assert clients.knows("a")
    assert not clients.knows(None)
    with streaming(clients, "a") as stream:
        (stats,) = clients.stats()
        assert (stats.clients, stats.sessions) == (1, 1)
        clients.unregister("a")
        assert isinstance(stream.answer(), RefusedError)
    assert not clients.knows("a")
    with pytest.raises(RefusedError), streaming(clients, "a"):
        pass


def test_a_stream_ends_whose_former_cannot_be_ended(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    register(clients, "a")
    with streaming(clients, "a") as former:
        with monkeypatch.context() as patch:
            patch.setattr(type(former.call), "end", Mock(side_effect=[OSError("lost"), None]))
            with pytest.raises(OSError, match="lost"), clients.stream("a"):
                pass
        assert clients.stats()[0].sessions == 0


def test_who_names_no_store_or_an_unknown_one_gets_no_stream(clients: Clients) -> None:
    with pytest.raises(UnknownModelError):
        clients.register("a", "0" * 64, 1)
    assert not clients.knows("a")
    assert clients.register("b", None, 1).descriptor is None
    with pytest.raises(UnknownModelError, match="registered without a model"), streaming(clients, "b"):
        pass
    assert clients.stats()[0].clients == 0


def test_what_is_granted_is_leased_until_it_is_released(clients: Clients, gate: GatedReader) -> None:
    register(clients, "a")
    gate.open()
    with streaming(clients, "a") as stream:
        stream.acquire(7, 1, 2)
        granted = [stream.answer(), stream.answer()]
        assert {(each.granted.request, each.granted.expert) for each in granted} == {(7, 1), (7, 2)}
        assert not stream.call.is_idle
        stream.say(release=pb.Release(request=7, experts=[1]))
        wait_until(lambda: stream.call.outstanding == 1)
        stream.say(uses=pb.Uses(blocks=[pb.Experts(block=0, experts=[1, 2, 1])]))
        stream.say(release=pb.Release(request=7))
        wait_until(lambda: stream.call.is_idle)
        (described,) = clients.details()[0].clients
        assert (described.pid, described.leases, described.reported_hits, described.requested) == (os.getpid(), 0, 3, 2)
        assert clients.wait(0)


def test_a_second_stream_ends_the_first_and_its_leases(clients: Clients, gate: GatedReader) -> None:
    register(clients, "a")
    gate.open()
    with streaming(clients, "a") as first:
        first.acquire(1, 0)
        assert isinstance(first.answer(), pb.ServerMessage)
        with streaming(clients, "a") as second:
            assert isinstance(first.answer(), UnavailableError)
            assert first.call.outstanding == 0
            second.acquire(1, 0)
            assert isinstance(second.answer(), pb.ServerMessage)
            (stats,) = clients.stats()
            assert (stats.sessions, stats.leases) == (1, 1)


@pytest.mark.parametrize("experts", [(), (1, 1)], ids=["none", "one twice"])
def test_a_request_that_names_its_experts_wrongly_ends_the_stream(clients: Clients, experts: tuple[int, ...]) -> None:
    register(clients, "a")
    with streaming(clients, "a") as stream:
        stream.acquire(1, *experts)
        error = stream.answer()
        assert isinstance(error, ProtocolError)
        assert "names no expert, or an expert twice" in error.cause


def test_open_requests_are_bounded(clients: Clients) -> None:
    register(clients, "a")
    with streaming(clients, "a") as stream:
        for request in range(MAX_REQUESTS + 1):
            stream.acquire(request, 0)
        error = stream.answer()
        assert isinstance(error, ProtocolError)
        assert f"{MAX_REQUESTS} open requests" in error.cause


def test_bytes_that_are_no_message_end_the_stream(clients: Clients) -> None:
    register(clients, "a")
    with streaming(clients, "a") as stream:
        stream.messages.put(b"\xff\xff")
        assert isinstance(stream.answer(), ProtocolError)


def test_a_stream_ends_even_if_its_session_cannot_be_closed(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    register(clients, "a")
    with streaming(clients, "a") as stream, monkeypatch.context() as patch:
        patch.setattr(Session, "close", Mock(side_effect=OSError("lost")))
        with pytest.raises(OSError, match="lost"):
            stream.call.end()
        assert stream.answer() is None
    assert clients.stats()[0].sessions == 0


def test_a_daemon_that_ends_answers_what_it_was_asked_and_refuses_the_rest(clients: Clients, gate: GatedReader) -> None:
    register(clients, "a")
    with streaming(clients, "a") as stream:
        stream.acquire(1, 0)
        gate.wait_begun(ExpertKey(0, 0))
        clients.refuse_new()
        assert not clients.is_serving
        stream.acquire(2, 1)
        refused = stream.answer()
        assert isinstance(refused, pb.ServerMessage)
        assert refused.failed.request == 2
        assert isinstance(error_from_message(refused.failed.error), UnavailableError)
        assert not clients.wait(0), "the first request is open"
        gate.release(ExpertKey(0, 0))
        granted = stream.answer()
        assert isinstance(granted, pb.ServerMessage)
        assert granted.granted.request == 1
        stream.say(release=pb.Release(request=1))
        assert clients.wait(PATIENCE)
        clients.end()
        assert isinstance(stream.answer(), UnavailableError)
    with pytest.raises(UnavailableError):
        clients.register("b", MODEL, 1)
    with pytest.raises(UnavailableError), clients.remote_call(MODEL):
        pass


def test_fetches_of_other_hosts_are_waited_for(clients: Clients) -> None:
    with clients.remote_call(MODEL) as model:
        assert model is clients.models[MODEL]
        assert not clients.wait(0)
    assert clients.wait(0)
    with pytest.raises(UnknownModelError), clients.remote_call("0" * 64):
        pass
