"""Each field of each route changes something of an answer. What would change an answer, and is no field, is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import answering, listening, scripted_client, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import PATIENCE
from tokenizers.processors import TemplateProcessing

import moetier
from moetier.tools.serve.app import BODIES
from moetier.tools.serve.protocols.body import MEANINGFUL, QueryBody, checked
from moetier.tools.serve.protocols.refusal import Refusal

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
COUNT, TOKENIZE, DETOKENIZE = "/v1/messages/count_tokens", "/tokenize", "/detokenize"
# all that it may know of a request is in the prompt
TELLING = (
    "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{{ reasoning_effort }} {{ 'reasons' if enable_thinking }} {{ more }}{% if add_generation_prompt %}\nA {% endif %}"
)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
RESPONSES_TOOLS = [{"type": "function", **FUNCTION}]
MESSAGES_TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
LOGPROBS = ["message.output_text.logprobs"]

BASE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": said("Ciao"), "max_tokens": 6, "temperature": 1, "seed": 1},
    TEXT: {"prompt": "La mattina", "max_tokens": 6, "temperature": 1, "seed": 1},
    RESPONSES: {"input": "Ciao", "max_output_tokens": 6, "temperature": 1, "seed": 1},
    MESSAGES: {"messages": said("Ciao"), "max_tokens": 6, "temperature": 1, "seed": 1},
    COUNT: {"messages": said("Ciao")},
    TOKENIZE: {"prompt": "Ciao"},
    DETOKENIZE: {"tokens": [10, 20]},
}
Effects = dict[str, tuple[dict[str, Any], Any]]  # by field: what is changed of the base, and another value of the field
ANY: Effects = {"model": ({}, "other")}
SAMPLING: Effects = {
    "stream": ({}, True),
    "temperature": ({}, 0),
    "top_p": ({}, 1e-6),
    "top_k": ({}, 1),
    "min_p": ({}, 1),
    "repetition_penalty": ({}, 0.01),
    "presence_penalty": ({}, -2),
    "frequency_penalty": ({}, -2),
    "seed": ({}, 2),
}
OPENAI: Effects = {
    "max_tokens": ({}, 3),
    "n": ({}, 2),
    "logit_bias": ({}, {"50": 100}),
    "stop": ({}, [" ", "a"]),
    "stream_options": ({"stream": True}, {"include_usage": True}),
    "response_format": ({}, {"type": "json_object"}),
    "structured_outputs": ({}, {"regex": "x"}),
}
TEMPLATES: Effects = {"tools": ({}, TOOLS), "chat_template_kwargs": ({}, {"more": "x"})}
ANTHROPIC: Effects = {
    "messages": ({}, said("Addio")),
    "system": ({}, "Si dice"),
    "tools": ({}, MESSAGES_TOOLS),
    "tool_choice": ({"tools": MESSAGES_TOOLS}, {"type": "none"}),
    "thinking": ({}, {"type": "enabled"}),
    "output_config": ({}, {"effort": "high"}),
}
EFFECTS: dict[str, Effects] = {
    CHAT: ANY | SAMPLING | OPENAI | TEMPLATES | {
        "messages": ({}, said("Addio")),
        "max_completion_tokens": ({}, 3),
        "tool_choice": ({"tools": TOOLS}, "none"),
        "logprobs": ({}, True),
        "top_logprobs": ({"logprobs": True}, 2),
        "reasoning_effort": ({}, "high"),
        "reasoning": ({}, {"effort": "high"}),
        "thinking": ({}, {"type": "enabled"}),
        "enable_thinking": ({}, True),
    },
    TEXT: ANY | SAMPLING | OPENAI | {"prompt": ({}, "Lucia"), "echo": ({}, True), "logprobs": ({}, 1)},
    RESPONSES: ANY | SAMPLING | {
        "input": ({}, "Addio"),
        "instructions": ({}, "Si dice"),
        "max_output_tokens": ({}, 3),
        "tools": ({}, RESPONSES_TOOLS),
        "tool_choice": ({"tools": RESPONSES_TOOLS}, "none"),
        "reasoning": ({}, {"effort": "high"}),
        "text": ({}, {"format": {"type": "json_object"}}),
        "include": ({}, LOGPROBS),
        "top_logprobs": ({"include": LOGPROBS}, 2),
        "store": ({}, True),
        "previous_response_id": ({}, "x"),
        "conversation": ({}, "x"),
    },
    MESSAGES: ANY | SAMPLING | ANTHROPIC | {"max_tokens": ({}, 3), "stop_sequences": ({}, [" ", "a"])},
    COUNT: ANY | ANTHROPIC,
    TOKENIZE: ANY | {
        "prompt": ({}, "Addio"),
        "add_special_tokens": ({}, False),
        "messages": ({"prompt": None, "messages": said("Ciao")}, said("Addio")),
    } | {field: ({"prompt": None, "messages": said("Ciao")}, value) for field, (_, value) in TEMPLATES.items()},
    DETOKENIZE: ANY | {"tokens": ({}, [30])},
}  # fmt: skip
OF_CALLS = {"parallel_tool_calls": {CHAT, RESPONSES}}  # fields of which an answer must have calls


def test_the_fields_are_all() -> None:
    for path, body in BODIES.items():
        of_calls = {field for field, paths in OF_CALLS.items() if path in paths}
        assert body.model_fields.keys() == EFFECTS[path].keys() | of_calls, path


VARYING = {"id", "created", "created_at", "cached_tokens", "cache_read_input_tokens"}  # differs each time
REPEATED = {  # the request, in the object of a response
    *("instructions", "max_output_tokens", "tools", "tool_choice", "reasoning", "temperature", "top_p", "top_logprobs"),
}


def shown(value: Any) -> Any:
    """Return the parts of an answer that depend on its request alone and do not repeat it."""
    if isinstance(value, dict):
        varying = VARYING | ({"input_tokens"} if "cache_read_input_tokens" in value else set())
        varying |= REPEATED if value.get("object") == "response" else set()
        return {name: shown(each) for name, each in value.items() if name not in varying}
    return [shown(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Served:
    client: httpx2.Client
    answers: dict[str, Any]  # by the request

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        asked = f"{path} {body}"
        if asked not in self.answers:
            answer = self.client.post(path, json=body)
            data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
            is_stream = answer.headers["content-type"].startswith("text/event-stream")
            self.answers[asked] = [shown(json.loads(each)) for each in data] if is_stream else shown(answer.json())
        return self.answers[asked]


@pytest.fixture(scope="module")
def served(tinymix_4bit: Path) -> Iterator[Served]:
    with serving(tinymix_4bit, context=400, template=TELLING) as (app, service):
        service.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", service.tokenizer.convert_tokens_to_ids("<s>"))]
        )
        headers = {"Connection": "close"}  # between tests none is open
        with listening(app) as url, httpx2.Client(base_url=url, timeout=PATIENCE, headers=headers) as client:
            client.get("/health")  # whatever thread it needs is there now
            yield Served(client, {})


@pytest.mark.parametrize(("path", "field"), [(path, field) for path, effects in EFFECTS.items() for field in effects])
def test_a_field_has_an_effect(served: Served, path: str, field: str) -> None:
    more, value = EFFECTS[path][field]
    body = BASE[path] | more
    assert served.ask(path, body | {field: value}) != served.ask(path, body)


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, MESSAGES])
def test_the_same_request_has_the_same_answer(served: Served, path: str) -> None:
    """So it is a field that changes it."""
    assert Served(served.client, {}).ask(path, BASE[path]) == served.ask(path, BASE[path])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = scripted.write_checkpoint(tmp_path_factory.mktemp("scripted"), "qwen3_moe")
    model, tokenizer = moetier.load(folder, daemon=None)
    with model.tiers, answering(model, tokenizer, context=400, chunk=64) as answers:
        yield answers


@pytest.mark.parametrize(("path", "tools"), [(CHAT, TOOLS), (RESPONSES, RESPONSES_TOOLS)])
def test_one_call_is_all_if_they_may_not_be_parallel(service: Any, path: str, tools: Any) -> None:
    with scripted_client(service, scripted.TWICE) as client:
        body = {name: value for name, value in BASE[path].items() if "max" not in name} | {"tools": tools}
        answers = [client.post(path, json=body | {"parallel_tool_calls": may}).text for may in (True, False)]
    assert [len(re.findall(r'"arguments": ?"', answer)) for answer in answers] == [2, 1]


OF_TEXTS = {path: body for path, body in BODIES.items() if issubclass(body, QueryBody)}


@pytest.mark.parametrize("path", OF_TEXTS)
def test_what_would_change_an_answer_is_refused(path: str) -> None:
    body = OF_TEXTS[path]
    for name in MEANINGFUL - body.model_fields.keys():
        for value in (["odd"], 5):
            with pytest.raises(Refusal) as refused:
                checked(BASE[path] | {name: value}, body)
            assert (refused.value.status_code, refused.value.param) == (400, name)
        for value in [body.neutral[name]] if name in body.neutral else ["", []]:
            checked(BASE[path] | {name: value}, body)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TOKENIZE, {"tools": TOOLS}, "tools"),
        (TOKENIZE, {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        (TOKENIZE, {"add_generation_prompt": False}, "add_generation_prompt"),
        (TOKENIZE, {"prompt": None, "messages": said("?"), "add_special_tokens": True}, "add_special_tokens"),
        (CHAT, {"reasoning": {"exclude": True}}, "reasoning"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (RESPONSES, {"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_what_has_no_effect_beside_others_is_refused(
    served: Served, path: str, body: dict[str, Any], param: str
) -> None:
    error = served.ask(path, BASE[path] | body)["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


# any value in any field, those of other fields among them
VALUES = st.sampled_from([value for effects in EFFECTS.values() for _, value in effects.values()])
JSON = st.recursive(
    VALUES | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=5), parts, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("path", EFFECTS)
def test_no_request_is_a_fault_of_the_server(served: Served, path: str) -> None:
    costly = {"max_tokens", "max_output_tokens", "max_completion_tokens", "n"}
    own, others = (st.sampled_from(sorted(names - costly)) for names in (EFFECTS[path].keys(), MEANINGFUL))

    @settings(derandomize=True, max_examples=25)
    @given(st.dictionaries(own | others, JSON, min_size=1, max_size=3))
    def ask(fields: dict[str, Any]) -> None:
        answer = served.client.post(path, content=json.dumps(short | fields))  # "Infinity" among it
        answered.append(answer.status_code)
        assert answer.status_code < 500, answer.text

    short = BASE[path] | {name: 3 for name in BASE[path] if name.startswith("max_")}
    answered = list[int]()
    ask()
    assert {200, 400} <= {*answered}
