"""What a request may say, and what is said of one that can't be."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')

from pydantic import ValidationError

from moetier.tools.serve.protocols.body import Body, UnknownFields, checked, unknown_fields
from moetier.tools.serve.protocols.bounded_json import BoundedJson
from moetier.tools.serve.protocols.chat import ChatBody
from moetier.tools.serve.protocols.completions import CompletionsBody
from moetier.tools.serve.protocols.refusal import Refusal

USER = {"role": "user", "content": "Chi era don Abbondio?"}


def fields(body: dict[str, Any], kind: type[Body] = ChatBody) -> dict[str, Any]:
    """The fields that are left of a valid body."""
    return checked(body, kind).model_dump(exclude_none=True)


ROLES = "'system', 'developer', 'user', 'assistant' or 'tool'"


@pytest.mark.parametrize(
    ("body", "said", "param"),
    [
        ({"messages": []}, "messages: List should have at least 1 item after validation, not 0.", "messages"),
        ({"messages": [USER, {"content": "?"}]}, "messages[1].role: Field required.", "messages"),
        ({"messages": [{"role": "bogus"}]}, f"messages[0].role: Input should be {ROLES}.", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content: only text is supported, no images or sound.",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content: it must be a string, or a list of parts that each have a text.",
            "messages",
        ),
        (
            {"messages": [USER], "stop": ["a", "b", "c", "d", "e"]},
            "stop: List should have at most 4 items after validation, not 5.",
            "stop",
        ),
        ({"messages": [USER], "stop": ""}, "stop[0]: String should have at least 1 character.", "stop"),
        ({"messages": [USER], "stop": ["a", ""]}, "stop[1]: String should have at least 1 character.", "stop"),
        ({"messages": [USER], "stop": [1]}, "stop[0]: Input should be a valid string.", "stop"),
        (
            {"messages": [USER], "response_format": {"type": "json_schema"}},
            "response_format: json_schema is missing.",
            "response_format",
        ),
        ({"messages": [USER], "audio": {"voice": "alloy"}}, "audio: this field is not supported.", "audio"),
        (
            {"messages": [USER], "web_search_options": {}},
            "web_search_options: this field is not supported.",
            "web_search_options",
        ),
        (
            {"messages": [USER], "skip_special_tokens": False},
            "skip_special_tokens: this field is not supported.",
            "skip_special_tokens",
        ),
        ({"messages": [USER], "zzz": 1, "grammar": "x"}, "grammar: this field is not supported.", "grammar"),
        ({"messages": [USER], "modalities": ["audio"]}, 'modalities: only ["text"] is supported.', "modalities"),
    ],
)
def test_what_cannot_be_is_named_where_it_stands(body: dict[str, Any], said: str, param: str) -> None:
    with pytest.raises(Refusal) as refused:
        fields(body)
    assert (refused.value.detail, refused.value.param, refused.value.status_code) == (said, param, 400)


def test_fields_that_ask_for_nothing_are_taken() -> None:
    asked = {
        "grammar": "",
        "background": False,
        "truncation": "disabled",
        "json_schema": {},
        "web_search_options": None,
    }
    assert fields({"messages": [USER], "best_of": 1, "use_beam_search": False, **asked}) == {"messages": [USER]}


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
@pytest.mark.parametrize("content", ["text", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], []])
def test_messages_are_taken_as_they_are(role: str, content: object) -> None:
    message = {"role": role, "content": content, "name": "somebody"}
    assert fields({"messages": [message]}) == {"messages": [message]}


def test_tools_and_calls_of_them_are_passed_on_in_the_order_that_templates_have() -> None:
    """Some write them down as JSON."""
    schema = {"type": "object", "properties": {"b": {"default": None}, "a": {"enum": [None]}}}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"b": None, "a": [None]}}}
    asked = {"messages": [{"role": "assistant", "tool_calls": [call]}], "tools": [tool]}
    assert json.dumps(fields(asked)) == json.dumps(asked)
    written = call | {"function": {"arguments": '{"b": null, "a": [null]}', "name": "f"}}
    asked |= {"messages": [{"role": "assistant", "tool_calls": [written]}]}
    assert json.dumps(fields(asked)["messages"][0]["tool_calls"]) == json.dumps([call])


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("", {}),
        (" ", {}),
        ("{", {}),
        ('{"a": 1, "b', {"a": 1}),
        ('{"a": 1, "b": "tex', {"a": 1}),
        ('{"a": [{"b": 2}, {"c', {"a": [{"b": 2}, {}]}),
    ],
)
def test_arguments_that_were_cut_keep_what_is_whole(written: str, kept: dict[str, Any]) -> None:
    """Else a conversation with such a call would be refused for ever."""
    asked = {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": written}}]}]}
    (message,) = fields(asked)["messages"]
    assert message["tool_calls"][0]["function"]["arguments"] == kept


@pytest.mark.parametrize("written", ["5", "[1", '"f', "f", "{a: 1}", '{"a": 1} x', '{"a": "\\ud800"}'])
def test_arguments_that_are_no_object_are_refused(written: str) -> None:
    asked = {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": written}}]}]}
    with pytest.raises(Refusal, match="it must be a string that holds a JSON object") as refused:
        fields(asked)
    assert refused.value.param == "messages"


def test_unknown_fields_are_named_once_and_not_all(caplog: pytest.LogCaptureFixture) -> None:
    names = ["cache_prompt", "a\nb\x1b[31m", "é" * 10_000, *(f"field{number}" for number in range(200))]
    body = {"messages": [USER], "seed": 1, "user": "u", "n": 1, "gone": None} | dict.fromkeys(names, 5)
    noted = UnknownFields()
    for _ in range(2):
        assert fields(body).keys() == {"messages", "seed", "n"}
        noted.note(unknown_fields(body, ChatBody))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 100
    assert lines[0] == "requests have the unknown field 'cache_prompt', which is ignored"
    assert all(line.isprintable() and line.isascii() and len(line) < 600 for line in lines)
    assert "field199" not in caplog.text


@pytest.mark.parametrize("stop", ["a", ["a"], ["a", "b", "c", "d"]])
def test_stop_strings_are_a_list(stop: str | list[str]) -> None:
    asked = fields({"prompt": "?", "stop": stop, "seed": None}, CompletionsBody)
    assert asked == {"prompt": ["?"], "stop": [stop] if isinstance(stop, str) else stop}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        ("chat_template", ""),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("tokenize", False),
        ("return_dict", False),
        ("return_tensors", "np"),
        ("return_assistant_tokens_mask", True),
        ("padding", "max_length"),
        ("truncation", True),
        ("max_length", 3),
        ("tools", 5),
        ("documents", "x"),
        ("tokenizer_kwargs", {"truncation": True}),
        ("messages", []),
        ("conversation", []),
        ("conversations", []),
        ("load_audio_from_video", True),
        ("compiled_template", 1),
        ("self", 1),
        ("text", "x"),
        ("kwargs", {}),
    ],
)
def test_a_request_has_no_say_in_how_its_template_is_applied(name: str, value: object) -> None:
    with pytest.raises(Refusal) as refused:
        checked({"messages": [USER], "chat_template_kwargs": {"enable_thinking": False, name: value}}, ChatBody)
    assert refused.value.detail == f"chat_template_kwargs: the variable {name} is not supported."
    assert (refused.value.param, refused.value.status_code) == ("chat_template_kwargs", 400)


def test_what_a_template_may_know_is_passed_on() -> None:
    asked = {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False, "thinking_budget": None}}
    assert fields(asked)["chat_template_kwargs"]["enable_thinking"] is False


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [0, 0]},
        {"messages": [USER], "tools": [0, 0]},
        {"messages": [{"role": "assistant", "tool_calls": [0, 0]}]},
        {"messages": [USER], "stop": ["", ""]},
    ],
)
def test_no_more_errors_are_looked_for_than_are_reported(body: dict[str, Any]) -> None:
    """A list may have 65,536 of them. The four stop strings are few enough."""
    with pytest.raises(ValidationError) as raised:
        ChatBody.model_validate(body, context=BoundedJson())
    assert raised.value.error_count() == (2 if "stop" in body else 1)
