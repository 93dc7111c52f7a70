"""Who goes away at any step of a request, in this process: its answer ends, whoever is left to be told of it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from http_servers import serving
from readers import PATIENCE
from threads import wait_until

from moetier.tools.serve.prompts import Prompts

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

    await app(scope_of(body), receive, send)
    await asyncio.to_thread(wait_until, lambda: not engine.tally.counts()["under_way"])


def scope_of(body: bytes) -> dict[str, Any]:
    headers = {"host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
    return {
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


def test_a_stream_that_was_left_waits_idly(tinymix_4bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the thread that makes its prompt: the event loop has nothing to do meanwhile."""
    body, may, waits = json.dumps({"prompt": "Tre.", "stream": True}).encode(), threading.Event(), list[object]()
    jobs, wait = Prompts.jobs, asyncio.wait

    def late(*given: Any) -> Any:
        assert may.wait(PATIENCE)
        return jobs(*given)

    async def counted(tasks: Any, **options: Any) -> Any:
        waits.append(tasks)
        return await wait(tasks, **options)

    async def leave(app: Any) -> int:
        asked, begun, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if not asked.is_set():
                asked.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await begun.wait()
            gone.set()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            begun.set()

        answering = asyncio.ensure_future(app(scope_of(body), receive, send))
        try:
            await asyncio.wait_for(gone.wait(), PATIENCE)
            before = len(waits)
            await asyncio.sleep(0.3)
            assert not answering.done()
            return len(waits) - before
        finally:
            may.set()
            await answering

    with serving(tinymix_4bit, context=100, alive_seconds=0.01) as (app, _):
        monkeypatch.setattr(Prompts, "jobs", late)
        monkeypatch.setattr(asyncio, "wait", counted)
        assert asyncio.run(leave(app)) < 50
