"""Session ids: the same for all requests of a conversation, and without an effect on anything else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from readers import PATIENCE

from moetier.tools.ray import session_ids
from moetier.tools.ray.session_ids import HEADER, SessionIds, session_of

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Chi era don Abbondio?"}
ANSWER = {"role": "assistant", "content": "Un curato."}


def of(*messages: dict[str, Any], **more: Any) -> str | None:
    return session_of(json.dumps({"messages": messages} | more).encode())


def test_a_conversation_has_one_id() -> None:
    first = of(SYSTEM, FIRST)
    assert first is not None
    assert first == of(SYSTEM, FIRST, ANSWER, FIRST) == of(SYSTEM, FIRST, model="m", stream=True)
    others = [of(FIRST), of(SYSTEM, FIRST | {"content": "Who?"}), of(SYSTEM)]
    assert len({first, *others}) == 4


def test_a_text_that_goes_on_has_one_id() -> None:
    start = "la mattina " * 100
    assert session_of(json.dumps({"prompt": start}).encode()) == session_of(
        json.dumps({"prompt": start + "dopo"}).encode()
    )
    assert session_of(b'{"prompt": "a"}') != session_of(b'{"prompt": "b"}')


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"7", b"{", b'"messages"', b"\xff", b"[" * 100_000),
        *(b'{"messages": 7}', b'{"messages": [7]}', b'{"messages": [{"content": "no role"}]}'),
        *(b'{"prompt": 7}', b'{"prompt": [1, 2], "messages": {"a": 1}}'),
    ],
)
def test_what_is_no_request_has_none(body: bytes) -> None:
    assert session_of(body) is None


def test_only_the_beginning_of_a_body_is_read() -> None:
    """The proxy has not seen a key, and can't know one."""
    pieces = [b'{"messages": [' + json.dumps(FIRST).encode(), *[b" " * (1 << 16)] * 200]
    received = 0

    async def receive() -> Any:
        nonlocal received
        received += len(pieces[0])
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        assert received <= session_ids.START_BYTES + (1 << 16)
        assert scope["headers"] == [(HEADER, (of(FIRST) or "").encode())]
        while (await receive())["more_body"]:
            pass

    given = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(SessionIds(inner)(given, receive, receive))
    assert received > 200 << 16


def test_a_long_beginning_is_enough() -> None:
    size = session_ids.START_BYTES
    long = FIRST | {"content": "a" * size}
    bodies = [json.dumps({"model": "m", "messages": [long, *more]}).encode()[:size] for more in ([], [ANSWER, FIRST])]
    other = json.dumps({"model": "m", "messages": [SYSTEM, long]}).encode()[:size]
    assert None is not session_of(bodies[0], is_cut=True) == session_of(bodies[1], is_cut=True)
    assert session_of(other, is_cut=True) != session_of(bodies[0], is_cut=True)
    assert session_of(json.dumps({"prompt": "a" * size}).encode()[:size], is_cut=True) is not None
    assert session_of(json.dumps({"tools": "a" * size, "prompt": "a"}).encode()[:size], is_cut=True) is None


def test_other_fields_come_before_or_after() -> None:
    fields = {"model": "m", "tools": [{"a": {"messages": [SYSTEM]}}], "stop": None}
    body = json.dumps(fields | {"messages": [FIRST]}, indent=2)
    assert session_of(body.encode()) == of(FIRST, **fields) == of(FIRST)


class Inner:
    """Application that keeps what it gets."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.messages: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = scope.get("headers", [])
        while not self.messages or self.messages[-1]["type"] != "http.disconnect":
            self.messages.append(await receive())


def through(pieces: list[bytes], *, path: str = "/v1/chat/completions", **scope: Any) -> Inner:
    parts = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    if parts:
        parts[-1]["more_body"] = False
    sent = [*parts, {"type": "http.disconnect"}]
    waiting = list(sent)

    async def receive() -> Any:
        return waiting.pop(0)

    inner = Inner()
    given = {"type": "http", "method": "POST", "path": path, "headers": [(b"host", b"here")]} | scope
    asyncio.run(SessionIds(inner)(given, receive, receive))
    assert inner.messages == sent
    return inner


def test_the_header_is_added_and_the_body_passed_on() -> None:
    body = json.dumps({"messages": [FIRST]}).encode()
    inner = through([body[:10], body[10:]])
    assert inner.headers == [(b"host", b"here"), (HEADER, (of(FIRST) or "").encode())]


def test_a_clients_own_id_stays() -> None:
    own = [(HEADER, b"mine")]
    assert through([json.dumps({"messages": [FIRST]}).encode()], headers=own).headers == own


def test_a_slow_body_is_passed_on_before_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica decides how long it waits for it."""
    monkeypatch.setattr(session_ids, "START_SECONDS", 0.05)
    seen: list[Any] = []

    async def run() -> None:
        waiting, arrived = [{"type": "http.request", "body": b'{"prompt": ', "more_body": True}], asyncio.Event()

        async def receive() -> Any:
            if not waiting:
                await arrived.wait()
                return {"type": "http.request", "body": b'"a"}', "more_body": False}
            return waiting.pop()

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            seen.extend([scope["headers"], await receive()])
            arrived.set()
            seen.append(await receive())

        given = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await SessionIds(inner)(given, receive, receive)

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert seen[0] == []
    assert [message["body"] for message in seen[1:]] == [b'{"prompt": ', b'"a"}']


@pytest.mark.parametrize("scope", [{"method": "GET"}, {"path": "/v1/models"}, {"path": "/-/routes"}])
def test_other_requests_are_not_touched(scope: dict[str, Any]) -> None:
    assert through([json.dumps({"messages": [FIRST]}).encode()], **scope).headers == [(b"host", b"here")]


def test_a_client_that_goes_away_is_passed_on() -> None:
    assert through([]).headers == [(b"host", b"here")]
