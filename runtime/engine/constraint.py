"""Logits processors that leave only tokens which a grammar allows."""

from __future__ import annotations

import math
from collections.abc import Collection
from concurrent.futures import Executor
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor

from .grammar import CompiledGrammar, Matcher


class Constraint(LogitsProcessor):
    """Logits processor of one sequence of the engine. Its masks are made while the model computes.

    A mask is made only after the one before was taken, so one thread at a time uses the matcher.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._matcher = grammar.matcher()

    def begin(self, ends: Collection[int], executor: Executor) -> None:
        """Begin to make the mask of the first token, on threads of ``executor``. ``ends`` are the tokens of the end."""
        self._ends = ends
        self._executor = executor
        self._start()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [1, vocabulary], of forbidden tokens -inf. Raises GrammarError if the grammar can't go on."""
        return _masked(scores, self._taken())

    def advance(self, token: int) -> None:
        """Begin to make the mask of the token after ``token``, which does not end the sequence."""
        self._start(token)

    @property
    def is_complete(self) -> bool:
        """Whether no text can follow the token that was chosen last."""
        self._mask.exception()  # waits
        return self._matcher.is_complete

    def _start(self, token: int | None = None) -> None:
        self._task = partial(self._make, token)
        self._mask = self._executor.submit(self._task)

    def _taken(self) -> Tensor:
        """Return the mask. It is made here if the executor has not begun it: other processes may use all CPUs."""
        return self._task() if self._mask.cancel() else self._mask.result()

    def _make(self, token: int | None = None) -> Tensor:
        if token is not None:
            self._matcher.consume(token)
        return self._matcher.forbidden(self._ends)


class GrammarProcessor(LogitsProcessor):
    """Logits processor for one call of ``generate()``, with any number of rows.

    Example:
        ``model.generate(**inputs, logits_processor=[GrammarProcessor(compiler.compile(grammar))])``
    """

    def __init__(self, grammar: CompiledGrammar, ends: Collection[int] | None = None) -> None:
        """``ends`` are the tokens that end a row; None: the tokenizer's own."""
        self._grammar = grammar
        self._ends = grammar.ends if ends is None else ends
        self._prompt: int | None = None  # tokens
        self._rows: list[tuple[Matcher, list[int]]] = []  # matcher of each row, and the tokens that it has matched

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, of forbidden tokens -inf: input_ids is [rows, tokens], the others are [rows, vocabulary].

        Raises GrammarError if the grammar can't go on.
        """
        if self._prompt is None:
            self._prompt = input_ids.shape[1]
        while len(self._rows) < len(input_ids):
            self._rows.append((self._grammar.matcher(), []))
        answers = input_ids[:, self._prompt :].tolist()
        return torch.cat([self._masked_row(row, answer, scores[row : row + 1]) for row, answer in enumerate(answers)])

    def _masked_row(self, row: int, answer: list[int], scores: Tensor) -> Tensor:
        if any(token in self._ends for token in answer):
            return scores  # the row is padded
        matcher, matched = self._rows[row]
        if answer[: len(matched)] != matched:  # beams have changed places
            matcher, matched = self._rows[row] = self._grammar.matcher(), []
        for token in answer[len(matched) :]:
            matcher.consume(token)
            matched.append(token)
        return _masked(scores, matcher.forbidden(self._ends))


def _masked(scores: Tensor, forbidden: Tensor) -> Tensor:
    """Return scores [1, vocabulary], of forbidden tokens and of those that no tokenizer has -inf."""
    mask = pad(forbidden, (0, scores.shape[-1] - len(forbidden)), value=True)
    return scores.masked_fill(mask.to(scores.device), -math.inf)
