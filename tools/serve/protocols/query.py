"""A request for text, in the terms of no protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Messages that the model's chat template turns into a prompt.

    Attributes:
        messages: in the form of OpenAI's chat completions, which chat templates take.
        tools: functions that the model may call, in the same form.
        variables: further variables of the template.
        effort: how much to reason, a word; None: as the model does by itself.
        reasons: whether to reason at all; None: as the model does by itself.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    reasons: bool | None = None


Prompt = Dialogue | str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Prompts, and which answers to them are wanted.

    Attributes:
        prompts: each is a dialogue, a text, or token ids.
        choices: number of answers to each prompt.
        max_tokens: most tokens of an answer; None: the server's own limit; 0 only with ``echo``.
        sampling: values of options in SAMPLING, by name.
        biases: what is added to the scores of tokens, by id.
        seed: of the random numbers; None: another one each time.
        stop: strings that end an answer, and are no part of it.
        one_call: whether the first tool call ends an answer.
        logprobs: number of most likely tokens whose log probabilities come with each token; None: not even its own.
        echo: whether an answer begins with its prompt, which also has log probabilities then.
    """

    prompts: Sequence[Prompt]
    choices: int = 1
    max_tokens: int | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    biases: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    one_call: bool = False
    logprobs: int | None = None
    echo: bool = False
