"""Prompt cache: keys and values of a conversation, kept from turn to turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moetier.runtime.model.context import can_resume

from .compat import CACHE
from .decoding import chunks_of


class PromptCache:
    """Keys and values of the last sequence. For the next sequence, only tokens after the common prefix are computed.

    Call ``begin``, then ``generate``. Nothing is kept for a model that can't resume in the middle of a prompt. A layer
    whose sliding window is full can't be cut back to a shorter prefix. The whole prompt is then computed again.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps = can_resume(model)
        self._cache: Any = None
        self._ids: list[int] = []  # tokens whose keys and values are in the cache

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that pass the cache to ``generate()``; empty if nothing is kept.

        ``cache_implementation`` is None because ``generate()`` refuses a cache if generation_config.json names an
        implementation.
        """
        return {CACHE: self._cache, "use_cache": True, "cache_implementation": None} if self._keeps else {}

    def begin(self, ids: Sequence[int]) -> int:
        """Cut the cache to the longest prefix of ``ids`` that it holds, and return that prefix's length in tokens.

        The last of ``ids`` is never included, because at least one token has to be computed.
        """
        if not self._keeps:
            return 0
        self._cut(min(_common(self._ids, ids), len(ids) - 1))
        if self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return len(self._ids)

    def generate(
        self,
        ids: Sequence[int],
        *,
        chunk: int,
        should_stop: Callable[[], bool],
        on_token: Callable[[int], object] = lambda _: None,
        **options: Any,
    ) -> list[int]:
        """Continue ``ids``, for which ``begin`` was called last, and return them with the new tokens.

        Args:
            chunk: most tokens of the prompt that are computed together.
            should_stop: called between two layers while the prompt is computed, and after each token. True ends the
                generation there; an unfinished prompt is returned without new tokens.
            on_token: called with each new token.
            options: further arguments of the model's ``generate()``.
        """
        import torch

        from moetier.runtime.moe.experts import experts_modules

        sequence, hooks = list(ids), list[Any]()

        def between_layers(*_: object) -> None:
            if should_stop():
                raise _Stopped

        def between_tokens(token_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            for hook in hooks:  # a module with a hook is not computed together with others
                hook.remove()
            hooks.clear()
            on_token(int(token_ids[0, -1]))
            return torch.full((1,), should_stop(), dtype=torch.bool, device=token_ids.device)

        tiers = getattr(self._model, "tiers", None)
        if self.length and tiers is not None:  # tokens behind others take more memory than a whole prompt
            chunk = min(chunk, tiers.prefill.later)
        prompt = torch.tensor([sequence], device=self._model.device)
        try:
            hooks += [m.register_forward_pre_hook(between_layers) for m in experts_modules(self._model).values()]
            sequence = self._model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                stopping_criteria=[between_tokens],
                **chunks_of(self._model, len(sequence) - self.length, chunk),
                **self.options,
                **options,
            )[0].tolist()
        except _Stopped:
            pass
        finally:
            for hook in hooks:
                hook.remove()
            self.end(sequence)
        return sequence

    def end(self, ids: Sequence[int]) -> None:
        """Note which tokens the cache holds: the first of ``ids``, as many as every layer has keys and values for.

        ``ids`` is the sequence that was computed since ``begin``, or, if the generation was interrupted, its prompt.
        """
        if self._cache is not None:
            self._ids = list(ids)
            self._cut(min(len(ids), *(layer.get_seq_length() for layer in self._cache.layers)))

    @property
    def length(self) -> int:
        """Number of tokens whose keys and values every layer has. While ``generate`` runs, it does not change."""
        return len(self._ids)

    def clear(self) -> None:
        """Remove the keys and values of all tokens."""
        self._cache, self._ids = None, []

    def _cut(self, length: int) -> None:
        """Keep the first ``length`` tokens, or none if a layer can't be cut to them."""
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


class _Stopped(Exception):
    """Ends the computation of a prompt between two layers."""


def _can_lose(layer: Any, tokens: int) -> bool:
    """Return whether the last ``tokens`` can be removed from a layer.

    They can't be removed from a full sliding window, which no longer has the tokens that would move into it again.
    """
    return not tokens or not layer.is_sliding or layer.get_seq_length() < layer.sliding_window


def _common(some: Sequence[int], others: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = zip(some, others, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))
