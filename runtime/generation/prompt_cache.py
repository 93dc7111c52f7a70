"""The keys and values of a conversation, kept from turn to turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .compat import CACHE
from .decoding import goes_on


class KeptCache:
    """Of one sequence at a time: the next that begins with the same tokens computes only what is new.

    ``begin`` goes before ``generate(**options)``, ``end`` behind it, whatever came of it. Of a model that does not go
    on in the middle of a prompt nothing is kept, and of a sliding window that is full nothing can be taken back: then
    the prompt is computed anew.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps = goes_on(model)
        self._cache: Any = None
        self._ids: list[int] = []  # whose keys and values the cache has

    @property
    def options(self) -> dict[str, Any]:
        """For ``generate()``, which takes no cache where a directory's generation_config.json names a kind of them."""
        return {CACHE: self._cache, "use_cache": True, "cache_implementation": None} if self._keeps else {}

    def begin(self, ids: Sequence[int]) -> int:
        """How many of the first of ``ids`` need not be computed: fewer than all."""
        if not self._keeps:
            return 0
        self._cut(min(_common(self._ids, ids), len(ids) - 1))
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return len(self._ids)

    def end(self, ids: Sequence[int]) -> None:
        """Keeps what every layer has of ``ids``, with which the sequence begins that went through the model since
        ``begin``: of one that was cut, the prompt."""
        if self._cache is not None:
            self._ids = list(ids)
            self._cut(min(len(ids), *(layer.get_seq_length() for layer in self._cache.layers)))

    @property
    def length(self) -> int:
        """Tokens whose keys and values every layer has, between ``end`` and ``begin``."""
        return len(self._ids)

    def clear(self) -> None:
        self._cache, self._ids = None, []

    def _cut(self, length: int) -> None:
        """To its first tokens, or to none."""
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
    """A window that is full has not kept what came back into sight."""
    return not tokens or not layer.is_sliding or layer.get_seq_length() < layer.sliding_window


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(some, others, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
