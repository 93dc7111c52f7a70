"""Longest context of a model, and the tokens of a text that may be longer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .config import DEFAULT_CONTEXT

STRETCHING = {"linear", "dynamic", "yarn"}  # rope types whose factor multiplies the original length
_CHARACTERS = 16  # per token of the limit: the first beginning that is tokenised
_LEAST = 1 << 16  # characters of that beginning, at least
_GROWTH = 4  # each beginning is so many times as long as the one before
_MARGIN = 2  # a beginning with so many times the tokens that are allowed proves that the whole has too many


def longest_context(config: Any) -> int | None:
    """Return the tokens, prompt and answer together, that a model was made for; None if its config names no maximum.

    ``config`` is the model's, as transformers has it: of several modalities the text model's counts. A sliding window
    limits what a layer sees, and not the length. Scaled rotary embeddings may reach further than
    ``max_position_embeddings``, which some checkpoints leave at the original length.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    return max(stated, *(round(reach) for reach in _reaches(getattr(text, "rope_parameters", None), stated)), 0)


def _reaches(rope: Any, stated: int) -> Iterator[float]:
    """Yield the length that scaled rotary embeddings reach, of all layers or of each type of layer."""
    if not isinstance(rope, Mapping):
        return
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or stated
    if rope.get("rope_type") in STRETCHING and isinstance(factor, int | float):
        yield factor * original
    for layers in rope.values():
        yield from _reaches(layers, stated)


def context_of(config: Any, tokens: int) -> int:
    """Return the tokens that memory is kept for: ``tokens``, but of the default no more than the model was made for."""
    longest = longest_context(config)
    return min(tokens, longest) if longest and tokens == DEFAULT_CONTEXT else tokens


def first_ids(tokenizer: Any, text: str, most: int | None, **options: Any) -> list[int]:
    """Return the token ids of ``text``, or of a beginning that alone has far more than ``most`` tokens.

    So the length of the result is above ``most`` exactly if that of the whole is, and a text of any size is refused
    in the time that a few times ``most`` tokens take. ``options`` are keyword arguments of the tokenizer.

    A token may stand for any number of characters (runs of blanks, unknown words), so no number of bytes proves
    anything for every tokenizer. A beginning does: cutting a text changes tokens near the cut alone.
    """
    if most is not None:
        length = max(_CHARACTERS * most, _LEAST)
        while length < len(text):
            ids = _ids(tokenizer, text[:length], options)
            if len(ids) > _MARGIN * most:
                return ids
            length *= _GROWTH
    return _ids(tokenizer, text, options)


def counted(tokens: int, most: int) -> str:
    """Format the length of what ``first_ids`` returned: "3,005", or "more than 4,096" where not all were counted."""
    return f"{tokens:,}" if tokens <= _MARGIN * most else f"more than {_MARGIN * most:,}"


def _ids(tokenizer: Any, text: str, options: Mapping[str, Any]) -> list[int]:
    found: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]  # else it warns of what callers refuse
    return found
