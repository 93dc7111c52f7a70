"""Prompts: chat templates, tools, and prompts that have no token or too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
from application_client import CHAT, TEXT, TOOLS, USER, answer_of, called, refused
from http_servers import application, serving


def with_template(engine: Any, template: Any) -> Any:
    """An application with this chat template."""
    engine.tokenizer.chat_template = template
    return application("small", engine, None, 64)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_without_a_token(app: Any, stream: bool) -> None:
    error = refused(app, TEXT, {"prompt": "", "stream": stream})
    assert (error["message"], error["param"]) == ("prompt: the prompt has no tokens.", "prompt")


def test_a_template_of_its_own(app: Any) -> None:
    for template in ("", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"):
        error = refused(app, CHAT, {"messages": [USER], "chat_template_kwargs": {"chat_template": template}})
        assert error["param"] == "chat_template_kwargs"


WITH_TOOLS = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)


WITHOUT_TOOLS = "{{ messages[-1].content }}{% if not tools is defined %}{% set tools = none %}{% endif %}"


def test_tools_that_were_called(app: Any) -> None:
    for arguments in ('{"a": 1}', "{}", {"a": 1}, '{"a": 1, "b'):
        body = {"messages": called({"name": "f", "arguments": arguments})}
        assert answer_of(app, CHAT, body).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tools_that_the_template_does_not_use(app: Any, stream: bool) -> None:
    error = refused(app, CHAT, {"messages": [USER], "tools": TOOLS, "stream": stream})
    assert (error["message"], error["param"]) == ("tools: the model's chat template does not support tools.", "tools")
    assert answer_of(app, CHAT, {"messages": [USER], "tools": []}).status_code == 200


@pytest.mark.parametrize(
    ("template", "status"),
    [
        (WITH_TOOLS, 200),
        (WITHOUT_TOOLS, 400),
        ({"default": WITHOUT_TOOLS, "tool_use": WITH_TOOLS}, 200),
        ({"default": WITHOUT_TOOLS}, 400),
    ],
)
def test_tools_are_for_templates_that_use_them(engine: Any, template: Any, status: int) -> None:
    app = with_template(engine, template)
    answer = answer_of(app, CHAT, {"messages": [USER], "tools": TOOLS})
    assert answer.status_code == status, answer.text
    assert answer_of(app, CHAT, {"messages": [USER]}).status_code == 200


def test_the_template_knows_how_much_to_reason(engine: Any) -> None:
    """Others ignore it, as text completions do."""
    template = "{{ 'a' + reasoning_effort }}{% if reasoning_effort == 'high' %}{{ 'a' + 5 }}{% endif %}"
    app = with_template(engine, template)
    assert answer_of(app, CHAT, {"messages": [USER], "reasoning_effort": "low"}).status_code == 200
    assert refused(app, CHAT, {"messages": [USER], "reasoning_effort": "high"})["param"] == "messages"


def test_a_template_that_does_not_like_what_it_is_given(engine: Any) -> None:
    app = with_template(engine, "{{ 'a' + budget }}")
    error = refused(app, CHAT, {"messages": [USER], "chat_template_kwargs": {"budget": 5}})
    assert error["message"].startswith("The model's chat template refuses these messages: can only concatenate str")


def test_a_prompt_beyond_the_models_own_context(tinymix_4bit: Path) -> None:
    """Both numbers are named, and whose the limit is."""
    for context, most, whose in (
        (2048, "2,048", "the model's maximum context"),
        (100, "100", "the context of this server (--context)"),
    ):
        with serving(tinymix_4bit, context=context) as (app, _):
            for prompt, tokens in ((" la" * 3005, "3,005"), (" la" * 300_000, f"more than {2 * context:,}")):
                said = refused(app, TEXT, {"prompt": prompt})
                if context == 100 and tokens == "3,005":
                    tokens = "more than 200"
                assert said["message"] == (
                    f"The prompt has {tokens} tokens, but {whose} is {most} for prompt and answer together."
                )
                assert (said["param"], said["code"]) == ("prompt", "context_length_exceeded")
