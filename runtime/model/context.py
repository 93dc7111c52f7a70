"""Longest context of a model, whether it can resume in it, and tokens of a text that may be too long for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moetier.runtime.libraries.transformers_internals import can_use_dynamic_cache

STRETCHING = {"linear", "dynamic", "yarn"}  # rope types whose factor multiplies the original length
# transformers' layers of a cache: with keys and values, and with a state besides or nothing
_PLAIN = {"DynamicLayer", "DynamicSlidingWindowLayer"}
_BOTH = {"LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer"}
_STATES = {"LinearAttentionLayer", *_BOTH}
_INDEXED = {"DynamicIndexedLayer"}  # with keys of an index besides keys and values
# types that can't resume though their layers are known. jamba computes several tokens behind others as if the
# recurrent state were 0
_LACKING = {"jamba"}
SNAPSHOT_TOKENS = 2048  # a copy of such a state is kept at each multiple of this many tokens
_CHARACTERS = 16  # length of the first prefix that is tokenised, in characters for each allowed token
_LEAST = 1 << 16  # least length of that prefix, in characters
_GROWTH = 4  # each prefix is this many times as long as the one before
_MARGIN = 2  # a prefix with more than this many times the allowed tokens proves that the text has too many


def longest_context(config: Any) -> int | None:
    """Return a model's maximum context in tokens, prompt and answer together; None if its config has no maximum.

    ``config`` is the model's config in transformers. For a multimodal model, the part of the text model counts. A
    sliding window does not limit the context. Scaled rotary embeddings may reach further than
    ``max_position_embeddings``, which some checkpoints leave at the original length.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    return max(stated, *(round(reach) for reach in _reaches(getattr(text, "rope_parameters", None), stated)), 0)


def _reaches(rope: Any, stated: int) -> Iterator[float]:
    """Yield the contexts (in tokens) that scaled rotary embeddings reach: one for all layers, or one for each type."""
    if not isinstance(rope, Mapping):
        return
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings") or stated
    if rope.get("rope_type") in STRETCHING and isinstance(factor, int | float):
        yield factor * original
    for layers in rope.values():
        yield from _reaches(layers, stated)


def can_resume(model: Any) -> bool:
    """Return whether a model can resume in the middle of a prompt, from what it has kept of earlier tokens.

    That must be keys and values, and states and keys of an index that transformers' own layers of a cache have
    (``has_states``, ``has_index``). At least one layer must have keys and values.
    """
    if not can_use_dynamic_cache(model) or model.generation_config.use_cache is False:
        return False
    config = model.config.get_text_config()
    layers = _cache_layers(model)
    known = _PLAIN | _STATES | _INDEXED | {"DummyLayer"}
    rope = getattr(config, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    return (
        bool(layers & (_PLAIN | _BOTH | _INDEXED))
        and not layers - known
        and config.model_type not in _LACKING
        and "longrope" not in types  # its angles depend on the chunk's length
    )


def has_states(model: Any) -> bool:
    """Return whether a model has a state of constant size besides keys and values: linear attention, a convolution."""
    return bool(_cache_layers(model) & _STATES)


def has_index(model: Any) -> bool:
    """Return whether a model keeps keys of an index besides keys and values, by which attention chooses positions."""
    return bool(_cache_layers(model) & _INDEXED)


def _cache_layers(model: Any) -> set[str]:
    """Return the names of transformers' layers in a cache of a model."""
    from transformers import DynamicCache

    return {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}


def first_ids(tokenizer: Any, text: str, most: int | None, **options: Any) -> list[int]:
    """Return the token ids of ``text``, or of a prefix of it that has far more than ``most`` tokens.

    The result has more than ``most`` ids if and only if the whole text has. So a text of any size can be refused in the
    time that a few times ``most`` tokens take. With ``most`` None, the whole text is tokenised. ``options`` are keyword
    arguments of the tokenizer.

    A token may stand for any number of characters (runs of blanks, unknown words), so the size of a text does not prove
    that it has too many tokens. The tokens of a prefix do: cutting a text changes only the tokens near the cut.
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
    """Format the number of ids that ``first_ids`` returned for ``most``: "3,005", or "more than 8,192" for a prefix."""
    return f"{tokens:,}" if tokens <= _MARGIN * most else f"more than {_MARGIN * most:,}"


def _ids(tokenizer: Any, text: str, options: Mapping[str, Any]) -> list[int]:
    return tokenizer(text, verbose=False, **options)["input_ids"]  # verbose=True would warn of long texts
