"""OpenAI's text completions: the request gives the prompts as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, FailFast, Field
from pydantic_core import PydanticCustomError

from .body import MAX_TOKENS
from .events import Answered, End, Events, ScoredToken, Text
from .openai_body import MAX_TOP, OpenAIBody
from .openai_chunks import REASONS, Chunks, object_of, total, usage_of
from .protocol import ApiProtocol, Reply
from .query import Query
from .refusal import Refusal


def _prompts(given: Any) -> Any:
    """Return one or several prompts, texts or lists of token ids, as a list. Raises PydanticCustomError for others."""
    prompts = [given] if isinstance(given, str) or (isinstance(given, list) and given and _are_ids(given)) else given
    if not isinstance(prompts, list) or not all(isinstance(each, str) or _are_ids(each) for each in prompts):
        raise PydanticCustomError("prompt", "it must be a text, a list of token ids, or a list of these")
    return prompts


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(type(each) is int and 0 <= each < MAX_TOKENS for each in given)


def _number(given: Any) -> Any:
    return None if given is False else given  # as chat completions say that there are none


class CompletionsBody(OpenAIBody):
    """Body of a text completion request."""

    prompt_field = "prompt"
    neutral: ClassVar[dict[str, Any]] = OpenAIBody.neutral | {"top_logprobs": 0}

    prompt: Annotated[
        list[str | list[int]],
        FailFast(),
        Field(min_length=1),
        BeforeValidator(_prompts, json_schema_input_type=str | list[int] | list[str | list[int]]),
    ]
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    echo: bool | None = None
    logprobs: Annotated[int | None, BeforeValidator(_number)] = Field(None, ge=0, le=MAX_TOP)

    def query(self) -> Query:
        """Return what the request asks for. Raises Refusal if it asks for nothing."""
        if self.max_tokens == 0 and not self.echo:
            raise Refusal(400, "max_tokens: without echo it must be at least 1.", param="max_tokens")
        return self.query_of(self.prompt, max_tokens=self.max_tokens, logprobs=self.logprobs, echo=bool(self.echo))


class CompletionsProtocol(ApiProtocol):
    """Text completions."""

    path = "/v1/completions"
    body: ClassVar = CompletionsBody

    async def stream(self, reply: Reply, events: Events) -> AsyncIterator[str]:
        """Yield a chunk for each event, then DONE. By default the last chunk has the token counts, too."""
        assert isinstance(reply.body, CompletionsBody)
        chunks, lengths = Chunks(reply, "text_completion", reply.body), Counter[int]()
        async for number, part in events:
            if isinstance(part, End):
                yield chunks.last({"index": number, "text": "", "finish_reason": REASONS[part.reason]}, part)
            elif isinstance(part, Text):
                logprobs = {"logprobs": _logprobs(part.tokens, lengths[number])} if part.tokens else {}
                lengths[number] += sum(len(token.text) for token in part.tokens)
                yield chunks.chunk({"index": number, "text": part.text, "finish_reason": None, **logprobs})
        for end in chunks.end():
            yield end

    def response(self, reply: Reply, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return OpenAI's object for whole answers."""
        choices = [_choice(number, answer, reply) for number, answer in enumerate(answers)]
        return object_of(reply, "text_completion", choices) | {"usage": usage_of(total(answers))}


def _choice(number: int, answer: Answered, reply: Reply) -> dict[str, Any]:
    assert answer.end is not None
    assert isinstance(reply.body, CompletionsBody)
    logprobs = {} if reply.body.logprobs is None else {"logprobs": _logprobs(answer.tokens, 0)}
    return {"index": number, "text": answer.text, "finish_reason": REASONS[answer.end.reason], **logprobs}


def _logprobs(tokens: Sequence[ScoredToken], offset: int) -> dict[str, Any]:
    """Return log probabilities of tokens whose text begins at ``offset``. A prompt's first token has none."""
    offsets = list[int]()
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token) for token in tokens],
        "text_offset": offsets,
    }


def _top(token: ScoredToken) -> dict[str, float] | None:
    """Return the log probabilities of the most likely tokens and of ``token``, by their texts."""
    if token.logprob is None:
        return None
    likely = {raw.decode(errors="replace"): logprob for raw, logprob in reversed(token.top)}
    return {token.text: token.logprob} | likely
