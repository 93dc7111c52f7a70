"""Sessions in the shapes in which agents send them, with fillers for their texts: only what is new is computed.

tests/clients has the agents themselves.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
from agent_model import write_model
from http_servers import answering, application, listening
from readers import PATIENCE
from recorded_requests import events_of, usage_in
from scripted_server import Script, scripted

import moetier
from moetier.runtime.engine.model_runner import ModelRunner
from moetier.tools.serve.constraints import Constraints

SYSTEM = "You are a filler. " * 30
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {"path": {"type": "string", "description": "A filler."}},
    "required": ["path"],
    "additionalProperties": False,
}
CACHED = {"cache_control": {"type": "ephemeral"}}
MARK, LIMIT = "[session]", 120


class Agent(ABC):
    """An agent: what it sends, and what it keeps of answers. ``items`` is the conversation in its API's form."""

    path: str
    fields: ClassVar[dict[str, Any]]  # of each request

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The next request."""

    @abstractmethod
    def tell(self, text: str) -> None:
        """Add a message of the user."""

    @abstractmethod
    def take(self, events: list[dict[str, Any]]) -> list[str]:
        """Add the answer in a stream. Return the ids of its calls."""

    @abstractmethod
    def give(self, results: dict[str, str]) -> None:
        """Add results of calls by their ids."""


class OpenCode(Agent):
    path = "/v1/chat/completions"
    role, nothing = "system", ""  # of the first message; the content of an answer that has none
    fields: ClassVar = {"max_tokens": LIMIT, "tool_choice": "auto"}

    def body(self) -> dict[str, Any]:
        function = {"name": "read", "description": "A filler.", "parameters": SCHEMA}
        first = {"role": self.role, "content": SYSTEM}
        tools = [{"type": "function", "function": function}]
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return {"messages": [first, *self.items], "tools": tools, **options, **self.fields}

    def tell(self, text: str) -> None:
        self.items.append({"role": "user", "content": text})

    def take(self, events: list[dict[str, Any]]) -> list[str]:
        deltas = [choice["delta"] for event in events for choice in event["choices"]]
        text, thought = (
            "".join(delta.get(name) or "" for delta in deltas) for name in ("content", "reasoning_content")
        )
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        message = {"role": "assistant", "content": self.text(text) or self.nothing}
        if thought:
            message["reasoning_content"] = self.text(thought)
        if calls:
            message["tool_calls"] = [self.call(call) for call in calls]
        self.items.append(message)
        return [call["id"] for call in calls]

    def give(self, results: dict[str, str]) -> None:
        for call, text in results.items():
            self.items.append({"role": "tool", "tool_call_id": call, "content": self.content(text)})

    def text(self, text: str) -> str:
        return text

    def content(self, text: str) -> Any:
        return text

    def call(self, call: dict[str, Any]) -> dict[str, Any]:
        """A call whose arguments are written anew."""
        function = call["function"]
        arguments = json.dumps(json.loads(function["arguments"]), separators=(",", ":"), ensure_ascii=False)
        return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


class Pi(OpenCode):
    role, nothing = "developer", None  # type: ignore[assignment]
    fields: ClassVar = {"max_completion_tokens": LIMIT, "store": False, "reasoning_effort": "medium"}

    def tell(self, text: str) -> None:
        self.items.append({"role": "user", "content": [{"type": "text", "text": text}]})


class Qwen(Pi):
    role = "system"
    fields: ClassVar = {"max_tokens": LIMIT}

    def text(self, text: str) -> str:
        return text.strip()

    def content(self, text: str) -> Any:
        return [{"type": "text", "text": text}]


class Claude(Agent):
    path = "/v1/messages?beta=true"
    fields: ClassVar = {
        "max_tokens": LIMIT,
        "metadata": {"user_id": '{"device_id":"0"}'},
        "thinking": {"type": "adaptive", "display": "omitted"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }

    def body(self) -> dict[str, Any]:
        system = [{"type": "text", "text": "x-filler: 1;"}, {"type": "text", "text": SYSTEM, **CACHED}]
        tools = [{"name": "Read", "description": "A filler.", "input_schema": SCHEMA}]
        *before, last = self.items
        marked = [*last["content"][:-1], last["content"][-1] | CACHED]  # always the last one
        return {"messages": [*before, last | {"content": marked}], "system": system, "tools": tools, **self.fields}

    def tell(self, text: str) -> None:
        reminder = [] if self.items else [{"type": "text", "text": "<system-reminder>\nFiller.\n</system-reminder>"}]
        self.items.append({"role": "user", "content": [*reminder, {"type": "text", "text": text}]})
        if reminder:
            self.items.append({"role": "system", "content": [{"type": "text", "text": "# Environment\nFiller."}]})

    def take(self, events: list[dict[str, Any]]) -> list[str]:
        blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        for event in events:
            if event["type"] == "content_block_delta":
                block = blocks[event["index"]]
                match event["delta"]:
                    case {"type": "input_json_delta", "partial_json": text}:
                        block["input"] = json.loads(text)
                    case {"type": "signature_delta", "signature": text}:
                        block["signature"] = text
                    case {"type": kind, **delta}:
                        name = kind.removesuffix("_delta")
                        block[name] += delta[name]
        self.items.append({"role": "assistant", "content": blocks})
        return [block["id"] for block in blocks if block["type"] == "tool_use"]

    def give(self, results: dict[str, str]) -> None:
        self.items.append(
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": call, "content": text, "is_error": False}
                    for call, text in results.items()
                ],
            }
        )


class Codex(Agent):
    path = "/v1/responses"
    fields: ClassVar = {
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0",
        "client_metadata": {"session_id": "0"},
        "max_output_tokens": LIMIT,  # Codex gives none
    }

    def body(self) -> dict[str, Any]:
        function = {"type": "function", "name": "read", "description": "d", "strict": False, "parameters": SCHEMA}
        space = {"type": "namespace", "name": "agents", "description": "A filler.", "tools": [function]}
        rules = [self._message("developer", text) for text in (SYSTEM, "<filler>\nx\n</filler>")]
        tools = [function, space, {"type": "web_search", "external_web_access": True}]
        return {"input": [*rules, *self.items], "tools": tools, **self.fields}

    def tell(self, text: str) -> None:
        self.items.append(self._message("user", text))

    def take(self, events: list[dict[str, Any]]) -> list[str]:
        items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        self.items += items
        return [item["call_id"] for item in items if item["type"] == "function_call"]

    def give(self, results: dict[str, str]) -> None:
        for call, text in results.items():
            self.items.append({"type": "function_call_output", "id": "fco_0", "call_id": call, "output": text})

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"type": "input_text", "text": text}]}


def call(name: str) -> str:
    return f'<tool_call>\n{{"name": "{name}",  "arguments": {{"path": "è \\"<b>\\" \\\\"}}}}\n</tool_call>'


SAID = [  # for each message of the user
    [f"<think>\nHm.\n</think>\n\nI look.\n{call('read')}", f"Two.\n{call('read')}\n{call('read')}", "Done."],
    [call("read"), 'A bad call: <tool_call>\n{"name": "read", "arguments": {"a": }\n</tool_call>'],
    [call("read"), "It is cut: " + "words " * LIMIT],
    [call("agents.read"), "<think>\nOnce more.\n</think>\n\n" + call("read"), "Done."],
    ["The end."],
]


@pytest.fixture(scope="module")
def served(tinymix: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Script]]:
    """A service whose answers are SAID, and its script."""
    model, tokenizer = moetier.load(write_model(tmp_path_factory.mktemp("agents") / "model", tinymix), daemon=None)
    said = [text for turn in SAID for text in turn]
    script = Script({"sessions": {MARK: said}, "side": "A title", "end": ""}, tokenizer)
    with (
        pytest.MonkeyPatch.context() as patch,
        model.tiers,
        answering(model, tokenizer, context=4096, chunk=512, parallel=2) as service,
    ):
        patch.setattr(ModelRunner, "run", scripted(ModelRunner.run, script))
        # as for a model whose calls are not known: otherwise none can be malformed
        patch.setattr(Constraints, "of_dialogue", lambda *_, **__: None)
        yield service, script


@pytest.mark.parametrize(
    "kind", [OpenCode, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (Pi, Qwen)), Claude, Codex]
)
def test_only_what_is_new_is_computed(kind: type[Agent], served: tuple[Any, Script]) -> None:
    """After a message of the user the template drops the reasoning of answers to the one before, and only that."""
    service, script = served
    agent, results = kind(), list[str]()
    computed, dropped = 1, None  # tokens of the last prompt and its answer; of the first prompt before reasoning
    with (
        listening(application("small", service, None, 8)) as url,
        httpx2.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        for turn in SAID:
            agent.tell(f"{MARK} Go on.")
            for number, text in enumerate(turn):
                answer = client.post(agent.path, json=agent.body())
                assert answer.status_code == 200, answer.text
                assert all(result in script.prompts[-1] for result in results)
                usage = usage_in(answer.text)
                # the last token was sampled, but not computed; that of a line's end may be one with what follows
                assert usage.cached >= (computed - 1 if number or dropped is None else dropped - 2)
                computed = usage.prompt + usage.new
                dropped = None if number == 0 else dropped
                if text.startswith("<think>") and dropped is None:
                    dropped = usage.prompt
                calls = agent.take(events_of(answer.text))
                assert len(calls) == text.count("</tool_call>") * ('": }' not in text)
                new = {each: f"Result {len(results) + place}." for place, each in enumerate(calls)}
                agent.give(new)
                results += new.values()
            client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": f"A title? {MARK}"}]})
