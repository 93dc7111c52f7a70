"""Who goes away at any step of a request, in this process: its answer ends, whoever is left to be told of it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from http_servers import serving
from threads import wait_until

MOST = 400  # tokens: seconds of work
STEPS = 12  # of the event loop, until the first text is on its way


@pytest.fixture(scope="module")
def served(tinymix_4bit: Path) -> Iterator[tuple[Any, Any]]:
    """(application, engine); it has answered once."""
    with serving(tinymix_4bit, context=MOST + 100) as (app, engine):
        asyncio.run(ask(app, engine, stream=False, most=1))
        yield app, engine


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Garbage collection could end what nobody holds any more, sooner or later."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def ask(
    app: Any, engine: Any, *, stream: bool, most: int, steps: int | None = None, tokenised: bool = False
) -> None:
    """Goes away so many steps of the event loop after the request was read, or ``tokenised``; with None when it is
    answered."""
    body = json.dumps({"prompt": "Tre.", "max_tokens": most, "stream": stream}).encode()
    asked, answered = asyncio.Event(), asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not asked.is_set():
            asked.set()
            return {"type": "http.request", "body": body, "more_body": False}
        if steps is None:
            await answered.wait()
        while tokenised and not engine.tally.counts()["under_way"]:
            await asyncio.sleep(0)
        for _ in range(steps or 0):
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body"):
            answered.set()

    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/completions",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 80),
    }
    await app(scope, receive, send)
    await asyncio.to_thread(wait_until, lambda: not engine.tally.counts()["under_way"])


@pytest.mark.parametrize("stream", [True, False])
def test_it_ends_the_answer(served: tuple[Any, Any], uncollected: None, stream: bool) -> None:
    app, engine = served
    before = engine.tally.counts()
    for steps, tokenised in itertools.product(range(STEPS), (False, True)):
        asyncio.run(ask(app, engine, stream=stream, most=MOST, steps=steps, tokenised=tokenised))
        after = engine.tally.counts()
        assert after["answered"] == before["answered"], steps
    assert after["cancelled"] >= before["cancelled"] + STEPS  # the others never came to be
    assert after["new_tokens"] - before["new_tokens"] < MOST


@pytest.mark.parametrize("stream", [True, False])
def test_who_stays_has_it_all(served: tuple[Any, Any], stream: bool) -> None:
    app, engine = served
    before = engine.tally.counts()
    for _ in range(8):
        asyncio.run(ask(app, engine, stream=stream, most=2))
    after = engine.tally.counts()
    assert [after[name] - before[name] for name in ("answered", "cancelled", "failed", "new_tokens")] == [8, 0, 0, 16]
