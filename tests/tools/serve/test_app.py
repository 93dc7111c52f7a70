"""What the server says to requests that can't be answered, in this process; behind each of them it answers."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

import httpx2
from application_client import CHAT, TEXT, TOOLS, USER, answer_of, called, refused
from http_servers import application

HALF = "\ud800"  # of a character


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (
            "application/x-www-form-urlencoded",
            "{}",
            "The Content-Type is application/x-www-form-urlencoded; it must be ",
        ),
        ("application/json", "[1]", "The body is not a JSON object."),
        ("application/json; charset=utf-8", "{", "The body is not a JSON object."),
    ],
)
def test_a_body_that_is_no_json_object(app: Any, kind: str, body: str, message: str) -> None:
    """The first is what curl sends by itself."""

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000", timeout=60) as client:
            return await client.post(CHAT, content=body, headers={"Content-Type": kind})

    answer = asyncio.run(ask())
    said = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert said.startswith(message)
    assert ("-H 'Content-Type: application/json'" in said) == ("urlencoded" in kind)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-10, 1e-5])
def test_hardly_any_temperature(app: Any, temperature: float) -> None:
    answer = answer_of(app, TEXT, {"prompt": "Due", "temperature": temperature})
    assert answer.status_code == 200, answer.text
    if temperature < 1e-5:
        cold = answer_of(app, TEXT, {"prompt": "Due", "temperature": 0})
        assert answer.json()["choices"] == cold.json()["choices"]


def deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": called("f")}, "messages"),
        ({"messages": called({"name": "f"})}, "messages"),
        ({"messages": called({"name": "f", "arguments": "5"})}, "messages"),
        ({"messages": called({"name": "f", "arguments": json.dumps({"a": HALF})})}, "messages"),
        ({"messages": called({"name": "f", "arguments": {"a": deep(900)}})}, None),
        ({"messages": called({"name": "f", "arguments": "[" * 5000})}, "messages"),
        ({"messages": [USER, {"role": "tool", "tool_call_id": 5, "content": "3"}]}, "messages"),
        ({"messages": [USER | {"content": HALF}]}, None),
        ({"messages": [USER], HALF: 1}, None),
        ({"messages": [USER], "model": HALF}, None),
        ({"messages": [USER], "tools": "x"}, "tools"),
        ({"messages": [USER], "tools": [{"x": 1}]}, "tools"),
        ({"messages": [USER], "tools": [{"type": "function", "function": {"parameters": {}}}]}, "tools"),
        ({"messages": [USER], "chat_template_kwargs": {"budget": deep(900)}}, None),
    ],
)
def test_chats_that_make_no_sense(app: Any, body: dict[str, Any], param: str | None) -> None:
    assert refused(app, CHAT, body)["param"] == param


@pytest.mark.parametrize("body", [{"prompt": HALF}, {"prompt": "Due", HALF: 1}, {"prompt": "Due", "stop": HALF}])
def test_half_a_character(app: Any, body: dict[str, Any]) -> None:
    assert refused(app, TEXT, body)["message"] == "The body contains text that is not valid Unicode."


def test_what_agents_send_is_taken(app: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Unknown fields are named in the log, once; these are the first requests that have them."""
    harmless = {"user": "u", "parallel_tool_calls": False, "cache_prompt": True, "n_keep": 1}
    for path, body in (CHAT, {"messages": [USER], "tools": TOOLS, "tool_choice": "none"}), (TEXT, {"prompt": "Due"}):
        for _ in range(2):
            answer = answer_of(app, path, body | harmless)
            assert answer.status_code == 200, answer.text
    found = [each for each in caplog.messages if "unknown field" in each]
    expected = ["cache_prompt", "n_keep", "parallel_tool_calls"]
    assert found == [f"requests have the unknown field {name!r}, which is ignored" for name in expected]


def test_one_name_and_the_time_of_the_start(app: Any) -> None:
    async def ask() -> list[httpx2.Response]:
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            return [await client.get(path) for path in ("/v1/models", "/v1/models/small", "/metrics")]

    models, model, metrics = asyncio.run(ask())
    (card,) = models.json()["data"]
    assert card == model.json()
    assert 0 <= time.time() - card["created"] < 3600
    assert set(re.findall(r'model="([^"]*)"', metrics.text)) == {"small"}


COSTLY: dict[str, Callable[[], bytes]] = {  # bodies
    "values": lambda: b"[" + b"[]," * (5 << 20) + b"1]",
    "numbers": lambda: b"[" + (b"1" * 4000 + b",") * (16 << 8) + b"1]",
    "strings": lambda: b"[" + b'"",' * (5 << 20) + b"1]",
    "levels": lambda: b"[" * (15 << 20),
    "ends": lambda: b"]" * (15 << 20),
    "arguments": lambda: json.dumps(
        {"messages": called({"name": "f", "arguments": "[" + "[]," * (5 << 20) + "1]"})}
    ).encode(),
    "escapes": lambda: b'{"prompt": "' + b"\\n" * (7 << 20) + b'", "n": 2}',
    "messages": lambda: json.dumps({"messages": [0] * 60_000}).encode(),
    "tools": lambda: json.dumps({"messages": [USER], "tools": [0] * 60_000}).encode(),
    "calls": lambda: json.dumps({"messages": [{"role": "assistant", "tool_calls": [0] * 60_000}]}).encode(),
}


@pytest.mark.parametrize("name", COSTLY)
def test_no_body_stops_other_requests(engine: Any, name: str) -> None:
    """Python's parser, which holds its lock, would stop them for seconds."""

    async def ask(app: Any) -> tuple[httpx2.Response, float]:
        transport, headers = httpx2.ASGITransport(app=app), {"Content-Type": "application/json"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            request = asyncio.ensure_future(client.post(CHAT, content=body, headers=headers))
            longest, last = 0.0, time.process_time()  # the machine may have other work
            while not request.done():
                assert (await client.get("/health")).status_code == 200
                longest, last = max(longest, time.process_time() - last), time.process_time()
            return await request, longest

    body, times = COSTLY[name](), list[float]()
    while len(times) < 5 and min(times, default=1.0) >= 1.0:  # other threads of this process may work, too
        answer, longest = asyncio.run(ask(application("small", engine, None, 64)))
        assert answer.status_code == 400, answer.text
        times.append(longest)
    assert min(times) < 1.0


def test_a_body_is_limited_by_the_context(app: Any) -> None:
    answer = answer_of(app, TEXT, {"prompt": "la " * 400_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "context_length_exceeded")


def test_a_fault_of_the_server(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        del engine.submit
        raise OSError("a secret")

    engine.submit = broken
    answer = answer_of(application("small", engine, None, 64), TEXT, {"prompt": "Due"})
    said = {"message": "The request failed; the server's log says why.", "type": "server_error"}
    assert (answer.status_code, answer.json()) == (500, {"error": said | {"param": None, "code": None}})
    assert "POST /v1/completions failed with OSError" in caplog.messages
