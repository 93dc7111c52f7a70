"""Python clients, unchanged, that ask for answers of a given form.

``python structured_clients.py URL KEY CLIENT`` ends with an error if what the client parses is not of this form. The
model writes anything that the form allows.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MODEL, QUESTION, LIMIT = "agent", "Who was don Abbondio?", 600


class Address(BaseModel):
    """An address."""

    street: str = Field(max_length=12)
    number: int = Field(ge=1, le=99)


class Person(BaseModel):
    """Somebody in the novel."""

    name: str = Field(max_length=10)
    kind: Literal["monk", "priest"]
    addresses: list[Address] = Field(max_length=2)


class Fate(BaseModel):
    """Without limits of texts, which Anthropic's client leaves out of schemas."""

    kind: Literal["monk", "priest"]
    is_known: bool


class Anything(BaseModel):
    """Any JSON object."""

    model_config = ConfigDict(extra="allow")


def check(parsed: object, kind: type[BaseModel] = Person) -> None:
    if not isinstance(parsed, kind):
        raise SystemExit(f"{parsed!r} is no {kind.__name__}")


def ends_object(url: str, key: str) -> dict[str, float]:
    """Biases after which a JSON object ends soon."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"}
    done = httpx.post(f"{url.removesuffix('/v1')}/tokenize", json={"prompt": "}"}, headers=headers, timeout=300).json()
    return {str(token): 100.0 for token in done["tokens"][-1:]}


def openai(url: str, key: str) -> None:
    from openai import OpenAI, pydantic_function_tool

    client = OpenAI(base_url=url, api_key=key, max_retries=0)
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {"model": MODEL, "messages": said, "max_tokens": LIMIT, "seed": 1}
    check(client.chat.completions.parse(response_format=Person, **asked).choices[0].message.parsed)
    with client.chat.completions.stream(response_format=Person, **asked) as stream:
        check(stream.get_final_completion().choices[0].message.parsed)
    tools = [pydantic_function_tool(Person)]
    called = client.chat.completions.parse(tools=tools, tool_choice="required", parallel_tool_calls=False, **asked)
    (call,) = called.choices[0].message.tool_calls or ()
    check(call.function.parsed_arguments)
    check(client.responses.parse(model=MODEL, input=QUESTION, text_format=Person, store=False).output_parsed)
    scored = client.chat.completions.create(logprobs=True, top_logprobs=2, **asked | {"max_tokens": 3})
    content = scored.choices[0].logprobs.content
    if len(content) != 3 or any(len(each.top_logprobs) != 2 for each in content):
        raise SystemExit(f"{content}")


def anthropic(url: str, key: str) -> None:
    from anthropic import Anthropic

    client = Anthropic(base_url=url.removesuffix("/v1"), auth_token=key, max_retries=0)
    said: list[Any] = [{"role": "user", "content": QUESTION}]
    check(client.messages.parse(model=MODEL, max_tokens=LIMIT, messages=said, output_format=Fate).parsed_output, Fate)


def langchain(url: str, key: str) -> None:
    from langchain_openai import ChatOpenAI

    asked: dict[str, Any] = {"model": MODEL, "base_url": url, "api_key": key, "max_retries": 0, "max_tokens": LIMIT}
    model = ChatOpenAI(seed=1, **asked)
    for method in "json_schema", "function_calling":
        check(model.with_structured_output(Person, method=method).invoke(QUESTION))
    model = ChatOpenAI(seed=1, logit_bias=ends_object(url, key), **asked)
    check(model.with_structured_output(Anything, method="json_mode").invoke(f"{QUESTION} In JSON."), Anything)


CLIENTS = {each.__name__: each for each in (openai, anthropic, langchain)}

if __name__ == "__main__":
    CLIENTS[sys.argv[3]](*sys.argv[1:3])
