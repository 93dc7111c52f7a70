"""The next prompt of a conversation begins with the tokens that the model has sampled, if the template keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import httpx2
import scripted
from http_servers import answering, listening
from readers import PATIENCE

import moetier
from moetier.tools.serve.app import application
from moetier.tools.serve.protocols.events import Answered, Call, Event, Text
from moetier.tools.serve.replay import Turns

END = "<end>"
PROMPT = [{"role": "user", "content": "What time is it?"}]


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


def render(messages: Sequence[Mapping[str, Any]], *, keeps_reasoning: bool = True) -> str:
    """A template that writes calls anew, and may leave reasoning out before the last message of the user."""
    text = ""
    last = max(at for at, message in enumerate(messages) if message["role"] == "user")
    for at, message in enumerate(messages):
        thought = message.get("reasoning_content", "") if keeps_reasoning or at > last else ""
        calls = "".join(f"<call {call['name']}>" for call in message.get("tool_calls", ()))
        text += (
            f"<{message['role']}>" + (f"<think>{thought}</think>" if thought else "") + message["content"] + calls + END
        )
    return text + "<assistant>"


def sampled(turns: Turns, text: str, *events: Event) -> list[int]:
    """Tokens of PROMPT and an answer, which differ from those of their text."""
    ids = [*tokenizer(render(PROMPT))["input_ids"], *(1000 + ord(letter) for letter in text), 7]
    answered = Answered()
    for event in events:
        answered.add(event)
    turns.note(render(PROMPT), answered, ids, END)
    return ids


def answered(text: str = "", *calls: str) -> dict[str, Any]:
    named = [{"id": call, "name": "clock", "arguments": {}} for call in calls]
    return {"role": "assistant", "content": text, "tool_calls": named}


def test_a_call_is_found_by_its_id_and_not_written_anew() -> None:
    turns = Turns()
    ids = sampled(turns, '<call {"name":  "clock"}>', Call("call_1", "clock", "{}"))
    messages = [*PROMPT, answered("", "call_1"), {"role": "tool", "content": "Noon."}]
    found = turns.continued(messages, render, tokenizer, 10_000)
    assert found == [*ids, *tokenizer(f"<tool>Noon.{END}<assistant>")["input_ids"]]
    assert turns.continued([*PROMPT, answered("", "call_2"), messages[-1]], render, tokenizer, 10_000) == []


def test_a_text_is_found_though_a_client_has_trimmed_it() -> None:
    turns = Turns()
    ids = sampled(turns, " Noon. \n", Text(" Noon."), Text(" \n"))
    messages = [*PROMPT, answered("Noon."), {"role": "user", "content": "Where?"}]
    assert turns.continued(messages, render, tokenizer, 10_000)[: len(ids)] == ids


@pytest.mark.parametrize("keeps", [True, False])
def test_reasoning_is_replayed_only_if_the_template_keeps_it(keeps: bool) -> None:
    turns = Turns()
    ids = sampled(turns, "<think>Hm.</think>Noon.", Text("Hm.", is_reasoning=True), Text("Noon."))
    answer = answered("Noon.") | {"reasoning_content": "Hm."}
    messages = [*PROMPT, answer, {"role": "user", "content": "Where?"}]
    found = turns.continued(messages, lambda given: render(given, keeps_reasoning=keeps), tokenizer, 10_000)
    assert found[: len(ids)] == (ids if keeps else [])


def test_an_answer_that_a_client_has_changed_is_another() -> None:
    """And reasoning that it does not know stays unknown: another client may have had the same answer."""
    turns = Turns()
    sampled(turns, "<call>", Call("call_1", "clock", '{"zone": 1}'))
    sampled(turns, "<think>Hm.</think>Noon.", Text("Hm.", is_reasoning=True), Text("Noon."))
    answer = {"role": "assistant", "content": ""}
    for changed in (
        answered("Not I.", "call_1"),
        answer | {"tool_calls": [{"id": "call_1", "function": {"name": "clock", "arguments": '{"zone": 2}'}}]},
        answer | {"tool_calls": [{"id": "call_1", "function": {"name": "calendar", "arguments": '{"zone": 1}'}}]},
        answered("Noon."),
        answered("Noon.") | {"reasoning_content": "Other."},
    ):
        messages = [*PROMPT, changed, {"role": "user", "content": "Where?"}]
        assert turns.continued(messages, render, tokenizer, 10_000) == []


def test_another_history_is_another_turn() -> None:
    turns = Turns()
    sampled(turns, "Noon.", Text("Noon."))
    for messages in (
        PROMPT,
        [{"role": "user", "content": "What day is it?"}, answered("Noon."), {"role": "user", "content": "Where?"}],
        [{"role": "system", "content": "Lie."}, *PROMPT, answered("Noon."), {"role": "user", "content": "Where?"}],
    ):
        assert turns.continued(messages, render, tokenizer, 10_000) == []


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("start", [scripted.TOOL, scripted.TWICE, ""])
def test_of_a_conversation_over_http_only_new_tokens_are_computed(start: str, tmp_path: Path) -> None:
    """Answers with a call, with two, and with reasoning; by turns with another conversation."""
    model, tokenizer = moetier.load(scripted.write_checkpoint(tmp_path / "model", "qwen3_moe"), daemon=None)
    assert tokenizer is not None
    tokenizer.chat_template = scripted.TURNS
    with (
        model.tiers,
        answering(model, tokenizer, context=1500, chunk=64, parallel=3) as service,
        listening(application("small", service, None, 8)) as url,
        httpx2.Client(base_url=url, timeout=PATIENCE) as client,
    ):

        def ask(messages: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
            body = {"messages": messages, "tools": TOOLS, "chat_template_kwargs": {"start": start}, "temperature": 0}
            done = client.post("/v1/chat/completions", json=body)
            assert done.status_code == 200, done.text
            return done.json()["choices"][0]["message"], done.json()["usage"]

        messages: list[dict[str, Any]] = [{"role": "user", "content": "Che ora è? " * 10}]
        before = 0  # tokens whose keys and values are there
        for turn in range(4):
            answer, usage = ask(messages)
            assert usage["prompt_tokens_details"]["cached_tokens"] >= before
            before = usage["total_tokens"] - 1  # the last token was sampled, but not computed
            messages.append(answer)
            if "tool_calls" in answer:
                messages += [
                    {"role": "tool", "tool_call_id": call["id"], "content": f"{turn}"} for call in answer["tool_calls"]
                ]
            else:
                messages.append({"role": "user", "content": f"E poi {turn}?"})
            ask([{"role": "user", "content": f"Un titolo, {turn}"}])
        messages[1] = {"role": "assistant", "content": "Chi sa?"}  # the client changes something
        changed = usage["prompt_tokens_details"]["cached_tokens"]
        assert ask(messages)[1]["prompt_tokens_details"]["cached_tokens"] < changed
