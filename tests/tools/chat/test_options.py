from __future__ import annotations

import pytest

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
