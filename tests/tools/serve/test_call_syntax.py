"""How tool calls are written, by response templates of several kinds, and which answers that allows."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("llguidance", reason='pip install ".[serve]"')

import scripted
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from moetier.runtime.engine.grammar import GrammarError
from moetier.tools.serve.call_syntax import KEY, NAME, VALUE, CallSyntax, syntax_of
from moetier.tools.serve.constraints import Constraints
from moetier.tools.serve.protocols.query import ChatPrompt

BY_NAME = {"function": {"name": "{name}", "arguments": "{content}"}}
NAMED = r"<c (?P<name>\w+)>"
XML = {"tag_pattern": r"<p (?P<key>\w+)>(?P<value>.*?)</p>"}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"enum": ["left", "right"]}, "b": {"type": "string"}, "c": {"type": "integer"}},
    "required": ["a", "b"],
}
TOOL = {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}}


def template_of(open_pattern: str = NAMED, **field: Any) -> ResponseTemplate:
    """A template whose calls end with </c>, and whose reasoning is between <t> and </t>."""
    calls = {"open_pattern": open_pattern, "close": "</c>", "content": "json", "transform": BY_NAME} | field
    fields = {"thinking": {"open": "<t>", "close": "</t>"}, "tool_calls": calls, "content": {}}
    return load_response_template({"start_anchor": "<a>", "fields": fields})


def test_a_name_before_its_arguments() -> None:
    assert syntax_of(template_of()) == CallSyntax(("<c ", NAME, ">"), ("</c>",))
    found = syntax_of(template_of(content="xml-inline", content_args=XML))
    assert found == CallSyntax(("<c ", NAME, ">"), ("</c>",), argument=("<p ", KEY, ">", VALUE, "</p>"))


@pytest.mark.parametrize(
    "field",
    [
        {"content": "text"},
        {"open_pattern": r"<c (?P<name>\w+)>|<d>"},
        {"open_pattern": r"\s*(?P<name>\w+)=", "close": "</c>"},  # what opens a call is no mark
        {"transform": {"function": {"name": "{name}", "arguments": "{content.arguments}"}}},
        {"transform": {"function": "{name}"}},
        {"content": "xml-inline", "content_args": {"tag_pattern": r"(?P<key>\w+)=(?P<value>\w+)"}},
    ],
)
def test_other_templates_have_no_known_syntax(field: dict[str, Any]) -> None:
    assert syntax_of(template_of(**field)) is None


def allowed(template: ResponseTemplate, text: str, *, must_call: bool = True, region: str | None = None) -> bool:
    """Whether an answer may be ``text``, with the function f."""
    tokenizer = scripted.tokenizer_of("qwen3_moe")
    chat = ChatPrompt([], [TOOL], must_call=["f"] if must_call else [])
    compiled = Constraints(tokenizer, template).of_dialogue(chat, None, one_call=True, region=region)
    assert compiled is not None
    matcher = compiled.matcher()
    try:
        for token in tokenizer(text).input_ids:
            matcher.consume(token)
    except GrammarError:
        return False
    return matcher.is_complete or not must_call


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ('<c f>{"a": "left", "b": ""}</c>', True),
        ('<c f>{"a": "up", "b": ""}</c>', False),
        ('<c f>{"a": "left"}</c>', False),
        ('<c g>{"a": "left", "b": ""}</c>', False),
    ],
)
def test_arguments_in_json(text: str, is_allowed: bool) -> None:
    assert allowed(template_of(), text) is is_allowed


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("<c f><p a>right</p><p b>any <text></p></c>", True),
        ("<c f><p a>right</p><p b></p><p c>12</p></c>", True),
        ("<c f><p a>up</p><p b></p></c>", False),
        ("<c f><p a>right</p><p b></p><p c>twelve</p></c>", False),
        ("<c f><p a>right</p></c>", False),
    ],
)
def test_arguments_in_tags(text: str, is_allowed: bool) -> None:
    """A choice is one of its texts, a text ends with its tag, and a number is one."""
    assert allowed(template_of(content="xml-inline", content_args=XML), text) is is_allowed


@pytest.mark.parametrize(
    ("text", "is_allowed"),
    [
        ("hm</t> Now: <c f>", True),
        ("hm <c g></t> Now: <c f>", True),
        ("hm</t> Now: <c g>", False),
    ],
)
def test_calls_after_reasoning_that_the_prompt_has_begun(text: str, is_allowed: bool) -> None:
    """Marks that are written by letters. What looks like a call in the reasoning is none."""
    assert allowed(template_of(), text, must_call=False, region="thinking") is is_allowed
