"""Requests to an application of ``moetier serve``, without a network."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "Ciao."}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def called(function: Any) -> list[Any]:
    """Messages in which it was."""
    call = {"id": "1", "type": "function", "function": function}
    return [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "3"}]


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
