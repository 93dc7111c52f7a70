"""Fields of text completions, each by its effect, with the unmodified openai client."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason='pip install ".[serve]"')
pytest.importorskip("uvicorn", reason='pip install ".[serve]"')

import torch
from http_servers import listening, serving
from openai import BadRequestError, OpenAI

PROMPT = "La mattina seguente, don Rodrigo"


@dataclass(frozen=True)
class Served:
    client: OpenAI
    model: Any
    tokenizer: Any

    def ask(self, prompt: Any = PROMPT, **fields: Any) -> Any:
        return self.client.completions.create(**{"model": "small", "prompt": prompt, "max_tokens": 6} | fields)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def logprobs(self, ids: list[int]) -> Any:
        """Return the log probabilities after each token [tokens, vocabulary], by the model's own forward."""
        with torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


@pytest.fixture(scope="module")
def app(tinymix_4bit: Path) -> Iterator[Any]:
    with serving(tinymix_4bit, context=400) as found:
        yield found


@pytest.fixture
def served(app: Any) -> Iterator[Served]:
    application, service = app
    with (
        listening(application) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(client, service.model, service.tokenizer)


def refused(served: Served, **fields: Any) -> Any:
    with pytest.raises(BadRequestError) as error:
        served.ask(**fields)
    return error.value


def test_a_bias_decides_which_token_comes(served: Served) -> None:
    token = served.ids(" la")[-1]
    answer = served.ask(logit_bias={str(token): 100}, temperature=1)
    assert answer.choices[0].text == served.tokenizer.decode([token] * 6)
    plain = served.ask(temperature=0, logprobs=0, max_tokens=1)
    first = served.ids(plain.choices[0].text)[-1]
    assert (
        served.ask(temperature=0, max_tokens=1, logit_bias={str(first): -100}).choices[0].text != plain.choices[0].text
    )
    assert refused(served, logit_bias={"99999999": 1}).param == "logit_bias"
    assert refused(served, logit_bias={"-1": 1}).param == "logit_bias"
    assert refused(served, logit_bias={"1": 101}).param == "logit_bias"


def test_several_answers_differ_by_their_seeds(served: Served) -> None:
    several = served.ask(n=3, seed=5, temperature=1)
    alone = [served.ask(seed=5 + number, temperature=1) for number in range(3)]
    assert [choice.text for choice in several.choices] == [each.choices[0].text for each in alone]
    assert len({choice.text for choice in several.choices}) > 1
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert several.usage.completion_tokens == 18
    pieces = [*served.ask(n=3, seed=5, temperature=1, stream=True)]
    texts = ["".join(piece.choices[0].text for piece in pieces if piece.choices[0].index == at) for at in range(3)]
    assert texts == [choice.text for choice in several.choices]
    assert [piece.usage is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].usage.completion_tokens == 18


def test_several_prompts_are_texts_or_token_ids(served: Served) -> None:
    prompts = [PROMPT, "Agnese e"]
    alone = [served.ask(prompt, temperature=0) for prompt in prompts]
    expected = [each.choices[0].text for each in alone]
    ids = [served.ids(prompt) for prompt in prompts]
    for several in served.ask(prompts, temperature=0), served.ask(ids, temperature=0):
        assert [choice.text for choice in several.choices] == expected
        assert several.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)
    assert served.ask(ids[1], temperature=0).choices[0].text == expected[1]
    twice = served.ask(prompts, n=2, temperature=0)
    assert [choice.text for choice in twice.choices] == [expected[0], expected[0], expected[1], expected[1]]
    for wrong in ([], [[]], [1, "a"], [[1, "a"]], [1.5], [True], [-1], [1 << 40], [[1 << 31]], [99_999_999], {}, 5):
        assert refused(served, prompt=wrong).param == "prompt"
    assert refused(served, prompt=["a"] * 1000, n=2).param == "prompt"


def test_log_probabilities_are_those_of_the_model(served: Served) -> None:
    asked = {"temperature": 1, "seed": 3, "logprobs": 4, "presence_penalty": 1}
    (choice,) = served.ask(**asked).choices
    logprobs, ids = choice.logprobs, served.ids(PROMPT)
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    for text, value, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        expected = served.logprobs(ids)[-1]
        token = next(at for at in expected.argsort(descending=True).tolist() if served.tokenizer.decode([at]) == text)
        assert value == pytest.approx(float(expected[token]), abs=0.05)
        assert sorted(top.values(), reverse=True)[:4] == pytest.approx(expected.topk(4).values.tolist(), abs=0.05)
        assert 4 <= len(top) <= 5
        ids.append(token)
    pieces = [piece.choices[0] for piece in served.ask(**asked, stream=True)]
    streamed = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    assert [value for part in streamed for value in part.token_logprobs] == logprobs.token_logprobs
    assert [offset for part in streamed for offset in part.text_offset] == logprobs.text_offset
    assert served.ask().choices[0].logprobs is None
    assert refused(served, logprobs=21).param == "logprobs"
    assert refused(served, logprobs=20, n=128, max_tokens=300).param == "logprobs", "too many are kept"


@pytest.mark.parametrize("most", [0, 1])
def test_prompts_are_scored_as_evaluations_ask(served: Served, most: int) -> None:
    """Requests of lm_eval's local-completions: several prompts as token ids, with what follows them at their ends."""
    ids = [served.ids(PROMPT + " era la mattina di un giorno " * 14), served.ids("Agnese e Lucia")]
    assert len(ids[0]) > 128, "the first is scored in several parts"
    served.ask(ids[0][:-5])  # the cache has it
    answer = served.ask(ids, max_tokens=most, logprobs=1, echo=True, seed=1, temperature=0)
    assert answer.usage.completion_tokens == most * 2
    for prompt, choice in zip(ids, answer.choices, strict=True):
        values, top = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert len(values) == len(prompt) + most
        assert values[0] is top[0] is None
        expected = served.logprobs(prompt)
        own = [float(logprobs[token]) for logprobs, token in zip(expected, prompt[1:], strict=False)]
        assert values[1 : len(prompt)] == pytest.approx(own, abs=0.05)
        assert [max(each.values()) for each in top[1:]] == pytest.approx(
            expected.max(-1).values.tolist()[: len(top) - 1], abs=0.05
        )
        assert choice.text.startswith(served.tokenizer.decode(prompt))


def test_an_echo_is_the_prompt_and_the_answer(served: Served) -> None:
    answer = served.ask(temperature=0).choices[0].text
    assert served.ask(temperature=0, echo=True).choices[0].text == PROMPT + answer
    assert served.ask(echo=True, max_tokens=0).choices[0].text == PROMPT
    pieces = [piece.choices[0].text for piece in served.ask(temperature=0, echo=True, stream=True)]
    assert (pieces[0], "".join(pieces)) == (PROMPT, PROMPT + answer)
    assert refused(served, max_tokens=0).param == "max_tokens"


@pytest.mark.parametrize(
    ("options", "with_usage"), [(None, [-1]), ({"include_usage": True}, [-1]), ({"include_usage": False}, [])]
)
def test_the_usage_is_where_the_request_wants_it(served: Served, options: Any, with_usage: list[int]) -> None:
    pieces = [*served.ask(stream=True, **({} if options is None else {"stream_options": options}))]
    assert [at for at, piece in enumerate(pieces, -len(pieces)) if piece.usage is not None] == with_usage
    assert bool(pieces[-1].choices) == (options != {"include_usage": True})
