"""An endpoint answers others meanwhile, keeps the places of clients that leave, and says that a stream is alive."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
import httpx2
from application_client import CHAT, TEXT, USER, answer_of
from http_servers import serving
from readers import PATIENCE

SLOW_TO_RENDER = "{% for a in range(20000) %}{% for b in range(1000) %}{% endfor %}{% endfor %}{{ 'a' + 5 }}"


@pytest.mark.parametrize(
    ("path", "body"),
    [(TEXT, {"prompt": "la mattina seguente " * 50_000}), (CHAT, {"messages": [USER]})],
    ids=["tokenised", "rendered"],
)
def test_others_are_answered_while_a_prompt_is(tinymix_4bit: Path, path: str, body: dict[str, Any]) -> None:
    """A megabyte of text, or a template with much to do; of neither comes more than an error."""

    async def ask(app: Any) -> tuple[httpx2.Response, int]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            slow = asyncio.ensure_future(client.post(path, json=body))
            others = 0
            while not slow.done():
                assert (await client.get("/health")).status_code == 200
                others += not slow.done()
            return await slow, others

    with serving(tinymix_4bit, context=50_000, template=SLOW_TO_RENDER) as (app, _):
        answer, others = asyncio.run(ask(app))
    assert answer.status_code == 400
    assert others > 2  # one could be before the prompt


def test_clients_that_leave_keep_their_places_while_their_prompts_are_made(tinymix_4bit: Path) -> None:
    """They could have any number of threads and prompts otherwise."""
    rendering, may, gone, begun = threading.Event(), threading.Event(), list[bool](), list[bool]()

    async def ask(app: Any) -> list[int]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:

            async def post() -> int:
                return (await client.post(CHAT, json={"messages": [USER], "max_tokens": 1})).status_code

            leaving = [asyncio.ensure_future(leave(app)) for _ in range(3)]
            while len(gone) < 3:
                await asyncio.sleep(0.01)
            try:
                async with asyncio.timeout(PATIENCE / 4):  # meanwhile, the server learns that the clients have left
                    refused = [await post() for _ in range(5)]
            finally:
                may.set()
            await asyncio.wait_for(asyncio.gather(*leaving), PATIENCE)
            return [*refused, await post()]

    async def leave(app: Any) -> None:
        body = json.dumps({"messages": [USER]}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            while not (messages or rendering.is_set()):
                await asyncio.sleep(0.01)
            if messages:
                return messages.pop()
            gone.append(True)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await app(scope | {"root_path": "", "http_version": "1.1"}, receive, send)

    with serving(tinymix_4bit, context=400, most=3) as (app, engine):
        template = engine.tokenizer.apply_chat_template

        def slow(*given: Any, **options: Any) -> Any:
            begun.append(True)
            if len(begun) == 3:  # no client leaves before the prompts of all three are made
                rendering.set()
            assert may.wait(PATIENCE)
            return template(*given, **options)

        engine.tokenizer.apply_chat_template = slow
        assert asyncio.run(ask(app)) == [429] * 5 + [200]
        assert engine.tally.counts()["cancelled"] == 0, "no answer has begun"


def test_stream_chunks_say_that_they_are_not_the_last(app: Any) -> None:
    for path, body in (TEXT, {"prompt": "Due"}), (CHAT, {"messages": [USER]}):
        answer = answer_of(app, path, body | {"stream": True})
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events.pop() == "[DONE]"
        reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in events]
        assert len(reasons) > 1
        assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_a_stream_says_that_it_is_alive(tinymix_4bit: Path) -> None:
    """While its prompt is computed, and while it waits for its turn; proxies would close the connection otherwise."""
    events: list[str] = []
    may = threading.Event()

    async def ask(app: Any, path: str) -> None:
        body = {"max_tokens": 1, "stream": True} | {TEXT: {"prompt": "Due"}, CHAT: {"messages": [USER]}}[path]
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        answered = asyncio.Event()

        async def receive() -> Any:
            if not messages:
                await answered.wait()
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            events.append(message.get("body", b"").decode())
            if message["type"] == "http.response.body" and not message["more_body"]:
                answered.set()
            if sum(event.startswith(": ") for event in events) == 6:
                may.set()

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await app(scope | {"root_path": "", "http_version": "1.1"}, receive, send)

    async def ask_all(app: Any) -> None:
        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*[ask(app, path) for path in (TEXT, CHAT, TEXT)])

    with serving(tinymix_4bit, context=400, alive_seconds=0.05) as (app, engine):
        hook = engine.model.register_forward_pre_hook(lambda *_: may.wait(PATIENCE) and None)
        asyncio.run(ask_all(app))
        hook.remove()
    assert may.is_set()
    assert sum(event.startswith(": ") for event in events) >= 6
    assert events.count("data: [DONE]\n\n") == 3
    assert all(event.startswith(": ") or event.startswith("data: ") for event in events if event)
