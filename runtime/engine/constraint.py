"""Logits processors that leave only tokens which a grammar allows."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from concurrent.futures import Executor, Future
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor

from .grammar import CompiledGrammar, Grammar, Matcher, compiler_of

QUICK_SECONDS = 0.0005  # a mask that takes longer is made while the model computes
WEIGHT = 0.25  # of a mask's time in the mean


class Constraint(LogitsProcessor):
    """Logits processor of one sequence of the engine.

    Masks that take long are made on another thread, while the model computes. The first one is, too. Quick ones are
    made when they are needed: the other thread would take a processor from the kernels, which costs more.
    A mask is made only after the one before was taken, so one thread at a time uses the matcher.
    """

    def __init__(self, grammar: CompiledGrammar) -> None:
        self._matcher = grammar.matcher()
        self._token: int | None = None  # that was chosen last
        self._mask: Future[Tensor] | None = None  # of the token after it; None: it is made when it is needed
        self._seconds = math.inf  # that a mask takes: a mean in which late ones count more

    def begin(self, ends: Collection[int], executor: Executor) -> None:
        """Begin to make the mask of the first token, on threads of ``executor``. ``ends`` are the tokens of the end."""
        self._ends = ends
        self._executor = executor
        self._start()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Set the scores of forbidden tokens, [1, vocabulary], to -inf. Raises GrammarError if no token is allowed."""
        if self._mask is None or self._mask.cancel():  # other processes may use all CPUs
            return _bounded(scores, self._make())
        return _bounded(scores, self._mask.result())

    def advance(self, token: int) -> None:
        """Note ``token``, which was chosen and does not end the sequence."""
        self._start(token)

    @property
    def is_complete(self) -> bool:
        """Whether no text can follow the token that was chosen last."""
        if self._mask is None:
            self._mask = self._executor.submit(self._make)
        self._mask.exception()  # waits
        return self._matcher.is_complete

    def _start(self, token: int | None = None) -> None:
        self._token = token
        is_quick = self._seconds <= QUICK_SECONDS
        self._mask = None if is_quick else self._executor.submit(self._make)

    def _make(self) -> Tensor:
        begin = time.thread_time()
        if self._token is not None:
            self._matcher.consume(self._token)
        bounds = self._matcher.bounds(self._ends)
        taken = time.thread_time() - begin
        self._seconds = taken if self._seconds == math.inf else self._seconds + (taken - self._seconds) * WEIGHT
        return bounds


class GrammarProcessor(LogitsProcessor):
    """Logits processor for one call of ``generate()``, with any number of rows.

    Example:
        ``model.generate(**inputs, logits_processor=[GrammarProcessor.of(tokenizer, schema)])``
    """

    @classmethod
    def of(cls, tokenizer: Any, schema: Any) -> GrammarProcessor:
        """Return a processor for answers by ``schema``, as ``Request.of`` takes it. Raises what that raises."""
        return cls(compiler_of(tokenizer).compile(Grammar.json_schema(schema)))

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
        scores = scores.clone()
        for row, answer in enumerate(input_ids[:, self._prompt :].tolist()):
            if not any(token in self._ends for token in answer):  # otherwise the row is padded
                _bounded(scores[row : row + 1], self._bounds(row, answer))
        return scores

    def _bounds(self, row: int, answer: list[int]) -> Tensor:
        matcher, matched = self._rows[row]
        if answer[: len(matched)] != matched:  # beams have changed places
            matcher, matched = self._rows[row] = self._grammar.matcher(), []
        for token in answer[len(matched) :]:
            matcher.consume(token)
            matched.append(token)
        return matcher.bounds(self._ends)


def _bounded(scores: Tensor, bounds: Tensor) -> Tensor:
    """Limit scores, [1, vocabulary], by bounds [tokens]. Those of tokens that no tokenizer has become -inf."""
    known = min(len(bounds), scores.shape[-1])
    scores[:, :known].clamp_(max=bounds[:known].to(scores.device, scores.dtype))
    scores[:, known:] = -math.inf
    return scores
