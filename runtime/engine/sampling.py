"""Choosing the next token of a sequence from its logits, as transformers' ``generate()`` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import torch
from torch import Tensor

from moetier.runtime.generation.decoding import ONE_SEQUENCE, behind
from moetier.tiers.errors import MoetierError

from .constraint import Constraint
from .sequence import Sampled, TokenSequence

TOKENS = 256  # memory is allocated for a multiple of this many token ids


class NoTokenError(MoetierError):
    """No token can be chosen by the scores of a model."""


class Sampler:
    """Chooses the tokens of one sequence. Its random numbers depend on the seed alone."""

    def __init__(
        self,
        ids: list[int],
        processors: Callable[..., Tensor],
        *,
        samples: bool = False,
        seed: int | None = None,
        ends: frozenset[int] = frozenset(),
        constraint: Constraint | None = None,
        logprobs: int | None = None,
    ) -> None:
        """Choose the tokens that follow ``ids``.

        Args:
            ids: token ids of the prompt.
            processors: transformers' logits processors, called with ids [1, tokens] and scores [1, vocabulary].
            samples: whether to sample; otherwise the most likely token is chosen.
            seed: of the random numbers; None: another one each time.
            ends: token ids that end the sequence.
            constraint: one of the processors, for a request with a grammar.
            logprobs: number of most likely tokens whose log probabilities come with each token; 0: only its own; None:
                none.
        """
        self.ends = ends
        self._constraint = constraint
        self._ids = torch.empty((1, -(-(len(ids) + 1) // TOKENS) * TOKENS), dtype=torch.int64)
        self._ids[0, : len(ids)] = torch.tensor(ids)
        self._length = len(ids)
        self._processors = processors
        self._logprobs = logprobs
        self._random = torch.Generator() if samples else None
        if self._random is not None:
            self._random.seed() if seed is None else self._random.manual_seed(seed)

    def begin(self, executor: Executor) -> None:
        """Let ``executor`` make the masks of a grammar."""
        if self._constraint is not None:
            self._constraint.begin(self.ends, executor)

    def is_last(self, token: int) -> bool:
        """Return whether ``token``, which was chosen last, ends the sequence."""
        if self.ends or self._constraint is None:
            return token in self.ends
        return self._constraint.is_complete

    def _chosen(self, scores: Tensor) -> int:
        """Return a token by scores [1, vocabulary]. Raises NoTokenError if one of them is NaN, or all are -inf."""
        if self._random is None:
            token = int(scores.argmax())  # NaN counts as the largest
            is_possible = float(scores[0, token]) > -math.inf
        else:
            probabilities = scores.softmax(-1)
            is_possible = not math.isnan(probabilities[0, 0])  # then all of them are
            token = int(torch.multinomial(probabilities, 1, generator=self._random)) if is_possible else 0
        if not is_possible:
            raise NoTokenError(
                "There is no next token: the model's scores are not numbers, or the options exclude all tokens.",
                "Check the model (`moetier verify`), or change the options.",
            )
        return token

    def __call__(self, logits: Tensor) -> Sampled:
        """Return the next token, chosen by its logits [vocabulary], and append it to the ids.

        Raises GrammarError if the grammar of the request allows none, and NoTokenError if there is none for another
        reason.
        """
        scores = self._processors(self._ids[:, : self._length], logits.to("cpu", torch.float32, copy=True)[None])
        token = self._chosen(scores)
        if self._length == self._ids.shape[1]:
            self._ids = torch.nn.functional.pad(self._ids, (0, self._length))
        self._ids[0, self._length] = token
        self._length += 1
        if self._constraint is not None and token not in self.ends:
            self._constraint.advance(token)
        return Sampled(token) if self._logprobs is None else scored(logits[None], [token], self._logprobs)[0]


def scored(logits: Tensor, tokens: list[int], top: int) -> list[Sampled]:
    """Return tokens with their log probabilities, and with those of the ``top`` most likely tokens in their places.

    ``logits`` is [tokens, vocabulary].
    """
    logprobs = logits.to("cpu", torch.float32).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(top)
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]
    return [Sampled(*parts) for parts in zip(tokens, chosen, tops, strict=True)]


def prepared(model: Any, sequence: TokenSequence) -> tuple[dict[str, Any], Sampler]:
    """Return what ``generate()`` prepares for a sequence: arguments of the model's forward, and a sampler.

    Raises ValueError for options that ``generate()`` refuses.
    """
    inputs: dict[str, Any] = {}

    def take(_: Any, input_ids: Tensor, **given: Any) -> Tensor:
        inputs.update(given)
        return input_ids

    ids = torch.tensor([sequence.ids], device=model.device)
    decoding = behind(len(sequence.request.ids), {**sequence.request.decoding, **ONE_SEQUENCE})
    grammar = sequence.request.grammar
    constraint = None if grammar is None else Constraint(grammar)
    if constraint is not None:  # it comes before samplers such as top_k, which would leave tokens that it forbids
        decoding["logits_processor"] = [*decoding.get("logits_processor", ()), constraint]
    most = max(1, sequence.request.max_new_tokens - sequence.new_tokens)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, custom_generate=take, **decoding)
    config, processors = inputs.pop("generation_config"), inputs.pop("logits_processor")
    inputs.pop("stopping_criteria")
    ends = config.eos_token_id
    sampler = Sampler(
        sequence.ids,
        processors,
        samples=config.do_sample,
        seed=sequence.request.seed,
        ends=frozenset(ends if isinstance(ends, list) else [ends]) - {None},
        constraint=constraint,
        logprobs=sequence.request.logprobs,
    )
    return inputs, sampler


def generates_itself(model: Any) -> bool:
    """Return whether a model has no ``generate()``, or one of its own, for which there is no runner."""
    from transformers import GenerationMixin

    return getattr(type(model), "generate", None) is not GenerationMixin.generate
