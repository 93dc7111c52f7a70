"""What a request may ask for. Nothing is accepted and then ignored that would change an answer."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moetier.runtime.generation.decoding import MIN_P, OCCURRENCE_PENALTY, REPETITION_PENALTY, SAMPLING, TOP_K

from .serve_refusal import Refusal

MOST_TOKENS = 1 << 31
MOST_STOPS = 4
MOST_MESSAGES = 1 << 16  # looking at more would take seconds, and few contexts have room for them
NOT_OF_TEMPLATES = {  # whatever takes what is meant for a template has parameters of its own
    *("messages", "load_audio_from_video", "compiled_template"),
    *(
        name
        for function in (
            PreTrainedTokenizerBase.apply_chat_template,
            PreTrainedTokenizerBase.__call__,
            render_jinja_template,
        )
        for name in inspect.signature(function).parameters
    ),
}


def _stops(given: Any) -> Any:
    """A list, of one string too."""
    strings = [given] if isinstance(given, str) else given
    if not isinstance(strings, list) or not all(isinstance(each, str) for each in strings):
        raise PydanticCustomError("stop", "a string, or a list of strings")
    if len(strings) > MOST_STOPS:
        raise PydanticCustomError("stop", f"at most {MOST_STOPS} strings")
    if not all(strings):
        raise PydanticCustomError("stop", "no empty string")
    return strings


def _text(given: Any) -> Any:
    """Of a message: a string, or parts that are text."""
    parts = given if isinstance(given, list) else [{"type": "text", "text": given}]
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise PydanticCustomError("content", "text only, no images or sound")
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise PydanticCustomError("content", "a string, or a list of parts with a text")
    return given


def _arguments(given: Any) -> Any:
    """Of a tool's call: an object, as OpenAI's API has it in a string; parsed, as templates have it."""
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        found = None
    if not isinstance(found, dict) or not _is_unicode(found):
        raise PydanticCustomError("arguments", "a JSON object in a string")
    return found


def _is_unicode(given: Any) -> bool:
    """JSON may have half of a character, which nothing can be done with."""
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_template(given: dict[str, Any]) -> dict[str, Any]:
    """What the model's own template may know: nothing that says which template, or how transformers goes about it."""
    if taken := sorted(given.keys() & NOT_OF_TEMPLATES):
        raise PydanticCustomError("template", "{name} is not supported here", {"name": taken[0]})
    return given


class Asked(BaseModel):
    """Of both kinds of completions. What transformers would take otherwise, or not at all, has its neutral value."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=TOP_K.least, le=TOP_K.most)
    min_p: float | None = Field(None, ge=MIN_P.least, le=MIN_P.most)
    repetition_penalty: float | None = Field(None, ge=REPETITION_PENALTY.least, le=REPETITION_PENALTY.most)
    presence_penalty: float | None = Field(None, ge=OCCURRENCE_PENALTY.least, le=OCCURRENCE_PENALTY.most)
    frequency_penalty: float | None = Field(None, ge=OCCURRENCE_PENALTY.least, le=OCCURRENCE_PENALTY.most)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[str], BeforeValidator(_stops)] | None = None

    n: Literal[1] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    # for the server's own books: no answer depends on them
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    stream_options: dict[str, Any] | None = None  # usage always comes with the last piece


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")  # what is in it beside goes to the template


class Called(_Open):
    """Function that a tool call names, with its arguments."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class Call(_Open):
    """Tool call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: Called


class Offered(_Open):
    """Function of a tool, with the schema of its parameters."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Open):
    """Tool that a request offers to the model: a function."""

    type: Literal["function"]
    function: Offered


class Message(_Open):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, BeforeValidator(lambda given: None if given is None else _text(given))] = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class ChatAsked(Asked):
    """Body of a chat completion request."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    tools: list[Tool] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_of_template)] | None = None

    tool_choice: Literal["auto"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class TextAsked(Asked):
    """Body of a text completion request."""

    prompt: str

    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None


FORWARDED = {
    *("messages", "prompt", "stream", "max_tokens", "max_completion_tokens", "seed", "stop"),
    *("tools", "chat_template_kwargs", *SAMPLING),
}


def checked(body: dict[str, Any], kind: type[Asked]) -> dict[str, Any]:
    """What transformers is given of a request's body, in which null is as good as nothing. Raises Refusal; of the
    model's name whoever has one."""
    if not _is_unicode(body):
        raise Refusal(400, "The body has text that is no Unicode.")
    given = {name: value for name, value in body.items() if value is not None}
    try:
        asked = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        what = "not supported here" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refusal(400, f"{_place(first['loc'])}: {what}.", param=str(first["loc"][0])) from None
    return asked.model_dump(include=FORWARDED, exclude_none=True)


def _place(path: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") -> "messages[0].role"."""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).removeprefix(".")
