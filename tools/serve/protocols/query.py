"""A request for text, in the terms of no protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moetier.runtime.engine.grammar import Grammar

from .refusal import Refusal


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages that the model's chat template turns into a prompt.

    Attributes:
        messages: in the form of OpenAI's chat completions, which chat templates take.
        tools: functions that the model may call, in the same form.
        must_call: names of functions, one of which the answer must call; empty: it need not call any.
        variables: further variables of the template.
        effort: how much to reason, a word; None: as the model does by itself.
        reasons: whether to reason at all; None: as the model does by itself.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    must_call: Sequence[str] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    effort: str | None = None
    reasons: bool | None = None


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What the text of an answer must be.

    Attributes:
        grammar: its grammar.
        field: name of the field of the request that demands it.
    """

    grammar: Grammar
    field: str

    @classmethod
    def of_json(cls, schema: Mapping[str, Any] | bool | None, strict: bool | None, field: str) -> AnswerFormat:
        """Return the format of JSON that is valid by a schema; None: any JSON object.

        Only where a request says that it is not ``strict``, keywords that are not known are ignored.
        """
        if schema is None:
            return cls(Grammar.json_object(), field)
        return cls(Grammar.json_schema(schema, lenient=strict is False), field)


Prompt = ChatPrompt | str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Prompts, and which answers to them are wanted.

    Attributes:
        prompts: each is a chat, a text, or token ids.
        choices: number of answers to each prompt.
        max_tokens: most tokens of an answer; None: the server's own limit; 0 only with ``echo``.
        sampling: values of options in SAMPLING, by name.
        biases: what is added to the scores of tokens, by id.
        seed: of the random numbers; None: another one each time.
        stop: strings that end an answer, and are no part of it.
        one_call: whether the first tool call ends an answer.
        form: what the text of an answer must be; None: any text.
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
    form: AnswerFormat | None = None
    logprobs: int | None = None
    echo: bool = False


def must_call(any_of_them: bool, named: str | None, tools: Sequence[str]) -> Sequence[str]:
    """Return the functions of which one must be called: ``named`` alone, or all ``tools``.

    Raises Refusal if there is none.
    """
    if named is None and not any_of_them:
        return ()
    wanted = [*tools] if named is None else [named]
    if not {*wanted} <= {*tools} or not wanted:
        raise Refusal(400, "tool_choice: the function that must be called is not in tools.", param="tool_choice")
    return wanted
