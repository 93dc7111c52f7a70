"""Fields of chat completions, each by its effect, with the unmodified openai client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import scripted
from http_servers import answering, listening, scripted_client, serving
from openai import BadRequestError, OpenAI

import moetier

MESSAGES: list[Any] = [{"role": "user", "content": "Chi era don Abbondio?"}]
TOOL: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def app(tinymix_4bit: Path) -> Iterator[Any]:
    with serving(tinymix_4bit, context=400) as (found, _):
        yield found


@pytest.fixture
def client(app: Any) -> Iterator[OpenAI]:
    with listening(app) as url, OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def ask(client: OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(**{"model": "small", "messages": MESSAGES, "max_tokens": 8} | fields)


def test_log_probabilities_are_those_of_each_token(client: OpenAI) -> None:
    (choice,) = ask(client, temperature=0, logprobs=True, top_logprobs=3).choices
    content = choice.logprobs.content
    assert b"".join(bytes(each.bytes) for each in content).decode() == choice.message.content
    for each in content:
        assert len(each.top_logprobs) == 3
        assert (each.token, each.logprob) == (each.top_logprobs[0].token, each.top_logprobs[0].logprob)
        assert 0 >= each.logprob >= each.top_logprobs[1].logprob
    pieces = [piece.choices[0] for piece in ask(client, temperature=0, logprobs=True, top_logprobs=3, stream=True)]
    assert [each for piece in pieces if piece.logprobs for each in piece.logprobs.content] == content
    plain = ask(client, temperature=0, logprobs=True).choices[0].logprobs.content
    assert [each.logprob for each in plain] == [each.logprob for each in content]
    assert not any(each.top_logprobs for each in plain)
    assert ask(client).choices[0].logprobs is None
    with pytest.raises(BadRequestError, match="needs logprobs"):
        ask(client, top_logprobs=1)


def test_several_answers_come_as_choices(client: OpenAI) -> None:
    several = ask(client, n=3, seed=7, temperature=1)
    alone = [ask(client, seed=7 + number, temperature=1).choices[0].message.content for number in range(3)]
    assert [choice.message.content for choice in several.choices] == alone
    pieces = [*ask(client, n=3, seed=7, temperature=1, stream=True)]
    texts = ["", "", ""]
    for piece in pieces:
        texts[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert texts == alone
    assert sorted(piece.choices[0].index for piece in pieces if piece.choices[0].finish_reason) == [0, 1, 2]


def test_a_bias_decides_which_token_comes(client: OpenAI) -> None:
    token = ask(client, temperature=0, max_tokens=1)
    assert ask(client, temperature=0, max_tokens=1, logit_bias={"5": 100}).choices != token.choices


@pytest.mark.parametrize(
    ("options", "with_usage"), [(None, [-1]), ({"include_usage": True}, [-1]), ({"include_usage": False}, [])]
)
def test_the_usage_is_where_the_request_wants_it(client: OpenAI, options: Any, with_usage: list[int]) -> None:
    pieces = [*ask(client, stream=True, **({} if options is None else {"stream_options": options}))]
    assert [at for at, piece in enumerate(pieces, -len(pieces)) if piece.usage is not None] == with_usage
    assert bool(pieces[-1].choices) == (options != {"include_usage": True})


# -- with a model that writes given texts ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = scripted.write_checkpoint(tmp_path_factory.mktemp("scripted"), "qwen3_moe")
    model, tokenizer = moetier.load(folder, daemon=None)
    with model.tiers, answering(model, tokenizer, context=400, chunk=64) as answers:
        yield answers


SWITCHED = (  # reasons unless it is told not to, and writes how much it was told to
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ reasoning_effort }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ start if enable_thinking else '[goes-on]' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("fields", "reasons"),
    [
        ({"enable_thinking": True}, True),
        ({"enable_thinking": False}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": {"type": "disabled"}}, False),
        ({"reasoning": {"enabled": True, "max_tokens": 100}}, True),
        ({"reasoning": {"enabled": False}}, False),
        ({"reasoning": {"effort": "none"}}, False),
        ({"reasoning_effort": "none"}, False),
        ({"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}}, True),
    ],
)
def test_reasoning_is_turned_on_and_off_by_the_templates_variable(
    service: Any, fields: dict[str, Any], reasons: bool
) -> None:
    with scripted_client(service, scripted.MAIN, SWITCHED) as client:
        body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=body | fields).json()
    assert ("reasoning_content" in answer["choices"][0]["message"]) == reasons
    assert bool(answer["usage"]["completion_tokens_details"]["reasoning_tokens"]) == reasons


def test_how_much_to_reason_is_a_variable_of_the_template(service: Any) -> None:
    with scripted_client(service, scripted.MAIN, SWITCHED) as client:
        tokens = [
            client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1} | fields).json()["usage"]
            for fields in ({"reasoning_effort": "x" * 9}, {"reasoning": {"effort": "x" * 9}}, {"reasoning_effort": "x"})
        ]
    prompts = [usage["prompt_tokens"] for usage in tokens]
    assert prompts[0] == prompts[1] == prompts[2] + 8


def test_text_and_reasoning_beside_calls_are_in_the_prompt(service: Any) -> None:
    call = {"id": "call_9", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "call_9", "content": "3"}
    with scripted_client(service, scripted.MAIN, scripted.TURNS) as client:

        def tokens(**said: str) -> int:
            messages = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [call]} | said, result]
            answer = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1, "tools": [TOOL]})
            count: int = answer.json()["usage"]["prompt_tokens"]
            return count

        plain = tokens()
        assert tokens(content="abc") == plain + 3
        assert tokens(reasoning_content="abc") > plain + 3


@pytest.mark.parametrize("knows", [True, False])
def test_a_developers_message_is_one_of_the_system_where_templates_do_not_know_it(service: Any, knows: bool) -> None:
    template = scripted.own_template("qwen3_moe").replace(
        "{% for m in messages %}", "{% for m in messages %}{{ m.role }}"
    )
    template += "{# developer #}" if knows else ""
    with scripted_client(service, scripted.MAIN, template) as client:

        def tokens(role: str) -> int:
            body = {"messages": [{"role": role, "content": "a"}, *MESSAGES], "max_tokens": 1}
            count: int = client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]
            return count

        assert (tokens("developer") == tokens("system")) == (not knows)
