"""Prompt cache: keys and values of a conversation, kept from turn to turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .compat import CACHE
from .decoding import can_resume


class PromptCache:
    """Keys and values of one sequence. The next sequence computes only the tokens that differ from its beginning.

    Call ``begin`` before ``generate(**options)``, and ``end`` after it, even if it raised. Nothing is kept for a model
    that can't resume in the middle of a prompt. A full sliding window can't be cut: the prompt is computed anew.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps = can_resume(model)
        self._cache: Any = None
        self._ids: list[int] = []  # tokens whose keys and values are in the cache

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for ``generate()``, which refuses a cache if generation_config.json names an implementation."""
        return {CACHE: self._cache, "use_cache": True, "cache_implementation": None} if self._keeps else {}

    def begin(self, ids: Sequence[int]) -> int:
        """Return how many of the first ``ids`` need not be computed: fewer than all."""
        if not self._keeps:
            return 0
        self._cut(min(_common(self._ids, ids), len(ids) - 1))
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return len(self._ids)

    def end(self, ids: Sequence[int]) -> None:
        """Keep what every layer has of ``ids``, which began the sequence that was computed since ``begin``.

        For a generation that was interrupted, these are the prompt.
        """
        if self._cache is not None:
            self._ids = list(ids)
            self._cut(min(len(ids), *(layer.get_seq_length() for layer in self._cache.layers)))

    @property
    def length(self) -> int:
        """Number of tokens whose keys and values every layer has, between ``end`` and ``begin``."""
        return len(self._ids)

    def clear(self) -> None:
        """Drop the cached keys and values of all tokens."""
        self._cache, self._ids = None, []

    def _cut(self, length: int) -> None:
        """Keep the first ``length`` tokens, or none if a layer can't be cut."""
        if self._cache is None:
            return
        layers = self._cache.layers
        beyond = [layer.get_seq_length() - length for layer in layers]
        if length and all(_can_lose(layer, count) for layer, count in zip(layers, beyond, strict=True)):
            for layer, count in zip(layers, beyond, strict=True):
                layer.crop(-count) if count else None
            self._ids = self._ids[:length]
        else:
            self.clear()


def _can_lose(layer: Any, tokens: int) -> bool:
    """Return whether a layer can be cut. A full window has lost the tokens that would come back into it."""
    return not tokens or not layer.is_sliding or layer.get_seq_length() < layer.sliding_window


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(some, others, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
