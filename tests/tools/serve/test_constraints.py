"""An answer has the form that its request demands, whatever the model would write. Reasoning may come before it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

pytest.importorskip("uvicorn", reason='pip install ".[serve]"')
pytest.importorskip("llguidance", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import answering, application, listening, serving
from openai import OpenAI
from pydantic import BaseModel, Field
from readers import PATIENCE

import moetier
from moetier.tools.serve import constraints
from moetier.tools.serve.parsing import form_of

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "?"}
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Lecco", "Monza"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}


def tool(name: str, parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [tool("weather", PLACE), tool("stop", NOTHING)]


@dataclass(frozen=True)
class Ask:
    """Asks a server of a scripted model."""

    kind: str
    client: httpx2.Client

    def __call__(self, start: str, path: str = CHAT, **fields: Any) -> httpx2.Response:
        """``start`` chooses what the model would write."""
        body: dict[str, Any] = {"temperature": 1, "seed": 3}
        if path != RESPONSES:
            body |= {"max_tokens": 300}
        if path in (CHAT, MESSAGES):
            body |= {"messages": [USER]}
        if path == CHAT:
            body |= {"chat_template_kwargs": {"start": start}}
        return self.client.post(path, json=body | fields)


@pytest.fixture(scope="module")
def ask(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    folder = scripted.write_checkpoint(tmp_path_factory.mktemp("scripted") / "model", request.param)
    model, tokenizer = moetier.load(folder, daemon=None)
    assert tokenizer is not None
    # tools as a number: a token is a letter, and the context is short
    tokenizer.chat_template = scripted.own_template(request.param).replace("tools | tojson", "tools | length")
    with (
        model.tiers,
        answering(model, tokenizer, context=500, chunk=64) as service,
        listening(application("small", service, None, 8)) as url,
        httpx2.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        ask = Ask(request.param, client)
        ask(scripted.MAIN, max_tokens=1)  # its threads are there now
        yield ask


def message_of(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    message: dict[str, Any] = choice["message"]
    return {"content": message["content"], "reasoning": message.get("reasoning_content")} | {
        "calls": [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in message.get("tool_calls", ())
        ],
        "reason": choice["finish_reason"],
    }


def is_place(value: Any) -> bool:
    return [*value] == ["city", "days"] and value["city"] in ("Lecco", "Monza") and value["days"] in range(1, 10)


KINDS = ["qwen3_moe", "qwen3_5_moe_text", "mixtral"]
of_each_kind = pytest.mark.parametrize(
    "ask", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])], indirect=True
)
of_one_kind = pytest.mark.parametrize("ask", KINDS[:1], indirect=True)


@of_each_kind
def test_arguments_of_a_call_are_as_its_schema_says(ask: Ask) -> None:
    """The model would call f, with other arguments. Nothing is demanded of the text before the call."""
    found = message_of(ask(scripted.TOOL, tools=TOOLS, parallel_tool_calls=False))
    assert found["content"].strip() == "Ecco:"
    ((name, arguments),) = found["calls"]
    assert is_place(arguments) if name == "weather" else (name, arguments) == ("stop", {})


@of_each_kind
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_calls_are_demanded(ask: Ask, seed: int) -> None:
    """The model would think, and say something. It may think."""
    any_of_them = message_of(ask(scripted.MAIN, tools=TOOLS, tool_choice="required", seed=seed))
    assert any_of_them["reasoning"] == "Penso"
    assert any_of_them["content"].strip() == ""
    for name, arguments in any_of_them["calls"]:
        assert is_place(arguments) if name == "weather" else (name, arguments) == ("stop", {})
    assert any_of_them["reason"] == "tool_calls"
    named = {"type": "function", "function": {"name": "weather"}}
    ((name, arguments),) = message_of(ask(scripted.LOOP, tools=TOOLS, tool_choice=named, seed=seed))["calls"]
    assert name == "weather"
    assert is_place(arguments)


@of_each_kind
def test_text_of_a_given_form_follows_the_reasoning(ask: Ask) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE, "strict": True}}
    found = message_of(ask(scripted.MAIN, response_format=schema))
    assert (found["reasoning"], found["calls"], found["reason"]) == ("Penso", [], "stop")
    assert is_place(json.loads(found["content"]))
    think, thought = scripted.FORMS[ask.kind][2:4]
    within = message_of(ask(f"{think}{scripted.GOES_ON}", response_format=schema))  # the prompt begins the reasoning
    assert within["reasoning"] == "Ancora"
    assert is_place(json.loads(within["content"]))
    ended = message_of(ask(f"{think}\n\n{thought}\n\n{scripted.LOOP}", response_format=schema))
    assert ended["reasoning"] is None
    assert is_place(json.loads(ended["content"]))
    both = message_of(ask(scripted.LOOP, response_format=schema, tools=TOOLS))
    assert both["calls"] or is_place(json.loads(both["content"]))


@of_one_kind
def test_an_object_and_a_limit(ask: Ask) -> None:
    for seed in range(3):
        found = message_of(ask(scripted.LOOP, response_format={"type": "json_object"}, seed=seed))
        assert found["content"].startswith("{")
        if found["reason"] == "stop":
            assert isinstance(json.loads(found["content"]), dict)
    cut = message_of(ask(scripted.LOOP, response_format={"type": "json_object"}, max_tokens=1))
    assert cut["content"].startswith("{")
    assert cut["reason"] == "length"
    assert message_of(ask(scripted.LOOP, response_format={"type": "text"}, max_tokens=3))["content"] == "xxx"


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": "[a-f]{3}/[0-9]"}, "[a-f]{3}/[0-9]"),
        ({"choice": ["a.c", "Lecco"]}, r"a\.c|Lecco"),
        ({"grammar": 'start: "(" start ")" | "x"'}, r"(\(+)?x(\)+)?"),
        ({"json": {"const": [1]}}, r"\[\s*1\s*\]"),
    ],
)
@of_one_kind
def test_outputs_in_the_form_of_vllm(ask: Ask, outputs: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, message_of(ask(scripted.LOOP, structured_outputs=outputs))["content"])
    answer = ask("", TEXT, prompt=scripted.LOOP, structured_outputs=outputs)
    assert re.fullmatch(pattern, answer.json()["choices"][0]["text"])


@of_one_kind
def test_tools_whose_schema_is_not_known(ask: Ask) -> None:
    """Unknown keywords are ignored; a schema that can't be used allows any arguments, unless it is strict."""
    unique = {
        "type": "object",
        "properties": {"a": {"type": "array", "maxItems": 0, "uniqueItems": True}},
        "required": ["a"],
    }
    bad = {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}
    ((_, arguments),) = message_of(ask(scripted.TOOL, tools=[tool("f", unique | {"additionalProperties": False})]))[
        "calls"
    ]
    assert arguments == {"a": []}
    assert message_of(ask(scripted.TOOL, tools=[tool("f", bad)]))["calls"] == [("f", {"a": 1})]
    for schema, said in (unique, "uniqueItems"), (bad, "does not exist"):
        answer = ask(scripted.TOOL, tools=[tool("g", NOTHING), tool("f", schema, strict=True)])
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("tools: f: llguidance can't use the grammar: ")
        assert said in answer.json()["error"]["message"]


@of_one_kind
def test_of_very_many_tools_schemas_are_not_tried_one_by_one(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "MAX_TRIED", 2)
    bad = tool("bad", {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}})
    nothing = [tool(name, NOTHING) for name in "fgh"]
    strict = [tool(name, NOTHING, strict=True) for name in "fgh"]
    assert message_of(ask(scripted.TOOL, tools=[bad, *nothing]))["calls"] == [("f", {"a": 1})]
    assert message_of(ask(scripted.TOOL, tools=[bad, *strict[:2]]))["calls"] == [("f", {})]
    answer = ask(scripted.TOOL, tools=[bad, *strict])
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("tools: more than 2 functions are strict, and can't be")


@pytest.mark.parametrize(
    "parameters",
    [{"properties": 5, "required": "x"}, {"properties": {"a": 5, "b": {"type": [5, {}]}}, "required": [[]]}],
)
@of_each_kind
def test_tools_that_make_no_sense(ask: Ask, parameters: Any) -> None:
    message_of(ask(scripted.TOOL, tools=[tool("f", parameters), tool('\0"/\\\n<é', NOTHING)], max_tokens=20))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice: the function"),
        ({"tool_choice": "required"}, "tool_choice: the function that must be called is not in tools."),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format: llguidance can't use the grammar: Unimplemented keys",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs: response_format says already",
        ),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs: The grammar is too large"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs: llguidance can't use the grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs: give one of"),
        ({"structured_outputs": {"grammar": 'start: %json {"multipleOf": 999983}'}}, "structured_outputs: "),
    ],
)
@of_one_kind
def test_what_cannot_be_demanded(ask: Ask, fields: dict[str, Any], said: str) -> None:
    answer = ask(scripted.MAIN, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"].startswith(said)
    assert answer.json()["error"]["param"] == said.partition(":")[0]


@pytest.mark.parametrize("ask", ["gemma4", "olmoe"], indirect=True)
def test_calls_in_an_unknown_syntax_cannot_be_demanded(ask: Ask) -> None:
    answer = ask(scripted.TOOL, tools=TOOLS, tool_choice="required")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("tool_choice: it is not known how this model writes")
    assert ask(scripted.TOOL, tools=TOOLS, max_tokens=20).status_code == 200


@of_one_kind
def test_other_protocols(ask: Ask) -> None:
    tools = [{"type": "function", "name": "weather", "parameters": PLACE}]

    def responded(**fields: Any) -> Any:
        body = {"input": "?", "max_output_tokens": 200, "temperature": 1, "seed": 1}
        answer = ask("", RESPONSES, **body | fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    for choice in "required", {"type": "function", "name": "weather"}:
        answer = responded(tools=tools, tool_choice=choice)
        calls = [item for item in answer["output"] if item["type"] == "function_call"]
        assert calls
        assert all(is_place(json.loads(call["arguments"])) for call in calls)
        assert answer["tool_choice"] == choice
    answer = responded(text={"format": {"type": "json_schema", "name": "place", "schema": PLACE}})
    (text,) = [part["text"] for item in answer["output"] if item["type"] == "message" for part in item["content"]]
    assert is_place(json.loads(text))
    assert answer["text"]["format"]["schema"] == PLACE

    def messaged(**fields: Any) -> Any:
        answer = ask("", MESSAGES, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["content"]

    tools = [{"name": "weather", "input_schema": PLACE}]
    for choice in {"type": "any"}, {"type": "tool", "name": "weather"}:
        used = [block for block in messaged(tools=tools, tool_choice=choice) if block["type"] == "tool_use"]
        assert used
        assert all(is_place(block["input"]) for block in used)
    (text,) = [
        block["text"]
        for block in messaged(output_config={"format": {"type": "json_schema", "schema": PLACE}})
        if block["type"] == "text"
    ]
    assert is_place(json.loads(text))


def test_marks_in_text_of_a_given_form_are_text() -> None:
    form = form_of(SimpleNamespace(config=SimpleNamespace(model_type="qwen3_moe")), scripted.tokenizer_of("qwen3_moe"))
    assert form is not None
    for before in "", "<think>x</think>\n\n":
        parser = form.parser("", TOOLS, is_formed=True)
        answer = '{"a": "<think>y</think><tool_call>"}'
        parts = [part for letter in before + answer for part in parser.feed(letter)] + parser.finish()
        assert "".join(part for part in parts if type(part) is str).strip() == answer


# -- the SDK with a model that writes anything -------------------------------------------------------------------------


class Person(BaseModel):
    """A model of pydantic whose schema has references, options, lists and limits."""

    class Address(BaseModel):
        street: str = Field(max_length=12)
        number: int | None

    name: str = Field(max_length=10)
    kind: Literal["monk", "priest"]
    addresses: list[Address] = Field(max_length=2)


def test_the_sdk_parses_answers(tinymix_4bit: Path) -> None:
    with serving(tinymix_4bit, context=600) as (app, _), listening(app) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        for seed in range(2):
            answer = client.chat.completions.parse(
                model="small", messages=[{"role": "user", "content": "Chi era?"}], response_format=Person, seed=seed,
                max_tokens=400, temperature=1,
            )  # fmt: skip
            assert answer.choices[0].finish_reason == "stop"
            assert isinstance(answer.choices[0].message.parsed, Person)
