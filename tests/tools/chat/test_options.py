from __future__ import annotations

import pytest
from transformers import GenerationConfig

from moetier.runtime.generation.decoding import DECODING
from moetier.tiers.errors import ConfigError
from moetier.tools.chat.options import AnswerOptions


def test_an_option_changes_and_returns_to_that_of_the_command_line() -> None:
    options = AnswerOptions({"temperature": 0.0, "max_new_tokens": 9})
    assert options.decoding()["do_sample"] is False
    options.set("temperature", "0.5")
    options.set("--top-k", "7")  # as on the command line
    assert (options.decoding()["temperature"], options.decoding()["top_k"]) == (0.5, 7)
    options.set("max_new_tokens", "3")
    assert options.max_new_tokens == 3
    for name in ("temperature", "top_k", "max_new_tokens"):
        options.set(name, "")
    assert options.max_new_tokens == 9
    assert options.decoding() == AnswerOptions({"temperature": 0.0, "max_new_tokens": 9}).decoding()
    assert "max_new_tokens" not in options.decoding()


def test_the_values_that_are_not_given_are_those_of_the_model() -> None:
    from_model = "from the model's generation_config.json:"
    greedy = GenerationConfig(do_sample=False, temperature=None, top_k=None)
    options = AnswerOptions({"max_new_tokens": 9}, greedy)
    assert str(options).startswith(f"max_new_tokens 9, seed 0; {from_model} temperature 0")
    options.set("top_k", "7")  # turns sampling on
    assert str(options).startswith(f"max_new_tokens 9, top_k 7, seed 0; {from_model} temperature 1")
    qwen3 = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    options = AnswerOptions({}, qwen3)
    assert str(options).startswith(f"seed 0; {from_model} temperature 0.6, top_k 20, top_p 0.95")
    options.set("temperature", "0")
    assert "top_k" not in str(options)


def test_each_answer_has_another_seed() -> None:
    options = AnswerOptions({"seed": 5})
    assert [options.next_seed(), options.next_seed()] == [5, 6]
    options.set("seed", "70")
    assert [options.next_seed(), options.next_seed()] == [70, 71]


@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("text", ["x", "-7", "1e999", "nan"])
def test_what_is_no_value_changes_nothing(name: str, text: str) -> None:
    options = AnswerOptions({})
    before = str(options)
    with pytest.raises(ConfigError):
        options.set(name, text)
    assert str(options) == before


def test_an_unknown_option_is_named_with_the_others() -> None:
    with pytest.raises(ConfigError, match="no option heat") as caught:
        AnswerOptions({}).set("heat", "1")
    assert all(name in caught.value.fix for name in DECODING)
