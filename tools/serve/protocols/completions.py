"""OpenAI's text completions: the request gives the prompt as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from .chat import DONE, REASONS, usage_of
from .events import Answered, End, Events, Text
from .openai_body import OpenAIBody
from .protocol import Protocol, Reply, event
from .query import Query


class CompletionsBody(OpenAIBody):
    """Body of a text completion request."""

    prompt_field = "prompt"

    prompt: str

    def query(self) -> Query:
        """Return what the request asks for."""
        return Query(
            prompts=[self.prompt],
            max_tokens=self.max_tokens,
            sampling=self.sampling_options,
            seed=self.seed,
            stop=self.stop or (),
        )


class Completions(Protocol):
    """Text completions."""

    path = "/v1/completions"
    body: ClassVar = CompletionsBody

    async def stream(self, reply: Reply, events: Events) -> AsyncIterator[str]:
        """Yield a chunk for each event, then DONE. The last chunk has the token counts."""
        async for _, part in events:
            if isinstance(part, End):
                yield event({**_object(reply, "", REASONS[part.reason]), "usage": usage_of(part.usage)})
            elif isinstance(part, Text):
                yield event(_object(reply, part.text))
        yield DONE

    def whole(self, reply: Reply, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return OpenAI's object for a whole answer."""
        (answer,) = answers
        assert answer.end is not None
        return {**_object(reply, answer.text, REASONS[answer.end.reason]), "usage": usage_of(answer.end.usage)}


def _object(reply: Reply, text: str, reason: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    head = {"id": reply.id, "object": "text_completion", "created": reply.created, "model": reply.model}
    return {**head, "choices": [choice]}
