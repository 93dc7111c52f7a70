"""Validation of request bodies. A field that would change an answer is honoured or refused, never ignored.

Fields that this server does not know are logged, once each, and ignored.
"""

from __future__ import annotations

import json
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError, from_json

from moetier.runtime.generation.decoding import SAMPLING

from .bounded_json import BoundedJson, BoundsError
from .query import Query
from .refusal import Refusal

MAX_TOKENS = 1 << 31
MAX_NAMES = 100  # unknown fields that a server logs; clients choose the names
MAX_LETTERS = 64  # of such a name

_log = logging.getLogger(__name__)

# Fields of an API or of a server that change an answer. A body without such a field refuses it, unless it asks for
# nothing.
MEANINGFUL = frozenset({
    "messages", "system", "prompt", "suffix", "input", "instructions", "previous_response_id", "conversation",
    "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of", "stop", "stop_sequences",
    "logit_bias", "logprobs", "top_logprobs", "echo", "tools", "tool_choice", "functions", "function_call",
    "response_format", "structured_outputs", "output_config", "text", "reasoning", "reasoning_effort", "thinking",
    "enable_thinking", "chat_template_kwargs", "modalities", "audio", "prediction", "moderation", "web_search_options",
    "mcp_servers", "background", "truncation", "generation_config", "add_generation_prompt", "chat_template",
    "continue_final_message", "documents", "allowed_token_ids", "bad_words", "stop_token_ids", "ignore_eos",
    "skip_special_tokens", "include_stop_str_in_output", "format", "grammar", "guided_choice", "guided_grammar",
    "guided_json", "guided_regex", "json_schema", "regex", "ebnf", "use_beam_search", "length_penalty", "mirostat",
    "repeat_penalty", "tfs_z", "top_a", "top_n_sigma", "typical_p", "xtc_probability", "dry_multiplier",
    "dynatemp_range", "samplers", "n_predict", "num_predict", "num_ctx", "options", "n_probs", "prompt_logprobs",
    "truncate_prompt_tokens", "lora",
})  # fmt: skip

# Values of such fields that change nothing where the body does not have them, beside empty ones and false
NEUTRAL = {"n": 1, "best_of": 1, "truncation": "disabled"}
# Fields for which false, or an empty object, asks for something
NEVER_EMPTY = {
    **dict.fromkeys(
        ("skip_special_tokens", "add_generation_prompt", "enable_thinking", "thinking", "reasoning"), False
    ),
    "web_search_options": {},
}

NotEmpty = Annotated[str, Field(min_length=1)]
Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS)]


def as_list(given: Any) -> Any:
    """Return a string as a list of it, anything else unchanged."""
    return [given] if isinstance(given, str) else given


def arguments_of(given: Any, bounded: BoundedJson) -> dict[str, Any]:
    """Return the arguments of a tool call as a dictionary, which chat templates expect; clients send a JSON string.

    If the string was cut, as at the limit of an answer's tokens, the values before the cut are returned. Otherwise the
    conversation, which has the call from then on, would be refused each time. Raises PydanticCustomError if the string
    is neither empty nor the beginning of a JSON object, or is too complex.
    """
    try:
        found = bounded.parse(given.encode()) if isinstance(given, str) else given
    except BoundsError as error:
        raise PydanticCustomError("arguments", "{why}", {"why": str(error)}) from None
    except json.JSONDecodeError as error:
        found = None if error.msg == "Extra data" else _before_cut(given)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not _is_unicode(found):
        raise PydanticCustomError("arguments", "it must be a string that holds a JSON object")
    return found


def _before_cut(text: str) -> Any:
    """Return the JSON value whose text was cut at the end; {} if there is no text, None if ``text`` is no JSON."""
    try:
        return from_json(text, allow_partial=True) if text.strip() else {}
    except ValueError:
        return None


def _is_unicode(given: Any) -> bool:
    """Return whether all strings in ``given`` can be encoded: half of a surrogate pair, which JSON permits, can't."""
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def sampling(name: str) -> Any:
    """Return the field of a request for a sampling option, with the range of the command line."""
    numbers = SAMPLING[name].numbers
    assert numbers is not None
    return Field(None, ge=numbers.least, le=numbers.most)


class Open(BaseModel):
    """Part of a body whose further fields are kept: chat templates get them."""

    model_config = ConfigDict(extra="allow")


class Body(BaseModel):
    """Body of a request."""

    model_config = ConfigDict(extra="ignore")

    ignored: ClassVar[Iterable[str]] = ()  # fields on which no answer depends
    neutral: ClassVar[Mapping[str, Any]] = {}  # unsupported fields, each with its one value that changes nothing
    unsupported: ClassVar[Iterable[str]] = ()  # fields that are refused, unless the body has them

    model: str | None = None


class QueryBody(Body, ABC):
    """Body of a request for text."""

    unsupported: ClassVar = MEANINGFUL
    prompt_field: ClassVar[str]  # name of the field that has the prompt

    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = sampling("top_k")
    min_p: float | None = sampling("min_p")
    repetition_penalty: float | None = sampling("repetition_penalty")
    presence_penalty: float | None = sampling("presence_penalty")
    frequency_penalty: float | None = sampling("frequency_penalty")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)

    @abstractmethod
    def query(self) -> Query:
        """Return what the request asks for. Raises Refusal if that is not supported."""

    @property
    def sampling_options(self) -> dict[str, float]:
        """Values of the options in SAMPLING that the body has."""
        return {name: value for name in SAMPLING if (value := getattr(self, name, None)) is not None}


AnyBody = TypeVar("AnyBody", bound=Body)


def parsed(content: bytes, content_type: str) -> dict[str, Any]:
    """Return the JSON object in ``content``, a request's body.

    Raises Refusal if ``content_type`` is not application/json, the body is not a JSON object, or it is too complex.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refusal(
            400,
            f"The Content-Type is {content_type or 'missing'}; it must be application/json. With curl, add "
            "-H 'Content-Type: application/json'.",
        )
    try:
        body = BoundedJson().parse(content)
    except BoundsError as error:
        raise Refusal(400, f"The JSON of the body is too complex: {error}.") from None
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "The body is not a JSON object.")
    return body


def checked(body: dict[str, Any], kind: type[AnyBody]) -> AnyBody:
    """Return ``body`` as a valid request, without ignored and unknown fields.

    Raises Refusal if a field is invalid or unsupported.
    """
    if not _is_unicode(body):
        raise Refusal(400, "The body contains text that is not valid Unicode.")
    given = {name: value for name, value in body.items() if value is not None and name not in kind.ignored}
    for name in given.keys() & kind.neutral.keys():
        value, neutral = given.pop(name), kind.neutral[name]
        if type(value) is not type(neutral) or value != neutral:  # == alone would take 0 for false
            raise Refusal(400, f"{name}: only {json.dumps(neutral)} is supported.", param=name)
    unsupported = given.keys() & {*kind.unsupported} - kind.model_fields.keys()
    if wrong := sorted(name for name in unsupported if not _changes_nothing(name, given[name])):
        raise Refusal(400, f"{wrong[0]}: this field is not supported.", param=wrong[0])
    try:
        return kind.model_validate(given, context=BoundedJson())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise Refusal(400, f"{_field_path(first['loc'])}: {first['msg']}.", param=str(first["loc"][0])) from None


def _changes_nothing(name: str, value: Any) -> bool:
    """Return whether an unsupported field has a value that asks for nothing."""
    if name in NEVER_EMPTY and value == NEVER_EMPTY[name]:
        return False
    # == alone would take 0 for false, and true for 1
    return value is False or value in ("", [], {}) or (type(value) is not bool and value == NEUTRAL.get(name))


def unknown_fields(body: dict[str, Any], kind: type[Body]) -> list[str]:
    """Return the names of fields in ``body`` that are not null, and that ``checked`` ignores because of their names."""
    known = {*kind.model_fields, *kind.ignored, *kind.neutral, *kind.unsupported}
    return [name for name, value in body.items() if value is not None and name not in known]


class UnknownFields:
    """Log of unknown fields of requests to a server: a line for each name, MAX_NAMES at most. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards: ``_names``
        self._names: set[str] = set()

    def checked(self, content: bytes, content_type: str, kind: type[AnyBody]) -> AnyBody:
        """Return the content of a request as a valid body, and note its unknown fields.

        Raises Refusal if it is not valid.
        """
        given = parsed(content, content_type)
        body = checked(given, kind)
        self.note(unknown_fields(given, kind))
        return body

    def note(self, names: Iterable[str]) -> None:
        """Log those of ``names`` that are new. They come from clients, so only their first letters are logged."""
        for name in names:
            shown = ascii(name[:MAX_LETTERS])
            with self._lock:
                if shown in self._names or len(self._names) >= MAX_NAMES:
                    continue
                self._names.add(shown)
            _log.warning("requests have the unknown field %s, which is ignored", shown)


def _field_path(path: tuple[int | str, ...]) -> str:
    """Return the path of a field in a body as text: ("messages", 0, "role") -> "messages[0].role"."""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).removeprefix(".")
