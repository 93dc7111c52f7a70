"""OpenAI's responses: how their input becomes a chat, and what comes back, over HTTP."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import answering, scripted_client
from openai import OpenAI

import moetier
from moetier.tools.serve import endpoint
from moetier.tools.serve.protocols.body import checked
from moetier.tools.serve.protocols.events import Answered, Call
from moetier.tools.serve.protocols.protocol import Reply
from moetier.tools.serve.protocols.query import ChatPrompt, Query
from moetier.tools.serve.protocols.refusal import Refusal
from moetier.tools.serve.protocols.responses import ResponsesProtocol
from moetier.tools.serve.protocols.responses_body import ResponsesBody

TOOL = {"type": "function", "name": "f", "description": "d", "strict": False, "parameters": {"type": "object"}}
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = ["reasoning.encrypted_content"]


def query_of(**fields: Any) -> Query:
    return checked({"input": "?"} | fields, ResponsesBody).query()


def chat_of(**fields: Any) -> ChatPrompt:
    (prompt,) = query_of(**fields).prompts
    assert isinstance(prompt, ChatPrompt)
    return prompt


def said(role: str, text: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}]}


def test_a_text_is_a_message_of_the_user() -> None:
    assert chat_of(input="Hi").messages == [{"role": "user", "content": "Hi"}]


def test_items_become_a_chat() -> None:
    """As Codex sends them: an answer is several items."""
    items = [
        said("developer", "Rules."),
        said("user", "Context."),
        {"role": "user", "content": "Do it."},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        said("assistant", "I look.", "output_text"),
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"},
        {"type": "function_call", "call_id": "call_2", "name": "f", "arguments": ""},
        {"type": "function_call_output", "call_id": "call_1", "output": "3"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "4"}]},
        said("assistant", "Done.", "output_text"),
        said("user", "And?"),
    ]
    chat = chat_of(input=items, instructions="Be brief.", tools=[TOOL, {"type": "web_search"}])
    calls = [("call_1", {"a": 1}), ("call_2", {})]
    assert chat.messages == [
        {"role": "system", "content": "Be brief.\n\nRules."},
        {"role": "user", "content": "Context."},
        {"role": "user", "content": "Do it."},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}
                for id, arguments in calls
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
        {"role": "tool", "tool_call_id": "call_2", "content": "4"},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "And?"},
    ]
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert chat.tools == [{"type": "function", "function": function}]
    (strict,) = chat_of(tools=[TOOL | {"strict": True}]).tools or ()
    assert strict["function"] == function | {"strict": True}


@pytest.mark.parametrize(
    ("encrypted", "text"), [(base64.b64encode("Così.".encode()).decode(), "Così."), ("gAAAA-x", None), (None, None)]
)
def test_reasoning_may_come_back_in_the_form_that_hides_it(encrypted: str | None, text: str | None) -> None:
    """That of other servers is no text."""
    items = [said("user", "?"), {"type": "reasoning", "summary": [], "encrypted_content": encrypted}]
    assert chat_of(input=items).messages[1].get("reasoning_content") == text


def test_functions_in_a_namespace_are_offered_under_both_names() -> None:
    """As Codex has some: calls of them, those in the input too, have the two names apart."""
    space = {"type": "namespace", "name": "agents", "description": "d", "tools": [TOOL, {"type": "web_search"}]}
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "namespace": "agents", "arguments": "{}"}
    given = {"input": [{"role": "user", "content": "?"}, call], "tools": [TOOL, space]}
    body = checked(given, ResponsesBody)
    (chat,) = body.query().prompts
    assert isinstance(chat, ChatPrompt)
    assert [tool["function"]["name"] for tool in chat.tools or ()] == ["f", "agents.f"]
    assert chat.messages[1]["tool_calls"][0]["function"]["name"] == "agents.f"
    answer = Answered()
    for name in "agents.f", "f":
        answer.add(Call("call_2", name, "{}"))
    items = ResponsesProtocol().response(Reply("1", "small", 0, body, 1, 1), [answer])["output"]
    assert [(item["name"], item.get("namespace")) for item in items] == [("f", "agents"), ("f", None)]


def test_options_are_those_of_the_query() -> None:
    query = query_of(max_output_tokens=5, temperature=0.5, top_p=0.9, seed=3, parallel_tool_calls=False)
    assert (query.max_tokens, query.seed, query.one_call) == (5, 3, True)
    assert query.sampling == {"temperature": 0.5, "top_p": 0.9}
    assert chat_of(tools=[TOOL], tool_choice="none").tools is None
    assert (chat_of(reasoning={"effort": "low"}).effort, chat_of().effort) == ("low", None)
    assert (chat_of(reasoning={"effort": "none"}).reasons, chat_of().reasons) == (False, None)


def test_what_agents_send_is_taken() -> None:
    hints = {
        "metadata": {"a": "b"}, "client_metadata": {"a": "b"}, "prompt_cache_key": "k", "store": False, "user": "u",
        "include": ENCRYPTED, "text": {"verbosity": "low"}, "reasoning": {"effort": "high", "summary": "auto"},
        "stream_options": {"include_obfuscation": False}, "service_tier": "auto", "truncation": "disabled",
        "context_management": [], "safety_identifier": "s", "background": False, "previous_response_id": None,
    }  # fmt: skip
    assert chat_of(**hints).messages == chat_of().messages


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"store": True}, "store: this server keeps no responses."),
        ({"previous_response_id": "resp_1"}, "previous_response_id: this server keeps no responses."),
        ({"conversation": {"id": "c"}}, "conversation: this server keeps no responses."),
        ({"background": True}, "background: only false is supported."),
        ({"truncation": "auto"}, 'truncation: only "disabled" is supported.'),
        ({"prompt": {"id": "p"}}, "prompt: this field is not supported."),
        ({"input": None}, "input: Field required."),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"input": [5]}, "input[0]: only message, function_call"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]: only message, function_call"),
        ({"input": [said("user", "x", "input_image")]}, "input[0].message.content[0].type: Input should be"),
        (
            {"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "5"}]},
            "input[0].function_call.arguments: it must be a string that holds a JSON object.",
        ),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools[0]: only function and namespace are supported."),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format: a format has a schema if it is json_schema"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater"),
    ],
)
def test_what_is_not_done_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as refused:
        query_of(**fields)
    assert refused.value.status_code == 400
    assert refused.value.param == next(iter(fields))
    assert refused.value.detail.startswith(message)


def test_a_refusal_before_there_is_a_response_is_an_event_of_its_own() -> None:
    name, data = ResponsesProtocol().error(Refusal(507, "It does not fit.", code="model_too_large")).splitlines()[:2]
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "error", "code": "model_too_large", "message": "It does not fit.", "param": None, "sequence_number": 0,
    }  # fmt: skip


# -- over HTTP, with a model that writes given texts -------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = scripted.write_checkpoint(tmp_path_factory.mktemp("scripted"), "qwen3_moe")
    model, tokenizer = moetier.load(folder, daemon=None)
    with model.tiers, answering(model, tokenizer, context=400, chunk=64) as answers:
        yield answers


def openai_of(client: httpx2.Client) -> OpenAI:
    return OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)


CALLS = [("f", {"a": 1}), ("f", {"a": 2})]
ANSWERS = {  # reasoning, text and calls of each answer
    scripted.MAIN: ("Penso", "Ciao mondo", [], "completed"),
    scripted.TOOL: ("", "Ecco:", CALLS[:1], "completed"),
    scripted.TWICE: ("", "", CALLS, "completed"),
    scripted.LOOP: ("", "x" * 12, [], "incomplete"),
}


@pytest.mark.parametrize("start", ANSWERS)
def test_an_answer_is_items_and_its_stream_the_same(service: Any, start: str) -> None:
    reasoning, text, calls, status = ANSWERS[start]
    asked: dict[str, Any] = {"model": "small", "input": "?", "max_output_tokens": 12, "tools": [TOOL], "temperature": 0}
    with scripted_client(service, start) as client, openai_of(client) as openai:
        whole = openai.responses.create(**asked)
        events: list[Any] = [*openai.responses.create(**asked, stream=True)]
        final = events[-1].response
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == f"response.{status}"
    for response in whole, final:
        assert response.status == status
        assert response.output_text == text
        items = {item.type: item for item in response.output}
        assert ("reasoning" in items) == bool(reasoning)
        if reasoning:
            assert [part.text for part in items["reasoning"].content] == [reasoning]
        called = [item for item in response.output if item.type == "function_call"]
        assert [(call.name, json.loads(call.arguments)) for call in called] == calls
        assert all(call.call_id.startswith("call_") for call in called)
    assert whole.usage.output_tokens == final.usage.output_tokens
    assert bool(whole.usage.output_tokens_details.reasoning_tokens) == bool(reasoning)
    assert final.usage.input_tokens_details.cached_tokens > 0


def test_log_probabilities_are_those_of_each_token(service: Any) -> None:
    asked: dict[str, Any] = {"model": "small", "input": "?", "max_output_tokens": 5, "include": [LOGPROBS]}
    with scripted_client(service, scripted.LOOP) as client, openai_of(client) as openai:
        whole = openai.responses.create(**asked, top_logprobs=2)
        events: list[Any] = [*openai.responses.create(**asked, top_logprobs=2, stream=True)]
        plain: Any = openai.responses.create(**asked)
    parts: list[Any] = [part for response in (whole, events[-1].response) for part in response.output[0].content]
    deltas = [each for event in events if event.type == "response.output_text.delta" for each in event.logprobs]
    for part in parts:
        assert [each.token for each in part.logprobs] == ["x"] * 5
        assert all(
            len(each.top_logprobs) == 2 and each.logprob == each.top_logprobs[0].logprob for each in part.logprobs
        )
        assert [each.logprob for each in part.logprobs] == [each.logprob for each in deltas]
    assert [each.top_logprobs for each in plain.output[0].content[0].logprobs] == [[]] * 5


def test_a_stream_keeps_no_more_log_probabilities_than_an_answer(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_SCORES", 14)
    with scripted_client(service, scripted.LOOP) as client:
        for path, most, status in (
            ("/v1/responses", 5, 400),
            ("/v1/responses", 4, 200),
            ("/v1/chat/completions", 5, 200),
        ):
            asked = {"input": "?", "include": [LOGPROBS], "max_output_tokens": most}
            if path != "/v1/responses":
                asked = {"messages": [{"role": "user", "content": "?"}], "logprobs": True, "max_tokens": most}
            answer = client.post(path, json=asked | {"top_logprobs": 2, "stream": True})
            assert answer.status_code == status, path


def test_each_item_begins_and_ends_once(service: Any) -> None:
    with scripted_client(service, scripted.TWICE) as client, openai_of(client) as openai:
        events = [*openai.responses.create(model="small", input="?", tools=[TOOL], stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    begin, end = "output_item.added", "output_item.done"
    call = [begin, "function_call_arguments.delta", "function_call_arguments.done", end]
    assert kinds == ["created", "in_progress", *call, *call, "completed"]
    assert [event.output_index for event in events if event.type == f"response.{begin}"] == [0, 1]


def test_the_output_of_a_call_follows_the_tokens_that_were_computed(service: Any) -> None:
    for start in scripted.TOOL, scripted.MAIN:
        with scripted_client(service, start, scripted.TURNS) as client, openai_of(client) as openai:
            asked: dict[str, Any] = {"model": "small", "tools": [TOOL], "temperature": 0, "include": ENCRYPTED}
            items: list[Any] = [{"role": "user", "content": "Che ora è?"}]
            first = openai.responses.create(input=items, **asked)
            items += [item.model_dump(exclude={"content"} if item.type == "reasoning" else {}) for item in first.output]
            call = first.output[-1]
            if call.type == "function_call":
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": "3"})
            else:
                items.append({"role": "user", "content": "E poi?"})
            again = openai.responses.create(input=items, **asked)
        computed = first.usage.total_tokens - 1  # the last token was sampled, but not computed
        assert again.usage.input_tokens_details.cached_tokens >= computed


def test_a_stream_that_fails_says_so(service: Any) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("a secret")

    with scripted_client(service, scripted.MAIN) as client:
        service.model.forward = broken
        try:
            answer = client.post("/v1/responses", json={"input": "?", "stream": True})
            whole = client.post("/v1/responses", json={"input": "?"})
        finally:
            del service.model.forward
    last = json.loads(answer.text.splitlines()[-2].removeprefix("data: "))
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == "server_error"
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
