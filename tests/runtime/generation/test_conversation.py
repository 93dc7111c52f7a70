from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moetier.runtime.generation.conversation import Conversation
from moetier.tiers.errors import ConfigError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role.') }}{% endif %}" + CHATML


@pytest.fixture
def tokenizer(tinymix: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tinymix)


def conversation(
    tokenizer: Any, *, system: str | None = "Be brief.", context: int = 200, room: int = 20
) -> Conversation:
    return Conversation(tokenizer, system=system, context=context, answer_tokens=room)


def test_a_model_without_a_template_gets_a_plain_one(tokenizer: Any) -> None:
    talk = conversation(tokenizer)
    assert talk.is_plain
    assert tokenizer.decode(talk.prompt("Hello?")) == "Be brief.\n\nUser:\nHello?\n\nAssistant:\n"
    talk.add("Hello?", "Yes.")
    expected = "Be brief.\n\nUser:\nHello?\n\nAssistant:\nYes.\n\nUser:\nWho?\n\nAssistant:\n"
    assert tokenizer.decode(talk.prompt("Who?")) == expected


def test_the_models_own_template_says_how_it_is_put(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    talk = conversation(tokenizer, system=None)
    assert not talk.is_plain
    talk.add("Hello?", "<think>Hm.</think>Yes.")
    text = tokenizer.decode(talk.prompt("Who?"))
    assert "Yes.<|im_end|>" in text
    assert "Hm." not in text
    assert talk.messages[1]["content"] == "<think>Hm.</think>Yes."


def test_a_prompt_begins_with_the_tokens_that_were_sampled(tokenizer: Any) -> None:
    """The same text may have other tokens. They are not used if the template has changed the text."""
    tokenizer.chat_template = CHATML

    def begun(answer: str) -> tuple[list[int], list[int]]:
        talk = conversation(tokenizer, system=None, context=400)
        letters = [tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in answer]
        ids = [*talk.prompt("Hello?"), *(token for tokens in letters for token in tokens)]
        talk.add("Hello?", answer, [*ids, *tokenizer.all_special_ids[:1]])
        return ids, talk.prompt("Who?")

    ids, found = begun("Nobody at all.")
    assert found[: len(ids)] == ids
    assert tokenizer.decode(found).endswith(
        "Nobody at all.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found != tokenizer(tokenizer.decode(found))["input_ids"]
    ids, found = begun("<think>Hm.</think>Nobody.")
    assert found[: len(ids)] != ids
    assert "Hm." not in tokenizer.decode(found)


def test_what_a_template_refuses_is_reported_at_the_start(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM
    conversation(tokenizer, system=None)
    with pytest.raises(ConfigError, match="No system role") as caught:
        conversation(tokenizer)
    assert "--system" in caught.value.fix


def test_an_answer_that_the_template_refuses_does_not_stay(tokenizer: Any) -> None:
    """As that of a tool call which was cut: else no later message could be answered."""
    refuses = "{% for m in messages if '<tool_call>' in m.content and '</tool_call>' not in m.content %}"
    tokenizer.chat_template = refuses + "{{ raise_exception('A call has no end.') }}{% endfor %}" + CHATML
    talk = conversation(tokenizer, system=None)
    talk.add("Hello?", "Yes.")
    with pytest.raises(ConfigError, match="A call has no end") as caught:
        talk.add("Who?", "<tool_call>{")
    assert "This turn is left out" in caught.value.cause
    assert [message["content"] for message in talk.messages] == ["Hello?", "Yes."]
    assert "Yes.<|im_end|>" in tokenizer.decode(talk.prompt("Who?"))


def test_the_oldest_turns_go_when_the_context_is_full(tokenizer: Any) -> None:
    """Half of it is free then, so that the next turns find room; the system prompt stays, and all is still saved."""
    talk, lengths, out = conversation(tokenizer), [], []
    for number in range(30):
        ids = talk.prompt(f"This is number {number}.")
        text = tokenizer.decode(ids)
        assert text.startswith("Be brief.\n\nUser:\n")
        assert text.endswith(f"number {number}.\n\nAssistant:\n")
        talk.add(f"This is number {number}.", "So it is, and so it was.")
        lengths.append(len(ids))
        out.append(talk.left_out)
    assert max(lengths) <= 200 - 20
    after = [number for number in range(1, 30) if out[number] > out[number - 1]]
    assert all(later - earlier > 2 for earlier, later in pairwise(after))
    assert len(after) > 1
    assert all(lengths[number] <= 100 for number in after)
    assert len(talk.messages) == 61
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert talk.left_out == 0


def test_a_message_longer_than_the_context_is_refused(tokenizer: Any) -> None:
    talk = conversation(tokenizer)
    talk.add("Hello?", "Yes.")
    with pytest.raises(ConfigError, match="the context has only 200") as caught:
        talk.prompt("no " * 200)
    assert "--context" in caught.value.fix
    assert talk.left_out == 0  # what was said before is still there
    talk.prompt("Who?")


def test_a_message_of_any_size_is_refused_at_once(tokenizer: Any) -> None:
    """12 MB, of which a tokenizer reads some MB a second; turns that are left out do not make it shorter."""
    conversation = Conversation(tokenizer, system=None, context=100, answer_tokens=10)
    conversation.add("Who is there?", "A friend.")
    conversation.add("What friend?", "Yours.")
    began = time.process_time()
    with pytest.raises(ConfigError, match="takes more than 200 tokens, but the context has only 100"):
        conversation.prompt("To be, or not to be: " * 600_000)
    assert time.process_time() - began < 2
    assert conversation.left_out == 0


def test_what_a_template_refuses_replaces_nothing(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM
    talk = conversation(tokenizer, system=None)
    said = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]
    talk.load(said)
    with pytest.raises(ConfigError, match="No system role"):
        talk.set_system("Be brief.")
    with pytest.raises(ConfigError, match="No system role"):
        talk.load([{"role": "system", "content": "Be brief."}])
    with pytest.raises(ConfigError, match="alternately"):
        talk.load(said[:1])
    assert (talk.system, talk.messages) == (None, said)


def test_a_turn_that_is_taken_back_can_be_put_back(tokenizer: Any) -> None:
    talk = conversation(tokenizer)
    talk.add("Hello?", "Yes.")
    talk.add("Who?", "I.")
    taken = talk.take_back()
    assert [message["content"] for message in taken] == ["Who?", "I."]
    assert [message["content"] for message in talk.messages] == ["Be brief.", "Hello?", "Yes."]
    talk.put_back(taken)
    assert talk.messages[-1]["content"] == "I."
    talk.set_system("Be long.")
    assert [message["content"] for message in talk.messages][:2] == ["Be long.", "Hello?"]
