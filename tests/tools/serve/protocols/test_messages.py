"""Anthropic's messages: how they become a chat, and what comes back, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import answering, scripted_client

import moetier
from moetier.tools.serve.protocols.body import checked
from moetier.tools.serve.protocols.messages import MessagesBody
from moetier.tools.serve.protocols.query import ChatPrompt, Query
from moetier.tools.serve.protocols.refusal import Refusal

USER = {"role": "user", "content": "Che ora è?"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}


def query_of(**fields: Any) -> Query:
    return checked({"max_tokens": 8, "messages": [USER]} | fields, MessagesBody).query()


def chat_of(**fields: Any) -> ChatPrompt:
    (prompt,) = query_of(**fields).prompts
    assert isinstance(prompt, ChatPrompt)
    return prompt


def test_a_conversation_with_tools_becomes_a_chat() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"} | cached]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "call_1", "name": "f", "input": {"a": 1}},
                {"type": "tool_use", "id": "call_2", "name": "f", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "3"},
                {"type": "tool_result", "tool_use_id": "call_2", "content": [{"type": "text", "text": "4"}]},
                {"type": "text", "text": "Now?"},
            ],
        },
        {"role": "user", "content": "And?"},
    ]
    chat = chat_of(messages=messages, system=[{"type": "text", "text": "Be brief."} | cached], tools=[TOOL])
    calls = [("call_1", {"a": 1}), ("call_2", {})]
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\n\nb"},
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
        {"role": "user", "content": "Now?\n\nAnd?"},
    ]
    assert chat.tools == [
        {"type": "function", "function": {"name": "f", "description": "d", "parameters": TOOL["input_schema"]}}
    ]


def test_a_strict_tool_is_a_strict_function() -> None:
    (tool,) = chat_of(tools=[TOOL | {"strict": True}]).tools or ()
    assert tool["function"]["strict"] is True


def test_options_are_those_of_the_query() -> None:
    query = query_of(
        temperature=0.5, top_k=3, top_p=0.9, stop_sequences=["x"], tools=[TOOL],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
    )  # fmt: skip
    assert (query.max_tokens, query.stop, query.one_call) == (8, ["x"], True)
    assert query.sampling == {"temperature": 0.5, "top_k": 3, "top_p": 0.9}
    assert chat_of(tools=[TOOL], tool_choice={"type": "none"}).tools is None
    assert chat_of(output_config={"effort": "low"}).effort == "low"


@pytest.mark.parametrize(
    ("thinking", "reasons"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        ({"type": "adaptive"}, True),
        ({"type": "enabled", "budget_tokens": 1024}, True),
    ],
)
def test_reasoning_is_for_those_who_ask_for_it(thinking: Any, reasons: bool) -> None:
    assert chat_of(thinking=thinking).reasons is reasons


def test_what_agents_send_is_taken() -> None:
    hints = {
        "metadata": {"user_id": "u"}, "context_management": {"edits": []}, "service_tier": "auto", "mcp_servers": [],
        "cache_control": {"type": "ephemeral"}, "output_config": {"effort": "high"}, "betas": ["x"],
    }  # fmt: skip
    assert chat_of(**hints).messages == [USER]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"max_tokens": None}, "max_tokens: Field required."),
        ({"max_tokens": 0}, "max_tokens: Input should be greater"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: Input should be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]: only",
        ),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]: only text"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: Input should be a valid list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [5]}]}]},
            "messages[0].content[0].tool_result.content[0]: Input should be",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "No"}]}, "messages: the last message must not be"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type: Input should be 'custom'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema: Field required."),
        ({"tool_choice": {"type": "any"}}, "tool_choice: the function that must be called is not in tools."),
        ({"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice: the function that must be called is not in"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: only [] is supported."),
        ({"system": [{"type": "image"}]}, "system[0].type: Input should be 'text'"),
    ],
)
def test_what_is_not_done_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal) as refused:
        query_of(**fields)
    assert refused.value.status_code == 400
    assert refused.value.detail.startswith(message)


# -- over HTTP, with a model that writes given texts -------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = scripted.write_checkpoint(tmp_path_factory.mktemp("scripted"), "qwen3_moe")
    model, tokenizer = moetier.load(folder, daemon=None)
    with model.tiers, answering(model, tokenizer, context=400, chunk=64) as answers:
        yield answers


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The events of a stream, each with its type as its name."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line and not line.startswith(":")]
    events = []
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream describes."""
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message: dict[str, Any] = events[0]["message"]
    inputs: dict[int, str] = {}
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                assert event["index"] == len(message["content"]) - 1
                for field in {"text", "thinking", "signature"} & delta.keys():
                    block[field] += delta[field]
                if "partial_json" in delta:
                    inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
            case "content_block_stop":
                if event["index"] in inputs:
                    message["content"][event["index"]]["input"] = json.loads(inputs[event["index"]])
            case kind:
                assert kind == "ping"
    return message | events[-2]["delta"] | {"usage": events[-2]["usage"]}


CALL = {"type": "tool_use", "name": "f", "input": {"a": 1}}
ANSWERS = {
    scripted.MAIN: ([{"type": "thinking", "thinking": "Penso"}, {"type": "text", "text": "Ciao mondo"}], "end_turn"),
    scripted.TOOL: ([{"type": "text", "text": "Ecco:"}, CALL], "tool_use"),
    scripted.TWICE: ([CALL, CALL | {"input": {"a": 2}}], "tool_use"),
    scripted.LOOP: ([{"type": "text", "text": "x" * 12}], "max_tokens"),
}


@pytest.mark.parametrize("start", ANSWERS)
def test_an_answer_is_blocks_and_its_stream_the_same(service: Any, start: str) -> None:
    content, reason = ANSWERS[start]
    body = {"max_tokens": 12, "messages": [USER], "tools": [TOOL], "temperature": 0, "thinking": {"type": "adaptive"}}
    with scripted_client(service, start) as client:
        whole = client.post("/v1/messages?beta=true", json=body)
        assert whole.status_code == 200, whole.text
        message = whole.json()
        streamed = accumulated(events_of(client.post("/v1/messages", json=body | {"stream": True})))
        prompt = client.post("/v1/messages/count_tokens", json={"messages": [USER], "tools": [TOOL]}).json()
    shown = [{name: block[name] for name in wanted} for block, wanted in zip(message["content"], content, strict=True)]
    assert shown == content
    assert (message["role"], message["type"], message["stop_reason"]) == ("assistant", "message", reason)
    usage = message["usage"]
    assert prompt == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    for each in message, streamed:
        for block in each["content"]:
            assert block.pop("signature", "moetier") == "moetier"
            assert block.pop("id", "call_").startswith("call_")
    assert streamed["content"] == message["content"]
    assert streamed["stop_reason"] == reason
    assert streamed["usage"]["output_tokens"] == usage["output_tokens"]
    assert streamed["usage"]["cache_read_input_tokens"] > 0


def test_a_stop_sequence_is_named(service: Any) -> None:
    body = {"max_tokens": 12, "messages": [USER], "stop_sequences": ["yy", "xxx"]}
    with scripted_client(service, scripted.LOOP) as client:
        message = client.post("/v1/messages", json=body).json()
    assert (message["stop_reason"], message["stop_sequence"], message["content"]) == ("stop_sequence", "xxx", [])


def test_the_result_of_a_call_follows_the_tokens_that_were_computed(service: Any) -> None:
    body: dict[str, Any] = {"max_tokens": 12, "messages": [USER], "tools": [TOOL], "temperature": 0}
    with scripted_client(service, scripted.TOOL, scripted.TURNS) as client:
        message = client.post("/v1/messages", json=body).json()
        result = {"type": "tool_result", "tool_use_id": message["content"][1]["id"], "content": "3"}
        body["messages"] += [
            {"role": "assistant", "content": message["content"]},
            {"role": "user", "content": [result]},
        ]
        again = client.post("/v1/messages", json=body).json()["usage"]
    computed = sum(message["usage"].values()) - 1  # the last token was sampled, but not computed
    assert again["cache_read_input_tokens"] >= computed


def test_errors_have_anthropics_form(service: Any) -> None:
    bad = [
        ({"messages": [USER], "max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": [USER], "max_tokens": 1, "model": "other"}, 404, "not_found_error"),
        ({"messages": [{"role": "user", "content": "x " * 900}], "max_tokens": 1}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}], "max_tokens": 1}, 413, "request_too_large"),
    ]
    with scripted_client(service, scripted.MAIN) as client:
        for body, status, kind in bad:
            answer = client.post("/v1/messages", json=body)
            assert (answer.status_code, answer.json()["type"]) == (status, "error")
            assert answer.json()["error"].keys() == {"type", "message"}
            assert answer.json()["error"]["type"] == kind
        assert client.post("/v1/messages/nothing", json={}).json()["error"]["type"] == "not_found_error"
        long = client.post("/v1/messages", json=bad[2][0]).json()["error"]["message"]
    assert long.startswith("prompt is too long: ")


def test_a_stream_that_waits_has_pings(service: Any) -> None:
    with scripted_client(service, scripted.LOOP, alive_seconds=0.001) as client:
        body = {"max_tokens": 12, "messages": [USER], "stream": True}
        events = events_of(client.post("/v1/messages", json=body))
    assert "ping" in [event["type"] for event in events]
    others = [event for event in events if event["type"] != "ping"]  # a ping may come before the first of them
    assert accumulated(others)["content"] == [{"type": "text", "text": "x" * 12}]


def test_blocks_of_a_stream_follow_each_other(service: Any) -> None:
    with scripted_client(service, scripted.MAIN) as client:
        body = {"max_tokens": 12, "messages": [USER], "stream": True}
        events = [event for event in events_of(client.post("/v1/messages", json=body)) if "index" in event]
    for event, following in pairwise(events):
        is_next = following["index"] == event["index"] + 1
        assert is_next == (event["type"] == "content_block_stop") == (following["type"] == "content_block_start")


def test_a_server_is_there_for_who_asks(service: Any) -> None:
    with scripted_client(service, scripted.MAIN) as client:
        assert client.head("/").status_code == 200
        (card,) = client.get("/v1/models").json()["data"]
    assert (card["type"], card["display_name"], card["created_at"][-1]) == ("model", "small", "Z")


@pytest.mark.parametrize("leave_out", [None, r"^x-anthropic-billing-header:[^\n]*\n*"])
def test_a_header_that_changes_is_left_out_if_the_server_is_told_so(service: Any, leave_out: str | None) -> None:
    with scripted_client(service, scripted.MAIN, leave_out=leave_out) as client:

        def tokens(header: str) -> int:
            system = [{"type": "text", "text": header}, {"type": "text", "text": "Be brief."}]
            body = {"messages": [{"role": "user", "content": "x-anthropic-billing-header: mine"}], "system": system}
            count: int = client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
            return count

        short, long = tokens("x-anthropic-billing-header: 1;"), tokens("x-anthropic-billing-header: 1; cch=12345;")
    assert (short == long) == (leave_out is not None)
