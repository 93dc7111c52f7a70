"""What the server says to requests that can't be answered, in this process; behind each of them it answers."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

import httpx2
from http_servers import application, serving
from readers import PATIENCE

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Ciao."}
HALF = "\ud800"  # of a character


@pytest.fixture(scope="module")
def app(tinymix_4bit: Path) -> Iterator[Any]:
    with serving(tinymix_4bit, context=400) as (found, _):
        answer_of(found, TEXT, {"prompt": "Uno"})  # whatever thread it needs is there now
        yield found


@pytest.fixture(scope="module")
def engine(tinymix_4bit: Path) -> Iterator[Any]:
    """With a context that limits no body."""
    with serving(tinymix_4bit, context=1 << 20) as (_, found):
        yield found


def with_template(engine: Any, template: Any) -> Any:
    """An application with this chat template."""
    engine.tokenizer.chat_template = template
    return application("small", engine, None, 64)


def answer_of(app: Any, path: str, body: dict[str, Any]) -> httpx2.Response:
    """Behind it an ordinary request is answered."""

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=app)
        headers = {"Content-Type": "application/json"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000", timeout=60) as client:
            found = await client.post(path, content=json.dumps({"max_tokens": 2} | body), headers=headers)
            other = await client.post(TEXT, json={"prompt": "Due", "max_tokens": 2})
        assert other.status_code == 200, other.text
        assert other.json()["usage"]["completion_tokens"] == 2
        return found

    return asyncio.run(ask())


def refused(app: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The error of a 400 in OpenAI's form."""
    answer = answer_of(app, path, body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return error


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


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_without_a_token(app: Any, stream: bool) -> None:
    error = refused(app, TEXT, {"prompt": "", "stream": stream})
    assert (error["message"], error["param"]) == ("prompt: the prompt has no tokens.", "prompt")


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-10, 1e-5])
def test_hardly_any_temperature(app: Any, temperature: float) -> None:
    answer = answer_of(app, TEXT, {"prompt": "Due", "temperature": temperature})
    assert answer.status_code == 200, answer.text
    if temperature < 1e-5:
        cold = answer_of(app, TEXT, {"prompt": "Due", "temperature": 0})
        assert answer.json()["choices"] == cold.json()["choices"]


def test_a_template_of_its_own(app: Any) -> None:
    for template in ("", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"):
        error = refused(app, CHAT, {"messages": [USER], "chat_template_kwargs": {"chat_template": template}})
        assert error["param"] == "chat_template_kwargs"


def deep(levels: int) -> Any:
    return json.loads("[" * levels + "]" * levels)


def called(function: Any) -> list[Any]:
    """Messages in which it was."""
    call = {"id": "1", "type": "function", "function": function}
    return [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "3"}]


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


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
WITH_TOOLS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
WITHOUT_TOOLS = "{{ messages[-1].content }}{% if not tools is defined %}{% set tools = none %}{% endif %}"


def test_tools_that_were_called(app: Any) -> None:
    for arguments in ('{"a": 1}', "{}", {"a": 1}, '{"a": 1, "b'):
        body = {"messages": called({"name": "f", "arguments": arguments})}
        assert answer_of(app, CHAT, body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_the_template_does_not_use(app: Any, stream: bool) -> None:
    error = refused(app, CHAT, {"messages": [USER], "tools": TOOLS, "stream": stream})
    assert (error["message"], error["param"]) == ("tools: the model's chat template does not support tools.", "tools")
    assert answer_of(app, CHAT, {"messages": [USER], "tools": []}).status_code == 200


@pytest.mark.parametrize(
    ("template", "status"),
    [
        (WITH_TOOLS, 200),
        (WITHOUT_TOOLS, 400),
        ({"default": WITHOUT_TOOLS, "tool_use": WITH_TOOLS}, 200),
        ({"default": WITHOUT_TOOLS}, 400),
    ],
)
def test_tools_are_for_templates_that_use_them(engine: Any, template: Any, status: int) -> None:
    app = with_template(engine, template)
    answer = answer_of(app, CHAT, {"messages": [USER], "tools": TOOLS})
    assert answer.status_code == status, answer.text
    assert answer_of(app, CHAT, {"messages": [USER]}).status_code == 200


def test_the_template_knows_how_much_to_reason(engine: Any) -> None:
    """Others ignore it, as text completions do."""
    template = "{{ 'a' + reasoning_effort }}{% if reasoning_effort == 'high' %}{{ 'a' + 5 }}{% endif %}"
    app = with_template(engine, template)
    assert answer_of(app, CHAT, {"messages": [USER], "reasoning_effort": "low"}).status_code == 200
    assert refused(app, CHAT, {"messages": [USER], "reasoning_effort": "high"})["param"] == "messages"


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


def test_a_template_that_does_not_like_what_it_is_given(engine: Any) -> None:
    app = with_template(engine, "{{ 'a' + budget }}")
    error = refused(app, CHAT, {"messages": [USER], "chat_template_kwargs": {"budget": 5}})
    assert error["message"].startswith("The model's chat template refuses these messages: can only concatenate str")


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


def test_a_prompt_beyond_the_models_own_context(tinymix_4bit: Path) -> None:
    """Both numbers are named, and whose the limit is."""
    for context, most, whose in (
        (2048, "2,048", "the model's maximum context"),
        (100, "100", "the context of this server (--context)"),
    ):
        with serving(tinymix_4bit, context=context) as (app, _):
            for prompt, tokens in ((" la" * 3005, "3,005"), (" la" * 300_000, f"more than {2 * context:,}")):
                said = refused(app, TEXT, {"prompt": prompt})
                if context == 100 and tokens == "3,005":
                    tokens = "more than 200"
                assert said["message"] == (
                    f"The prompt has {tokens} tokens, but {whose} is {most} for prompt and answer together."
                )
                assert (said["param"], said["code"]) == ("prompt", "context_length_exceeded")


def test_a_fault_of_the_server(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        del engine.submit
        raise OSError("a secret")

    engine.submit = broken
    answer = answer_of(application("small", engine, None, 64), TEXT, {"prompt": "Due"})
    said = {"message": "The request failed; the server's log says why.", "type": "server_error"}
    assert (answer.status_code, answer.json()) == (500, {"error": said | {"param": None, "code": None}})
    assert "POST /v1/completions failed with OSError" in caplog.messages
