"""What the server says to requests that can't be answered, in this process; behind each of them it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("fastapi", reason='pip install ".[serve]"')

import httpx2
from http_servers import serving

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Ciao."}


@pytest.fixture(scope="module", params=["one by one", "together"])
def app(request: pytest.FixtureRequest, tinymix_4bit: Path) -> Iterator[Any]:
    with serving(tinymix_4bit, context=400, together=request.param == "together") as (found, _):
        answer_of(found, TEXT, {"prompt": "Uno"})  # whatever thread it needs is there now
        yield found


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


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_without_a_token(app: Any, stream: bool) -> None:
    error = refused(app, TEXT, {"prompt": "", "stream": stream})
    assert (error["message"], error["param"]) == ("prompt: there is not one token in it.", "prompt")


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
