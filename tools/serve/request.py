"""Validation of request bodies. A field that would change an answer is honoured or refused, never ignored.

Fields that this server does not know are logged, once each, and ignored.
"""

from __future__ import annotations

import inspect
import json
import logging
import threading
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic import ValidationInfo as Info
from pydantic_core import PydanticCustomError, from_json
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moetier.runtime.generation.decoding import SAMPLING

from .bounded_json import BoundedJson, BoundsError
from .refusal import Refusal

# fields that are ignored because no answer depends on them. Every stream ends with the usage, for any stream_options
IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata", "store", "service_tier", "stream_options")
NEUTRAL = {  # unsupported fields: each is accepted only with this value, which changes nothing
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "top_logprobs": 0,
    "verbosity": "medium",
    "min_tokens": 0,
    "ignore_eos": False,
    "use_beam_search": False,
}
# fields of OpenAI's API and of other servers that would change an answer. No value of them is supported
UNSUPPORTED = frozenset({
    "audio", "function_call", "functions", "prediction", "suffix", "web_search_options", "generation_config",
    "add_generation_prompt", "chat_template", "continue_final_message", "documents", "enable_thinking", "reasoning",
    "thinking", "allowed_token_ids", "bad_words", "stop_token_ids", "skip_special_tokens", "include_stop_str_in_output",
    "format", "grammar", "guided_choice", "guided_grammar", "guided_json", "guided_regex", "json_schema", "regex",
    "ebnf", "structured_outputs", "length_penalty", "mirostat", "repeat_penalty", "tfs_z", "top_a", "top_n_sigma",
    "typical_p", "xtc_probability", "dry_multiplier", "dynatemp_range", "samplers", "n_predict", "num_predict",
    "num_ctx", "options", "n_probs", "prompt_logprobs", "truncate_prompt_tokens", "lora",
})  # fmt: skip
MOST_TOKENS = 1 << 31
MOST_NAMES = 100  # unknown fields that a server logs; clients choose the names
MOST_LETTERS = 64  # of such a name
NOT_OF_TEMPLATES = {  # names refused in chat_template_kwargs: parameters of the functions that render a template
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

_log = logging.getLogger(__name__)

NotEmpty = Annotated[str, Field(min_length=1)]


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


def _text(given: Any) -> Any:
    """Return ``given`` unchanged if it is a message's content: a string, a list of text parts, or None.

    Raises PydanticCustomError if it is not.
    """
    parts = given if isinstance(given, list) else [{"type": "text", "text": "" if given is None else given}]
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        raise PydanticCustomError("content", "only text is supported, no images or sound")
    if not all(isinstance(part.get("text"), str) for part in parts):
        raise PydanticCustomError("content", "it must be a string, or a list of parts that each have a text")
    return given


def _arguments(given: Any, info: Info[BoundedJson]) -> Any:
    """Return the arguments of a tool call as a dictionary, which chat templates expect; OpenAI's API has a JSON string.

    If the string was cut, as at the limit of an answer's tokens, the values before the cut are returned. Otherwise the
    conversation, which has the call from then on, would be refused each time. The context of ``info`` is the
    BoundedJson of the request. Raises PydanticCustomError if the string is neither empty nor the beginning of a JSON
    object, or is too complex.
    """
    try:
        found = info.context.parse(given.encode()) if isinstance(given, str) else given
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
    """Whether all strings in ``given`` can be encoded. Half of a surrogate pair, which JSON may contain, can't."""
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _of_template(given: dict[str, Any]) -> dict[str, Any]:
    """Return ``given``, variables for the model's chat template, unchanged.

    Raises PydanticCustomError if a name is in NOT_OF_TEMPLATES. Such a variable would replace the template, or change
    how it is rendered.
    """
    if taken := sorted(given.keys() & NOT_OF_TEMPLATES):
        raise PydanticCustomError("template", "the variable {name} is not supported", {"name": taken[0]})
    return given


def _sampling(name: str) -> Any:
    """Return the field of a request for a sampling option, with the range of the command line."""
    numbers = SAMPLING[name].numbers
    assert numbers is not None
    return Field(None, ge=numbers.least, le=numbers.most)


class Body(BaseModel):
    """Fields that the bodies of chat and text completion requests have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = _sampling("top_k")
    min_p: float | None = _sampling("min_p")
    repetition_penalty: float | None = _sampling("repetition_penalty")
    presence_penalty: float | None = _sampling("presence_penalty")
    frequency_penalty: float | None = _sampling("frequency_penalty")
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Annotated[list[NotEmpty], Field(max_length=4), BeforeValidator(_as_list)] | None = None


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow")  # further fields are passed to the chat template


class FunctionCall(_Open):
    """Function that a tool call names, with its arguments."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class Call(_Open):
    """Tool call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Function(_Open):
    """Function of a tool, with the schema of its parameters."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Open):
    """Tool that a request offers to the model: a function."""

    type: Literal["function"]
    function: Function


class Message(_Open):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, BeforeValidator(_text)] = None
    tool_calls: Annotated[list[Call] | None, FailFast()] = None
    tool_call_id: str | None = None


class ChatBody(Body):
    """Body of a chat completion request."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    tools: Annotated[list[Tool] | None, FailFast()] = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_of_template)] | None = None


class TextBody(Body):
    """Body of a text completion request."""

    prompt: str


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


def checked(body: dict[str, Any], kind: type[Body], model: str) -> dict[str, Any]:
    """Return the validated fields of ``body``, without ignored and unknown fields and fields that are null.

    Raises Refusal if a field is invalid or unsupported, or if the body names a model other than ``model``.
    """
    if not _is_unicode(body):
        raise Refusal(400, "The body contains text that is not valid Unicode.")
    given = {name: value for name, value in body.items() if value is not None and name not in IGNORED}
    for name in given.keys() & NEUTRAL.keys():
        value, neutral = given.pop(name), NEUTRAL[name]
        if type(value) is not type(neutral) or value != neutral:  # == alone would take 0 for false
            raise Refusal(400, f"{name}: only {json.dumps(neutral)} is supported.", param=name)
    if unsupported := sorted(given.keys() & UNSUPPORTED):
        raise Refusal(400, f"{unsupported[0]}: this field is not supported.", param=unsupported[0])
    try:
        asked = kind.model_validate(given, context=BoundedJson())
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise Refusal(400, f"{_place(first['loc'])}: {first['msg']}.", param=str(first["loc"][0])) from None
    if asked.model not in (None, model):
        raise unknown_model(str(asked.model), model)
    return asked.model_dump(exclude={"model"}, exclude_none=True)


def unknown_fields(body: dict[str, Any], kind: type[Body]) -> list[str]:
    """Return the names of fields in ``body`` that are not null, and that ``checked`` ignores because of their names."""
    known = {*kind.model_fields, *IGNORED, *NEUTRAL, *UNSUPPORTED}
    return [name for name, value in body.items() if value is not None and name not in known]


class UnknownFields:
    """Log of unknown fields of requests to a server: a line for each name, MOST_NAMES at most. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards ``_names``
        self._names: set[str] = set()

    def note(self, names: Iterable[str]) -> None:
        """Log those of ``names`` that are new. They come from clients, so only their first letters are logged."""
        for name in names:
            shown = ascii(name[:MOST_LETTERS])
            with self._lock:
                if shown in self._names or len(self._names) >= MOST_NAMES:
                    continue
                self._names.add(shown)
            _log.warning("requests have the unknown field %s, which is ignored", shown)


def unknown_model(asked: str, served: str) -> Refusal:
    """Return the refusal of a request for the model ``asked``, which is not the one that is ``served``."""
    return Refusal(
        404, f"This server has no model {asked!r}. It serves {served!r}.", param="model", code="model_not_found"
    )


def _place(path: tuple[int | str, ...]) -> str:
    """Return the path of a field in a body as text: ("messages", 0, "role") -> "messages[0].role"."""
    return "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in path).removeprefix(".")
