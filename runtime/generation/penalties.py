"""Presence and frequency penalties, and biases of tokens, which transformers lacks.

They are not in ``decoding``, because that module must not import transformers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LogitsProcessor


class OccurrencePenalties(LogitsProcessor):
    """Lower the scores of tokens that were generated before, as OpenAI's API defines it.

    ``prompt`` is the length of the prompt in tokens. A token that occurs after the prompt loses ``presence`` once, and
    ``frequency`` for each occurrence. Negative penalties raise the scores.
    """

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt = prompt
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the new scores. ``input_ids`` is [1, tokens], ``scores`` and the result are [1, vocabulary]."""
        generated = input_ids[:, self._prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class Biases(LogitsProcessor):
    """Add to the scores of tokens. ``biases`` has what is added, by token id."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = torch.tensor([*biases], dtype=torch.int64)
        self._biases = torch.tensor([*biases.values()])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the new scores. ``scores`` and the result are [1, vocabulary]."""
        return scores.index_add(1, self._ids, self._biases.to(scores.dtype)[None])
