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


def test_the_values_that_are_not_given_have_their_source() -> None:
    of_model = "from the model's generation_config.json:"
    options = AnswerOptions({"max_new_tokens": 9}, GenerationConfig(do_sample=False, temperature=None, top_k=None))
    assert str(options) == "max_new_tokens 9, seed 0; by default: temperature 0"
    options.set("top_k", "7")  # turns sampling on
    assert str(options) == "max_new_tokens 9, top_k 7, seed 0; by default: temperature 1"
    qwen3 = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    options = AnswerOptions({}, qwen3)
    assert str(options) == f"seed 0; {of_model} temperature 0.6, top_k 20, top_p 0.95"
    options.set("temperature", "0")
    assert str(options) == "temperature 0, seed 0"


def test_the_defaults_of_transformers_are_not_said_to_be_the_models() -> None:
    options = AnswerOptions({}, GenerationConfig())
    assert str(options) == "seed 0; by default: temperature 0"
    options.set("temperature", "0.8")
    assert str(options) == "temperature 0.8, seed 0; by default: top_k 50"
    options = AnswerOptions({}, GenerationConfig(do_sample=True, top_p=0.9, repetition_penalty=1.1))
    of_model = "from the model's generation_config.json: top_p 0.9, repetition_penalty 1.1"
    assert str(options) == f"seed 0; {of_model}; by default: temperature 1, top_k 50"
    assert str(AnswerOptions({})) == "seed 0; by default: temperature 0"


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
    with pytest.raises(ConfigError, match=f"^{name}\\b"):
        options.set(name, text)
    assert str(options) == before


def test_an_unknown_option_is_named_with_the_others() -> None:
    with pytest.raises(ConfigError, match="no option heat") as caught:
        AnswerOptions({}).set("heat", "1")
    assert all(name in caught.value.fix for name in DECODING)
