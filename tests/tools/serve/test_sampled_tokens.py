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
from http_servers import answering, application, listening
from readers import PATIENCE

import moetier
from moetier.tools.serve import sampled_tokens
from moetier.tools.serve.protocols.events import Answered, Call, Event, Text
from moetier.tools.serve.sampled_tokens import SampledTokens

END, OPENING = "<end>", "<assistant>"
PROMPT = [{"role": "user", "content": "What time is it?"}]


def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


def tokens(text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


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
    return text + OPENING


def drops_reasoning(messages: Sequence[Mapping[str, Any]]) -> str:
    return render(messages, keeps_reasoning=False)


def sampled(
    turns: SampledTokens, text: str, *events: Event, messages: Sequence[Mapping[str, Any]] = PROMPT, end: str = END
) -> list[int]:
    """Note an answer; return its tokens, which differ from those of its text."""
    ids = [*(1000 + ord(letter) for letter in text), *([7] if end else [])]
    answer = Answered()
    for event in events:
        answer.add(event)
    turns.keep(messages, answer, ids, OPENING, end)
    return ids


def answered(text: str = "", *calls: str) -> dict[str, Any]:
    named = [{"id": call, "name": "clock", "arguments": {}} for call in calls]
    return {"role": "assistant", "content": text, "tool_calls": named}


def called(call: str) -> Call:
    return Call(call, "clock", "{}")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_call_is_found_by_its_id_and_not_written_anew() -> None:
    turns = SampledTokens()
    ids = sampled(turns, '<call {"name":  "clock"}>', called("call_1"))
    messages = [*PROMPT, answered("", "call_1"), {"role": "tool", "content": "Noon."}]
    continued = turns.continued(messages, render, tokenizer, 10_000)
    assert continued == [*tokens(render(PROMPT)), *ids, *tokens(f"<tool>Noon.{END}{OPENING}")]
    assert turns.continued([*PROMPT, answered("", "call_2"), messages[-1]], render, tokenizer, 10_000) == []


def test_results_that_a_template_renders_by_their_calls_are_not_changed() -> None:
    """An answer is not replayed if the text behind it would be another one."""

    def by_calls(messages: Sequence[Mapping[str, Any]]) -> str:
        names = [call["name"] for message in messages for call in message.get("tool_calls", ())]
        text = render([*messages])
        return text.replace("<tool>", f"<tool {names[0] if names else None}>")

    turns = SampledTokens()
    ids = sampled(turns, "It is:", Text("It is:"))
    start = [*PROMPT, answered("It is:"), user("What?")]
    sampled(turns, '<call {"name":  "clock"}>', called("call_1"), messages=start)
    messages = [*start, answered("", "call_1"), {"role": "tool", "content": "Noon."}]
    continued = turns.continued(messages, by_calls, tokenizer, 10_000)
    before, behind = by_calls(messages).split("It is:" + END)
    assert continued == [*tokens(before), *ids, *tokens(behind)]


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_the_first_answers_are_replayed_however_many_behind_them_are_not(rounds: int) -> None:
    def by_calls(messages: Sequence[Mapping[str, Any]]) -> str:
        names = iter([call["name"] for message in messages for call in message.get("tool_calls", ())])
        head, *results = render([*messages]).split("<tool>")
        return head + "".join(f"<tool {next(names, None)}>{result}" for result in results)

    turns = SampledTokens()
    ids = sampled(turns, "It is:", Text("It is:"))
    messages: list[dict[str, Any]] = [*PROMPT, answered("It is:"), user("What?")]
    for number in range(rounds):
        sampled(turns, '<call {"name":  "clock"}>', called(f"call_{number}"), messages=messages)
        messages += [answered("", f"call_{number}"), {"role": "tool", "content": "Noon."}]
    continued = turns.continued(messages, by_calls, tokenizer, 10_000)
    before, behind = by_calls(messages).split("It is:" + END)
    assert continued == [*tokens(before), *ids, *tokens(behind)]


def test_a_text_is_found_though_a_client_has_trimmed_it() -> None:
    turns = SampledTokens()
    ids = sampled(turns, " Noon. \n", Text(" Noon."), Text(" \n"))
    messages = [*PROMPT, answered("Noon."), user("Where?")]
    start = [*tokens(render(PROMPT)), *ids]
    assert turns.continued(messages, render, tokenizer, 10_000)[: len(start)] == start


def test_an_answer_that_was_cut_is_replayed_without_an_end() -> None:
    turns = SampledTokens()
    ids = sampled(turns, "Noo", Text("Noo"), end="")
    messages = [*PROMPT, answered("Noo"), user("Go on.")]
    continued = turns.continued(messages, render, tokenizer, 10_000)
    assert continued == [*tokens(render(PROMPT)), *ids, *tokens(f"{END}<user>Go on.{END}{OPENING}")]


@pytest.mark.parametrize("keeps", [True, False])
def test_reasoning_is_replayed_only_if_the_template_keeps_it(keeps: bool) -> None:
    turns = SampledTokens()
    ids = sampled(turns, "<think>Hm.</think>Noon.", Text("Hm.", is_reasoning=True), Text("Noon."))
    answer = answered("Noon.") | {"reasoning_content": "Hm."}
    messages = [*PROMPT, answer, user("Where?")]
    continued = turns.continued(messages, render if keeps else drops_reasoning, tokenizer, 10_000)
    start = [*tokens(render(PROMPT)), *ids]
    assert continued[: len(start)] == (start if keeps else [])


def test_answers_before_and_after_one_that_is_unknown_are_replayed() -> None:
    """One that the client has changed, and one of which the template drops the reasoning."""
    turns = SampledTokens()
    first = sampled(turns, "<call  1>", called("call_1"))
    messages = [*PROMPT, answered("", "call_1"), {"role": "tool", "content": "Noon."}]
    sampled(turns, "<think>Hm.</think>Noon.", Text("Hm.", is_reasoning=True), Text("Noon."), messages=messages)
    thought = answered("Noon.") | {"reasoning_content": "Hm."}
    for second in answered("I don't know."), thought:
        longer = [*messages, second, user("Where?")]
        last = sampled(turns, "Here,  of course.", Text("Here, of course."), messages=longer)
        longer += [answered("Here, of course."), user("Why?")]
        between = f"<tool>Noon.{END}<assistant>{second['content']}{END}<user>Where?{END}{OPENING}"
        assert turns.continued(longer, drops_reasoning, tokenizer, 10_000) == [
            *tokens(render(PROMPT)), *first, *tokens(between), *last, *tokens(f"<user>Why?{END}{OPENING}"),
        ]  # fmt: skip


def test_an_answer_that_a_client_has_changed_is_another() -> None:
    """And reasoning that it does not know stays unknown: another client may have had the same answer."""
    turns = SampledTokens()
    sampled(turns, "<call>", Call("call_1", "clock", '{"zone": 1}'))
    sampled(turns, "<think>Hm.</think>Noon.", Text("Hm.", is_reasoning=True), Text("Noon."))
    answer = {"role": "assistant", "content": ""}
    for changed in (
        answered("Not I.", "call_1"),
        answer | {"tool_calls": [{"id": "call_1", "function": {"name": "clock", "arguments": '{"zone": 2}'}}]},
        answer | {"tool_calls": [{"id": "call_1", "function": {"name": "clock", "arguments": '{"zone"'}}]},
        answer | {"tool_calls": [{"id": "call_1", "function": {"name": "calendar", "arguments": '{"zone": 1}'}}]},
        answered("Noon."),
        answered("Noon.") | {"reasoning_content": "Other."},
    ):
        assert turns.continued([*PROMPT, changed, user("Where?")], render, tokenizer, 10_000) == []


def test_another_history_is_another_answer() -> None:
    turns = SampledTokens()
    sampled(turns, "Noon.", Text("Noon."))
    for messages in (
        PROMPT,
        [user("What day is it?"), answered("Noon."), user("Where?")],
        [{"role": "system", "content": "Lie."}, *PROMPT, answered("Noon."), user("Where?")],
    ):
        assert turns.continued(messages, render, tokenizer, 10_000) == []


def test_the_least_recently_used_answers_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_tokens, "MAX_TOKENS", 20)
    monkeypatch.setattr(sampled_tokens, "ANSWER_TOKENS", 0)
    turns = SampledTokens()
    for number in range(3):
        sampled(turns, "12345", called(f"call_{number}"))  # 6 tokens
    first = [*PROMPT, answered("", "call_0")]
    assert turns.continued(first, render, tokenizer, 10_000)
    sampled(turns, "12345", called("call_3"))
    kept = [bool(turns.continued([*PROMPT, answered("", f"call_{n}")], render, tokenizer, 10_000)) for n in range(4)]
    assert kept == [True, False, True, True]


def test_a_prompt_that_is_far_too_long_is_cut() -> None:
    turns = SampledTokens()
    sampled(turns, "<call>", called("call_1"))
    messages = [*PROMPT, answered("", "call_1"), *[{"role": "tool", "content": "Noon."}] * 1000]
    assert 20 < len(turns.continued(messages, render, tokenizer, 10)) < 100


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("start", [scripted.TOOL, pytest.param(scripted.TWICE, marks=pytest.mark.slow), ""])
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
