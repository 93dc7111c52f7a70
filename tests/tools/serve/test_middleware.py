"""What stands before the server: by which names it is asked, in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2

from moetier.tools.serve.keys import Keys, RateLimits
from moetier.tools.serve.listen import bind, is_loopback, url_of
from moetier.tools.serve.middleware import AccessControl

PATH = "/v1/models"


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"served"})


def asked(key: str | None, **headers: str) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        keys = None if key is None else Keys.only(key)
        transport = httpx2.ASGITransport(app=AccessControl(behind, keys, RateLimits(lambda _: 0)))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.get(PATH, headers=headers)

    return asyncio.run(ask())


def test_what_is_no_request_is_passed_on() -> None:
    """The start and the end of a server have no Host header."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    control = AccessControl(app, Keys.only("key"), RateLimits(lambda _: 0))
    asyncio.run(control({"type": "lifespan"}, behind, behind))
    assert seen == [({"type": "lifespan"}, behind, behind)]


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1:80", "127.0.0.2:8000", "[::1]"])
def test_without_a_key_names_of_this_host_are_served(host: str) -> None:
    assert asked(None, Host=host).text == "served"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.10.20.30", "::1", "localhost"])
def test_without_a_key_it_is_served_where_it_says_that_it_is(host: str) -> None:
    with bind(host, 0) as bound:
        assert is_loopback(bound)
        assert asked(None, Host=url_of(bound).removeprefix("http://")).text == "served"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "localhost:8000.evil.example",
        "evil.example:127",
        "127.0.0.1.evil.example",
        "",
    ],
)
def test_without_a_key_other_names_are_refused_as_openai_does(host: str) -> None:
    answer = asked(None, Host=host)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_host")
    assert "--api-key-file" in error["message"]


def test_with_a_key_any_name_will_do() -> None:
    assert asked("secret", Host="big-host.example", Authorization="Bearer secret").text == "served"
    assert asked("secret", Host="localhost").status_code == 401


def test_anthropics_header_for_the_key_will_do() -> None:
    assert asked("secret", **{"x-api-key": "secret"}).text == "served"
    assert asked("secret", **{"x-api-key": "secret", "Authorization": "Bearer another"}).text == "served"
    assert asked("secret", **{"x-api-key": "another"}).status_code == 401
