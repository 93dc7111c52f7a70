"""Fields of OpenAI's bodies that say what the text of an answer must be."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from moetier.runtime.engine.grammar import Grammar, GrammarError

from .body import NotEmpty, Open
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


def format_of(asked: ResponseFormat | None, outputs: StructuredOutputs | None) -> AnswerFormat | None:
    """Return what the text of an answer must be; None: any text. Raises Refusal if it is said twice, or too long."""
    if asked is None or asked.type == "text":
        try:
            return None if outputs is None else AnswerFormat(_grammar(outputs), "structured_outputs")
        except GrammarError as error:
            raise Refusal(400, f"structured_outputs: {error.cause}", param="structured_outputs") from None
    if outputs is not None:
        message = "structured_outputs: response_format says already what the answer must be."
        raise Refusal(400, message, param="structured_outputs")
    if asked.json_schema is None or asked.type == "json_object":
        return AnswerFormat.of_json(None, None, "response_format")
    return AnswerFormat.of_json(asked.json_schema.definition, asked.json_schema.strict, "response_format")


def _grammar(asked: StructuredOutputs) -> Grammar:
    if asked.regex is not None:
        return Grammar.regex(asked.regex)
    if asked.choice is not None:
        return Grammar.regex("|".join(map(re.escape, asked.choice)))
    if asked.grammar is not None:
        return Grammar.lark(asked.grammar)
    return Grammar.json_object() if asked.json_ is None else Grammar.json_schema(asked.json_)
