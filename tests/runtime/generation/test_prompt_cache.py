"""What is computed anew, counted as tokens that go through the embedding; and that it gives what a cold start gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_model

from moetier.runtime.generation.prompt_cache import PromptCache
from moetier.runtime.model.context import can_resume
from moetier.runtime.moe.experts import experts_modules

NEW = 3  # tokens of an answer: the last of them goes through no layer


class Talk:
    """A model, what it keeps, and how many tokens of the last prompt it computed."""

    def __init__(self, model_type: str, **changes: Any) -> None:
        self.model: Any = tiny_model(model_type, torch.float32, **changes)
        self.kept = PromptCache(self.model)
        self.computed: list[int] = []
        self.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, given: self.computed.append(given[0].numel())
        )

    def turn(self, ids: list[int], **options: Any) -> list[int]:
        """The prompt with the answer. What is kept is said, and is what is not computed; the first logits are those of
        a cold start."""
        known = self.kept.begin(ids)
        sequence, logits = self.generate(ids, **self.kept.options, **options)
        prefilled = sum(self.computed) - (NEW - 1)
        assert prefilled == len(ids) - known
        self.kept.end(sequence)
        torch.testing.assert_close(logits, self.generate(ids)[1], rtol=1e-3, atol=1e-4)
        self.computed = [prefilled]
        return sequence

    def generate(self, ids: list[int], **options: Any) -> tuple[list[int], torch.Tensor]:
        self.computed.clear()
        prompt = torch.tensor([ids])
        found = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return found.sequences[0].tolist(), found.logits[0]


def some(count: int, seed: int = 1) -> list[int]:
    return torch.randint(2, 250, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_turn_computes_what_is_new(model_type: str) -> None:
    talk = Talk(model_type, sliding_window=None)
    first = talk.turn(some(40))
    assert talk.computed == [40]
    second = talk.turn([*first, *some(6, 2)])
    assert talk.computed == [7]  # the last token of the answer, and what was said
    talk.turn([*second[:44], *some(9, 3)])  # a template that rewrites what was said
    assert talk.computed == [9]
    same = [*second[:44], *some(9, 3)]
    talk.turn(same)  # the same once more: something has to be computed
    assert talk.computed == [1]
    talk.turn(some(20, 4))
    assert talk.computed == [20]
    talk.kept.clear()
    talk.turn(some(20, 4))
    assert talk.computed == [20]


def test_what_is_new_goes_in_chunks() -> None:
    talk = Talk("mixtral")
    first = talk.turn(some(20), prefill_chunk_size=8)
    talk.turn([*first, *some(20, 2)], prefill_chunk_size=8)
    assert talk.computed == [21]


def test_a_full_window_goes_on_and_takes_nothing_back() -> None:
    talk = Talk("gpt_oss")  # every other layer sees 16 tokens
    assert can_resume(talk.model)
    first = talk.turn(some(8))
    talk.turn([*first[:6], *some(3, 2)])
    assert talk.computed == [3]  # not full yet
    full = talk.turn(some(30, 3))
    longer = talk.turn([*full, *some(5, 4)])
    assert talk.computed == [6]
    talk.turn([*longer[:33], *some(5, 5)])
    assert talk.computed == [38]


@pytest.mark.parametrize("model_type", ["jamba", "qwen3_next", "lfm2_moe"])
def test_a_state_that_can_not_go_on_is_not_kept(model_type: str) -> None:
    talk = Talk(model_type)
    first = talk.turn(some(12))
    talk.turn([*first, *some(4, 2)])
    assert talk.computed == [12 + NEW + 4]


@pytest.mark.parametrize(("window", "kept"), [(None, 16), (16, 0)])
def test_of_a_prefill_that_was_cut_whole_chunks_are_kept(window: int | None, kept: int) -> None:
    """The third chunk of 8 tokens ends in the second layer: some layers have it, others do not. A window of 16 tokens
    is full by then."""
    talk, calls = Talk("mixtral", sliding_window=window), []

    def cut(*_: object) -> None:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("cut")

    handle = [*experts_modules(talk.model).values()][1].register_forward_pre_hook(cut)
    ids = some(30)
    talk.kept.begin(ids)
    with pytest.raises(RuntimeError, match="cut"):
        talk.generate(ids, **talk.kept.options, prefill_chunk_size=8)
    handle.remove()
    talk.kept.end(ids)
    talk.turn(ids)
    assert talk.computed == [30 - kept]


def test_a_generation_is_stopped_between_layers_and_between_tokens() -> None:
    """A prompt without a new token; then with as many tokens as were wanted."""
    kept, ids = Talk("mixtral").kept, some(20)
    options: Any = {"chunk": 8, "max_new_tokens": NEW, "do_sample": False}
    tokens: list[int] = []
    kept.begin(ids)
    whole = kept.generate(ids, should_stop=lambda: False, on_token=tokens.append, **options)
    assert (whole, len(tokens)) == (ids + tokens, NEW)
    kept.clear()
    kept.begin(ids)
    assert kept.generate(ids, should_stop=lambda: True, **options) == ids
    assert kept.length == 0
    kept.begin(ids)
    some_tokens: list[int] = []
    kept.generate(ids, should_stop=lambda: len(some_tokens) == 2, on_token=some_tokens.append, **options)
    assert some_tokens == tokens[:2]
