"""A request for text, and the sequence of tokens that answers it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from moetier.tiers.errors import MoetierError

from .grammar import CompiledGrammar, Grammar, compiler_of

PATIENCE = 60.0  # seconds after which a request without a deadline goes before new ones with a deadline


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how it is to be continued.

    Attributes:
        ids: token ids of the prompt: at least one.
        max_new_tokens: most tokens of the answer.
        decoding: arguments of ``generate()`` that choose tokens, ``presence_penalty``, ``frequency_penalty``, and
            ``logit_bias``: what is added to the scores of tokens, by id.
        seed: of the random numbers; None: another one each time.
        user: requests of different users share no keys and values.
        grammar: what the answer may be, compiled for the model's tokenizer.
        logprobs: number of most likely tokens whose log probabilities come with each new token; None: not even its own.
        scores_prompt: whether to give log probabilities of the prompt's tokens, too. All of it is then computed.
        deadline: time of ``time.monotonic()`` after which nothing more is computed for the request: it ends with a
            DeadlineError. Of requests that wait, those whose deadlines are near begin first. None: no deadline.
    """

    ids: tuple[int, ...]
    max_new_tokens: int
    decoding: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    user: str = ""
    grammar: CompiledGrammar | None = None
    logprobs: int | None = None
    scores_prompt: bool = False
    deadline: float | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        prompt: str | Sequence[Mapping[str, Any]],
        max_new_tokens: int,
        *,
        schema: Any = None,
        **more: Any,
    ) -> Request:
        """Return a request for the continuation of a text, or for the answer to messages.

        Args:
            tokenizer: the model's.
            prompt: a text, or messages for the model's chat template.
            max_new_tokens: most tokens of the answer.
            schema: what the answer must be: JSON that is valid by a JSON schema, or by a type that pydantic knows, such
                as a model. See ``Grammar.json_schema``.
            more: further attributes.

        Raises ConfigError if there can be no grammar for the tokenizer or the type, and GrammarError if the schema
        can't be compiled.
        """
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            text = tokenizer.apply_chat_template([*prompt], tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if schema is not None:
            more["grammar"] = compiler_of(tokenizer).compile(Grammar.json_schema(schema))
        return cls(tuple(ids), max_new_tokens, **more)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token of a sequence, with its log probability.

    Log probabilities are the model's own: samplers and penalties do not change them.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability; None if the request did not ask for it.
        top: ids and log probabilities of the most likely tokens in its place, the most likely one first.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a prompt is computed."""

    done: int  # tokens, those that were there already among them
    total: int
    seconds_left: float | None  # until all are; None if that can't be told yet

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {self.seconds_left:.0f} s left"
        return f"{self.done:,} of {self.total:,} prompt tokens{left}"


class Finish(enum.Enum):
    """Why a sequence has ended."""

    END = "end"  # the model has ended it
    LENGTH = "length"  # it has as many tokens as the request asked for, or the context has room for
    CANCELLED = "cancelled"
    DEADLINE = "deadline"  # its deadline has passed
    FAILED = "failed"


class EngineError(MoetierError):
    """The engine can't compute any more."""


class DeadlineError(MoetierError):
    """The deadline of a request has passed before its answer was complete."""


class TokenSequence:
    """The tokens of a request and its answer so far.

    ``computed`` is the number of tokens whose keys and values are kept; the tokens after them are to be computed next.
    Only the methods change a sequence. The engine's thread calls them; any thread may call ``cancel``.
    """

    def __init__(
        self,
        request: Request,
        on_token: Callable[[TokenSequence, Sampled], object] = lambda *_: None,
        on_end: Callable[[TokenSequence], object] = lambda _: None,
    ) -> None:
        self.request = request
        self.ids = list(request.ids)
        self.prompt_scores: dict[int, Sampled] = {}  # by position in the prompt; all but the first if it is scored
        arrived, deadline = monotonic(), request.deadline
        self.due = arrived + PATIENCE if deadline is None else min(arrived + PATIENCE, deadline)  # order of waiting
        self.computed = 0
        self.cached = 0  # tokens of the prompt whose keys and values were there already when the sequence first began
        self.began: float | None = None  # time at which it first began; None while it waits
        self.underway = 0.0  # tokens' worth of computing that a part of its prompt has had, while it is being computed
        self.last_step = 0  # number of the step that computed a part of its prompt last
        self.finish: Finish | None = None  # None before the end
        self.error: BaseException | None = None
        self.is_cancelled = False  # may be set on any thread
        self._on_token = on_token
        self._on_end = on_end

    @property
    def new_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.ids) - len(self.request.ids)

    @property
    def remaining(self) -> int:
        """Number of tokens to compute before the next token can be sampled."""
        return len(self.ids) - self.computed

    def resume_at(self, position: int) -> None:
        """Continue after the first ``position`` tokens, whose keys and values are there."""
        self.computed = position

    def advance(self, tokens: int) -> None:
        """Note that the next ``tokens`` tokens were computed."""
        self.computed += tokens

    def note_part(self, step: int) -> None:
        """Note that a step, of this number, computes a part of the prompt."""
        self.last_step = step

    def note_underway(self, tokens: float) -> None:
        """Note how far a part of the prompt is: as if ``tokens`` of its tokens were computed. None is kept yet."""
        self.underway = tokens

    def score(self, position: int, scores: Sequence[Sampled]) -> None:
        """Note the log probabilities of the prompt's tokens from ``position`` on."""
        self.prompt_scores |= dict(enumerate(scores, position))

    def begin(self) -> None:
        """Note that the sequence begins to run, with its ``computed`` tokens. Only the first time has an effect."""
        if self.began is None:
            self.cached, self.began = self.computed, monotonic()

    @property
    def progress(self) -> Progress:
        """The computed tokens of the prompt, and the estimated time for the others. May be read on any thread."""
        total = len(self.request.ids)
        done = min(self.computed + int(self.underway), total)
        new = done - self.cached
        if self.began is None or new <= 0:
            return Progress(done, total, None)
        return Progress(done, total, (total - done) * (monotonic() - self.began) / new)

    def append(self, sampled: Sampled) -> None:
        """Append a sampled token, and pass it on."""
        self.ids.append(sampled.token)
        self._on_token(self, sampled)

    @property
    def should_end(self) -> bool:
        """Whether the rest is not to be computed: it is cancelled, or its deadline has passed. Any thread may ask."""
        deadline = self.request.deadline
        return self.is_cancelled or (deadline is not None and monotonic() >= deadline)

    def cancel(self) -> None:
        """End the sequence soon. May be called on any thread, and after the end."""
        self.is_cancelled = True

    def end(self, finish: Finish, error: BaseException | None = None) -> None:
        """Note why the sequence has ended, and with which error, and tell that it has."""
        self.error, self.finish = error, finish  # in this order, as other threads read the error after the end
        self._on_end(self)
