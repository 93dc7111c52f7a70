"""The page's files as a browser gets them. tests/clients/test_page.py has the page in a browser."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

import httpx2
from starlette.applications import Starlette

from moetier.tools.serve.keys import Keys, RateLimits
from moetier.tools.serve.middleware import AccessControl
from moetier.tools.serve.page import FILES, page_routes


def ask(path: str, method: str = "GET", key: str | None = None, **headers: str) -> httpx2.Response:
    async def answer() -> httpx2.Response:
        keys = None if key is None else Keys.only(key)
        app = AccessControl(Starlette(routes=[*page_routes()]), keys, RateLimits(lambda _: 0))
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(answer())


def policy_of(answer: httpx2.Response) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in answer.headers["content-security-policy"].split(";"))
    return {name: value for name, _, value in parts}


@pytest.mark.parametrize("path", FILES)
def test_a_file_comes_with_its_type_and_the_policy(path: str) -> None:
    answer = ask(path)
    assert (answer.status_code, answer.content) == (200, FILES[path].read_bytes())
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    assert answer.headers["content-type"].partition(";")[0] == types[FILES[path].suffix]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    policy = policy_of(answer)
    assert policy["default-src"] == "'none'"
    assert {policy[f"{what}-src"] for what in ("script", "style", "connect", "img")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"


def test_a_file_that_has_not_changed_is_not_sent_again() -> None:
    tag = ask("/").headers["etag"]
    same = ask("/", **{"If-None-Match": f'"other", W/{tag}'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert ask("/", **{"If-None-Match": '"other"'}).status_code == 200


def test_the_files_need_no_key_and_nothing_else_is_a_file() -> None:
    for path in FILES:
        for method in ("GET", "HEAD"):
            assert ask(path, method, key="secret").status_code == 200
    assert ask("/", "POST", key="secret").status_code == 401
    for path in ("/page/../page.py", "/page/%2e%2e/page.py", "/page/", "/page/index.html"):
        assert ask(path, key="secret").status_code == 401
        assert ask(path).status_code == 404


def texts(suffix: str) -> Iterator[tuple[str, str]]:
    yield from ((path.name, path.read_text()) for path in FILES.values() if path.suffix == suffix)


def test_nothing_in_the_files_comes_from_elsewhere_or_makes_markup_of_text() -> None:
    ((_, page),) = texts(".html")
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|<script(?![^>]*\ssrc=)", page)
    loaded = re.findall(r"\s(?:src|href)=\"([^\"]*)\"", page)
    assert {f"/{path}" for path in loaded} <= set(FILES)
    for name, text in texts(".css"):
        assert not re.search(r"url\(|@import|https?:", text), name
    for name, text in texts(".js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text), name
        imported = re.findall(r"from \"\./(.*?)\"", text)
        assert {f"/page/{each}" for each in imported} <= set(FILES), name
        assert not re.search(r"[\"'`]https?://[\w{]", text.replace('"https://".length', "")), name
