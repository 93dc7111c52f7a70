"""The link to a daemon: the order of messages, and open requests when a stream or a daemon ends."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from control_hosts import DIGEST
from readers import PATIENCE
from stores import keys, make_plan
from threads import wait_until
from told_daemons import ToldDaemon

from moetier.runtime.client import daemon_link as link_module
from moetier.runtime.client.daemon_link import Link, SlotAnswer, SlotRequest
from moetier.runtime.client.mapped_arena import MappedArena
from moetier.runtime.wire.control import ControlConnection
from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.errors import ClosedError, MissingExpertError, UnavailableError
from moetier.tiers.host.demands import Failed, Granted
from moetier.tiers.inbox import Inbox
from moetier.tiers.layout import ExpertKey


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "daemon"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def daemon(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToldDaemon]:
    monkeypatch.setattr(link_module, "FIRST_PAUSE", 0.01)
    daemon = ToldDaemon(folder)
    with daemon.running():
        yield daemon


@pytest.fixture
def link(daemon: ToldDaemon, folder: Path) -> Iterator[Link]:
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


def test_each_expert_is_granted_once_and_an_error_ends_the_request(link: Link, daemon: ToldDaemon) -> None:
    stream = daemon.stream()
    made, next_answer = request(link, 2, 3)
    asked = stream.hear().acquire
    assert (asked.request, asked.block, list(asked.experts)) == (made.number, 1, [2, 3])
    for _ in range(2):
        stream.grant(made.number, 2, slot=3, generation=8)
    stream.fail(made.number, MissingExpertError("No.", "Ask."))
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
    link: Link, daemon: ToldDaemon, status: grpc.StatusCode | None
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


def test_one_release_cancels_a_request(link: Link, daemon: ToldDaemon) -> None:
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


def test_hits_are_reported_block_by_block_ahead_of_the_next_request(link: Link, daemon: ToldDaemon) -> None:
    stream = daemon.stream()
    link.report_uses([*keys(0, 3, 1), *keys(2, 2), *keys(0, 0)])
    request(link, 5)
    used = stream.hear().uses
    assert [(entry.block, list(entry.experts)) for entry in used.blocks] == [(0, [3, 1]), (2, [2]), (0, [0])]
    assert stream.hear().HasField("acquire")


def test_closing_reports_the_last_hits_and_wakes_who_waits(link: Link, daemon: ToldDaemon) -> None:
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
    first, second = ToldDaemon(folder), ToldDaemon(folder)
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


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "can't be reached: .*Too many open files"),
        (RuntimeError("can't start new thread"), "can't be reached: can't start new thread"),
        (KeyError("a bug"), r"has failed \(KeyError\)"),
    ],
    ids=["descriptors", "threads", "bug"],
)
def test_it_connects_again_after_any_fault(daemon: ToldDaemon, folder: Path, fault: Exception, said: str) -> None:
    arena = MappedArena(Arena.create(ArenaLayout.of(make_plan(), {"records": 4})))
    tried, may = list[bool](), threading.Event()

    def connected(control: ControlConnection) -> MappedArena:
        if not may.is_set():
            tried.append(True)
            raise fault
        return arena

    link = Link(folder, DIGEST, ControlConnection.open(folder, DIGEST), connected)
    try:
        wait_until(lambda: bool(tried) and link.away_since is not None)
        assert isinstance(link.error, UnavailableError)
        assert re.search(said, link.error.cause)
        made, next_answer = request(link, 2)
        may.set()
        stream = daemon.stream()
        assert stream.hear().acquire.request == made.number
        stream.grant(made.number, 2)
        assert (answer := next_answer() or next_answer()) is not None
        assert isinstance(answer.event, Granted)
        assert link.away_since is None
    finally:
        link.close()
        arena.close()
