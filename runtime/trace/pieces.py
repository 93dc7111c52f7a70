"""The text of each token. Together they are the text of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4  # tokens that one character of UTF-8 can be spread over


def pieces_of(tokenizer: Any, token_ids: Sequence[int]) -> tuple[str, ...]:
    """One for each token: what it adds to the text before it. A character of several tokens is the last one's."""
    pieces = []
    before = begun = 0  # token_ids[before:begun] is the context, whose text is told
    for end in range(1, len(token_ids) + 1):
        told, text = (_decode(tokenizer, token_ids[before:stop]) for stop in (begun, end))
        if text.endswith(UNFINISHED) and end - begun < LONGEST and end < len(token_ids):
            pieces.append("")
            continue
        pieces.append(text[len(told) :])
        before, begun = begun, end
    return tuple(pieces)


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
