"""The next prompt of a conversation begins with the tokens that the model has sampled, if the template keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

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


def sampled(turns: Turns, text: str, *deltas: dict[str, Any]) -> list[int]:
    """Tokens of PROMPT and an answer, which differ from those of their text."""
    ids = [*tokenizer(render(PROMPT))["input_ids"], *(1000 + ord(letter) for letter in text), 7]
    turns.note(render(PROMPT), deltas, ids, END)
    return ids


def answered(text: str = "", *calls: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": [{"id": call, "name": "clock"} for call in calls]}


def test_a_call_is_found_by_its_id_and_not_written_anew() -> None:
    turns = Turns()
    ids = sampled(turns, '<call {"name":  "clock"}>', {"tool_calls": [{"id": "call_1"}]})
    messages = [*PROMPT, answered("", "call_1"), {"role": "tool", "content": "Noon."}]
    found = turns.continued(messages, render, tokenizer, 10_000)
    assert found == [*ids, *tokenizer(f"<tool>Noon.{END}<assistant>")["input_ids"]]
    assert turns.continued([*PROMPT, answered("", "call_2"), messages[-1]], render, tokenizer, 10_000) == []


def test_a_text_is_found_though_a_client_has_trimmed_it() -> None:
    turns = Turns()
    ids = sampled(turns, " Noon. \n", {"content": " Noon."}, {"content": " \n"})
    messages = [*PROMPT, answered("Noon."), {"role": "user", "content": "Where?"}]
    assert turns.continued(messages, render, tokenizer, 10_000)[: len(ids)] == ids


@pytest.mark.parametrize("keeps", [True, False])
def test_reasoning_is_replayed_only_if_the_template_keeps_it(keeps: bool) -> None:
    turns = Turns()
    ids = sampled(turns, "<think>Hm.</think>Noon.", {"reasoning_content": "Hm."}, {"content": "Noon."})
    messages = [*PROMPT, answered("Noon."), {"role": "user", "content": "Where?"}]
    found = turns.continued(messages, lambda given: render(given, keeps_reasoning=keeps), tokenizer, 10_000)
    assert found[: len(ids)] == (ids if keeps else [])


def test_another_history_is_another_turn() -> None:
    turns = Turns()
    sampled(turns, "Noon.", {"content": "Noon."})
    for messages in (
        PROMPT,
        [{"role": "user", "content": "What day is it?"}, answered("Noon."), {"role": "user", "content": "Where?"}],
        [{"role": "system", "content": "Lie."}, *PROMPT, answered("Noon."), {"role": "user", "content": "Where?"}],
    ):
        assert turns.continued(messages, render, tokenizer, 10_000) == []
