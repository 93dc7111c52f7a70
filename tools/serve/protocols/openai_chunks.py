"""Parts of answers that OpenAI's APIs share: objects, chunks of streams, log probabilities, and numbers of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from .events import Answered, End, Reason, ScoredToken, Usage
from .openai_body import OpenAIBody
from .protocol import Reply, event

DONE = "data: [DONE]\n\n"  # ends a complete stream
REASONS = {Reason.END: "stop", Reason.STOP: "stop", Reason.LENGTH: "length", Reason.CALLS: "tool_calls"}


class Chunks:
    """Writes the chunks of a stream. The token counts are in the last one, or where the request wants them."""

    def __init__(self, reply: Reply, kind: str, body: OpenAIBody) -> None:
        """``kind`` is OpenAI's name for the type of a chunk."""
        self._reply = reply
        self._kind = kind
        self._has_own_usage = body.usage_chunk
        self._left = reply.answers
        self._usage = Usage()

    def chunk(self, choice: dict[str, Any]) -> str:
        """Return a chunk with one choice."""
        usage = {"usage": None} if self._has_own_usage else {}
        return event(object_of(self._reply, self._kind, [choice]) | usage)

    def last(self, choice: dict[str, Any], end: End) -> str:
        """Return the last chunk of an answer."""
        self._usage += end.usage
        self._left -= 1
        if self._left or self._has_own_usage is not None:
            return self.chunk(choice)
        return event(object_of(self._reply, self._kind, [choice]) | {"usage": usage_of(self._usage)})

    def end(self) -> Iterator[str]:
        """Yield what follows the last chunks of all answers."""
        if self._has_own_usage:
            yield event(object_of(self._reply, self._kind, []) | {"usage": usage_of(self._usage)})
        yield DONE


def object_of(reply: Reply, kind: str, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return an object of OpenAI's type ``kind``."""
    return {"id": reply.id, "object": kind, "created": reply.created, "model": reply.model, "choices": [*choices]}


def total(answers: Iterable[Answered]) -> Usage:
    """Return the numbers of tokens of complete answers."""
    return sum((answer.end.usage for answer in answers if answer.end is not None), Usage())


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return numbers of tokens in OpenAI's form."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def logprobs_of(tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
    """Return log probabilities of tokens, and of the most likely ones in their places."""

    def entry(raw: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": [*raw]}

    return [{**entry(token.raw, token.logprob), "top_logprobs": [entry(*top) for top in token.top]} for token in tokens]
