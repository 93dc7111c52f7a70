"""The description of the server's routes, and routes of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
from http_servers import listening, serving
from readers import PATIENCE

USER = {"role": "user", "content": "Ciao."}


@pytest.fixture(scope="module")
def app(tinymix_4bit: Path) -> Iterator[Any]:
    with serving(tinymix_4bit, context=400) as (found, _):
        yield found


@pytest.fixture
def client(app: Any) -> Iterator[httpx2.Client]:
    with listening(app) as url, httpx2.Client(base_url=url, timeout=PATIENCE) as found:
        yield found


def references(part: Any) -> Iterator[str]:
    """All references in a part of a description."""
    if isinstance(part, dict):
        yield from [part["$ref"]] if "$ref" in part else []
        part = [*part.values()]
    for each in part if isinstance(part, list) else []:
        yield from references(each)


def test_a_description_has_all_routes_and_what_they_refer_to(client: httpx2.Client) -> None:
    description = client.get("/openapi.json").json()
    schemas = {f"#/components/schemas/{name}" for name in description["components"]["schemas"]}
    assert {*references(description)} <= schemas
    for path, methods in description["paths"].items():
        for method in methods:
            answer = client.request(method, path, json={} if method == "post" else None)
            assert answer.status_code == (400 if method == "post" else 200), path
    chat = description["components"]["schemas"]["ChatBody"]
    assert {"messages", "tools", "logit_bias", "n", "logprobs", "stream_options"} <= chat["properties"].keys()
    assert chat["required"] == ["messages"]


def test_a_text_becomes_tokens_and_tokens_a_text(client: httpx2.Client, app: Any) -> None:
    done = client.post("/tokenize", json={"prompt": "La mattina"}).json()
    assert (done["count"], done["max_model_len"]) == (len(done["tokens"]), 400)
    assert "La mattina" in client.post("/detokenize", json={"tokens": done["tokens"]}).json()["prompt"]
    usage = client.post("/v1/completions", json={"prompt": done["tokens"], "max_tokens": 1}).json()["usage"]
    assert usage["prompt_tokens"] == done["count"]
    chat = client.post("/tokenize", json={"messages": [USER]}).json()
    asked = client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1}).json()
    assert chat["count"] == asked["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [USER]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1 << 40]}),
    ],
)
def test_what_is_not_valid_is_refused(client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert client.post("/detokenize", json={"tokens": [(1 << 31) - 1, 99_999_999]}).json() == {"prompt": ""}
