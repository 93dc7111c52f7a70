"""Fields that chat completions and text completions have in common."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from moetier.runtime.engine.grammar import Grammar

from .body import MOST_TOKENS, Body, NotEmpty, Open, as_list
from .query import AnswerFormat
from .refusal import Refusal


class JsonSchema(Open):
    """Schema of an answer."""

    definition: dict[str, Any] | bool = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Open):
    """Form of an answer's text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise PydanticCustomError("schema", "json_schema is missing")
        return self


class StructuredOutputs(BaseModel):
    """Form of an answer's text, as vLLM has it: one of these."""

    model_config = ConfigDict(extra="forbid")

    json_: dict[str, Any] | bool | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: Annotated[list[NotEmpty], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise PydanticCustomError("outputs", "give one of json, json_object, regex, choice and grammar")
        return self


class OpenAIBody(Body):
    """Body of a chat or text completion request."""

    # every stream ends with the usage, for any stream_options
    ignored: ClassVar = (
        "user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier", "stream_options",
    )  # fmt: skip
    neutral: ClassVar[dict[str, Any]] = {
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": False,
        "logit_bias": {},
        "modalities": ["text"],
        "top_logprobs": 0,
        "verbosity": "medium",
        "min_tokens": 0,
        "ignore_eos": False,
        "use_beam_search": False,
    }
    unsupported: ClassVar = frozenset({  # of OpenAI's API and of other servers
        "audio", "function_call", "functions", "prediction", "suffix", "web_search_options", "generation_config",
        "add_generation_prompt", "chat_template", "continue_final_message", "documents", "enable_thinking",
        "reasoning", "thinking", "allowed_token_ids", "bad_words", "stop_token_ids", "skip_special_tokens",
        "include_stop_str_in_output", "format", "grammar", "guided_choice", "guided_grammar", "guided_json",
        "guided_regex", "json_schema", "regex", "ebnf", "length_penalty", "mirostat",
        "repeat_penalty", "tfs_z", "top_a", "top_n_sigma", "typical_p", "xtc_probability", "dry_multiplier",
        "dynatemp_range", "samplers", "n_predict", "num_predict", "num_ctx", "options", "n_probs", "prompt_logprobs",
        "truncate_prompt_tokens", "lora",
    })  # fmt: skip

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    stop: Annotated[list[NotEmpty], Field(max_length=4), BeforeValidator(as_list)] | None = None

    @property
    def form(self) -> AnswerFormat | None:
        """What the answer's text must be; None: any text. Raises Refusal if it is said twice."""
        asked = self.response_format
        if asked is None or asked.type == "text":
            return None if self.structured_outputs is None else _outputs(self.structured_outputs)
        if self.structured_outputs is not None:
            message = "structured_outputs: response_format says already what the answer must be."
            raise Refusal(400, message, param="structured_outputs")
        if asked.json_schema is None or asked.type == "json_object":
            return AnswerFormat.of_json(None, None, "response_format")
        return AnswerFormat.of_json(asked.json_schema.definition, asked.json_schema.strict, "response_format")


def _outputs(asked: StructuredOutputs) -> AnswerFormat:
    if asked.regex is not None:
        grammar = Grammar.regex(asked.regex)
    elif asked.choice is not None:
        grammar = Grammar.regex("|".join(map(re.escape, asked.choice)))
    elif asked.grammar is not None:
        grammar = Grammar.lark(asked.grammar)
    else:
        grammar = Grammar.json_object() if asked.json_ is None else Grammar.json_schema(asked.json_)
    return AnswerFormat(grammar, "structured_outputs")
