from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ASSETS

from moetier.runtime.trace.recorder import UNFINISHED, pieces_of

TINYMIX = ASSETS / "tinymix"


@cache
def loaded() -> Any:
    return transformers.AutoTokenizer.from_pretrained(TINYMIX)


@pytest.fixture
def tokenizer() -> Any:
    return loaded()


def test_each_token_has_what_it_adds(tokenizer: Any) -> None:
    text = "def read_lines(path):\n    return 1"
    token_ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, token_ids)
    assert len(pieces) == len(token_ids)
    assert "".join(pieces) == text
    assert pieces[0] == "def"
    assert all(pieces)


def test_a_character_of_several_tokens_is_the_last_ones(tokenizer: Any) -> None:
    token_ids = tokenizer("a🦉b")["input_ids"]
    assert len(token_ids) == 6  # the owl takes four bytes, which this vocabulary has no word for
    assert pieces_of(tokenizer, token_ids) == ("a", "", "", "", "🦉", "b")


def test_what_is_cut_is_shown_as_such(tokenizer: Any) -> None:
    token_ids = tokenizer("a🦉b")["input_ids"]
    assert pieces_of(tokenizer, token_ids[:3]) == ("a", "", UNFINISHED)
    assert pieces_of(tokenizer, token_ids[:2] * 3)[-1].endswith(UNFINISHED)
    assert pieces_of(tokenizer, []) == ()


def test_bytes_that_are_no_character_hold_nothing_up(tokenizer: Any) -> None:
    """A model may write anything; no piece waits for more than four tokens."""
    cut = tokenizer("🦉")["input_ids"][1]
    pieces = pieces_of(tokenizer, [cut] * 21)
    assert all(any(pieces[start : start + 4]) for start in range(0, 20, 4))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=UNFINISHED), max_size=40))
def test_together_they_are_the_text(text: str) -> None:
    tokenizer = loaded()
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    assert not any(UNFINISHED in piece for piece in pieces)
