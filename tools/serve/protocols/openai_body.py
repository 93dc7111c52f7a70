"""Fields that chat completions and text completions have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from .answer_formats import ResponseFormat, StructuredOutputs, format_of
from .body import MAX_TOKENS, NotEmpty, Open, QueryBody, as_list
from .query import Prompt, Query

MAX_CHOICES = 128  # answers to a prompt
MAX_BIASES = 1024  # tokens in logit_bias
MAX_TOP = 20  # most likely tokens whose log probabilities are given

TokenId = Annotated[int, Field(ge=0, lt=MAX_TOKENS)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Open):
    """Which further events a stream has."""

    include_usage: bool | None = None


class OpenAIBody(QueryBody):
    """Body of a chat or text completion request."""

    ignored: ClassVar = (
        "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "metadata", "client_metadata",
        "store", "service_tier", "verbosity",
    )  # fmt: skip
    neutral: ClassVar[dict[str, Any]] = {
        "best_of": 1,
        "modalities": ["text"],
        "min_tokens": 0,
        "ignore_eos": False,
        "use_beam_search": False,
    }

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[list[NotEmpty], Field(max_length=4), BeforeValidator(as_list, json_schema_input_type=str | list[str])]
        | None
    ) = None

    @property
    def usage_chunk(self) -> bool | None:
        """Whether a stream ends with a chunk for its usage. False: no chunk has it. None: the last chunk has it."""
        return None if self.stream_options is None else self.stream_options.include_usage

    def query_of(self, prompts: Sequence[Prompt], *, max_tokens: int | None, **more: Any) -> Query:
        """Return a query with the fields that chat and text completions have in common, and with ``more``."""
        return Query(
            prompts=prompts,
            choices=self.n or 1,
            max_tokens=max_tokens,
            sampling=self.sampling_options,
            biases=self.logit_bias or {},
            seed=self.seed,
            stop=self.stop or (),
            form=format_of(self.response_format, self.structured_outputs),
            **more,
        )
