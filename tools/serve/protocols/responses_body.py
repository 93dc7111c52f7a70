"""Requests for OpenAI's responses, without state: a request has the whole conversation."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, FailFast, Field, Tag, model_validator
from pydantic import ValidationInfo as Info
from pydantic_core import PydanticCustomError

from .body import MAX_TOKENS, Open, QueryBody, arguments_of
from .bounded_json import BoundedJson
from .openai_body import MAX_TOP
from .query import AnswerFormat, ChatPrompt, Query, must_call
from .refusal import Refusal

HOSTED = ("web_search", "image_generation", "tool_search")  # tools that OpenAI runs; the model is not offered them
ENCRYPTED = "reasoning.encrypted_content"  # what a request includes to get reasoning that it can send back
LOGPROBS = "message.output_text.logprobs"  # what it includes to get log probabilities


def _as_parts(given: Any) -> Any:
    """Return a text as a list of one part; anything else unchanged."""
    return [{"type": "input_text", "text": given}] if isinstance(given, str) else [] if given is None else given


def _arguments(given: Any, info: Info[BoundedJson]) -> Any:
    return arguments_of(given, info.context)


class ContentPart(Open):
    """Text of a message."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str


ContentParts = Annotated[
    list[ContentPart], FailFast(), BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])
]


class MessageItem(Open):
    """Message of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: ContentParts


class CallItem(Open):
    """Tool call of an earlier answer."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])]


class OutputItem(Open):
    """Result of a tool call."""

    type: Literal["function_call_output"]
    call_id: str
    output: ContentParts


class ReasoningItem(Open):
    """Reasoning of an earlier answer."""

    type: Literal["reasoning"]
    content: Annotated[list[ContentPart] | None, FailFast()] = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        """The reasoning; empty if only its summary is there."""
        if self.content:
            return _joined(self.content)
        try:
            return base64.b64decode(self.encrypted_content or "", validate=True).decode()
        except (binascii.Error, ValueError):  # another server's
            return ""


def _type_of(item: Any) -> str | None:
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _type_of,
        custom_error_type="item",
        custom_error_message="only message, function_call, function_call_output and reasoning are supported",
    ),
]


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class ResponsesTool(Open):
    """Function that the client runs."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def _without_hosted(given: Any) -> Any:
    """Return a list of tools without those that OpenAI runs; anything else unchanged."""
    if not isinstance(given, list):
        return given
    return [tool for tool in given if not (isinstance(tool, dict) and str(tool.get("type")).startswith(HOSTED))]


class Namespace(Open):
    """Functions under a common name. The model is offered each under both names, as in "files.read"."""

    type: Literal["namespace"]
    name: str
    tools: Annotated[list[ResponsesTool], FailFast(), BeforeValidator(_without_hosted)]


Tool = Annotated[
    Annotated[ResponsesTool, Tag("function")] | Annotated[Namespace, Tag("namespace")],
    Discriminator(_type_of, custom_error_type="tool", custom_error_message="only function and namespace are supported"),
]


class ReasoningConfig(Open):
    """How much to reason. There are no summaries."""

    effort: Annotated[str, Field(max_length=32)] | None = None


class TextFormat(Open):
    """Form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    definition: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.definition is not None):
            raise PydanticCustomError("schema", "a format has a schema if it is json_schema, and only then")
        return self


class ResponsesFunction(Open):
    """Function that the answer must call."""

    type: Literal["function"]
    name: str


class TextConfig(Open):
    """Form and length of an answer; the length is a hint, which is not used."""

    format: TextFormat | None = None


class ResponsesBody(QueryBody):
    """Body of a request for a response."""

    prompt_field = "input"
    ignored: ClassVar = (
        "metadata", "client_metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user",
        "service_tier", "stream_options", "max_tool_calls", "context_management",
    )  # fmt: skip
    neutral: ClassVar[dict[str, Any]] = {"background": False, "truncation": "disabled"}

    input: Annotated[
        list[Item], Field(min_length=1), FailFast(), BeforeValidator(_as_items, json_schema_input_type=str | list[Item])
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    tools: Annotated[list[Tool] | None, FailFast(), BeforeValidator(_without_hosted)] = None
    tool_choice: Literal["auto", "none", "required"] | ResponsesFunction | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None

    def query(self) -> Query:
        """Return what the request asks for.

        Raises Refusal if it needs a response that was stored, or has top_logprobs without log probabilities.
        """
        for name in ("store", "previous_response_id", "conversation"):
            if getattr(self, name):
                message = f"{name}: this server keeps no responses. Send the whole conversation as the input."
                raise Refusal(400, message, param=name)
        if self.top_logprobs and not self.has_logprobs:
            raise Refusal(400, f"top_logprobs: it needs {LOGPROBS!r} in include.", param="top_logprobs")
        effort = None if self.reasoning is None else self.reasoning.effort
        named = self.tool_choice.name if isinstance(self.tool_choice, ResponsesFunction) else None
        functions = [*self._functions()]
        chat = ChatPrompt(
            [*self._chat()],
            None if self.tool_choice == "none" or not functions else functions,
            must_call(self.tool_choice == "required", named, [function["function"]["name"] for function in functions]),
            effort=effort,
            reasons=False if effort == "none" else None,
        )
        return Query(
            prompts=[chat],
            max_tokens=self.max_output_tokens or MAX_TOKENS,  # agents give no limit, and take a cut answer for an error
            sampling=self.sampling_options,
            seed=self.seed,
            one_call=self.parallel_tool_calls is False or named is not None,
            form=self._form,
            logprobs=(self.top_logprobs or 0) if self.has_logprobs else None,
        )

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer has log probabilities."""
        return LOGPROBS in (self.include or ())

    @property
    def _form(self) -> AnswerFormat | None:
        asked = None if self.text is None else self.text.format
        if asked is None or asked.type == "text":
            return None
        return AnswerFormat.of_json(asked.definition, asked.strict, "text")

    def names(self, function: str) -> dict[str, str]:
        """Return the fields of a call that name its function, as the model was told the name."""
        for tool in self.tools or ():
            if isinstance(tool, Namespace) and any(function == _full(tool.name, each.name) for each in tool.tools):
                return {"namespace": tool.name, "name": function.removeprefix(_full(tool.name, ""))}
        return {"name": function}

    def _functions(self) -> Iterator[dict[str, Any]]:
        for tool in self.tools or ():
            if isinstance(tool, Namespace):
                yield from (_function(each, tool.name) for each in tool.tools)
            else:
                yield _function(tool)

    def _chat(self) -> Iterator[dict[str, Any]]:
        """Yield the input in the form of chat completions.

        Instructions and the first system messages are one message, as many templates take only one. The items of an
        answer are one message, too.
        """
        items = [*self.input]
        system = [] if self.instructions is None else [self.instructions]
        while items and isinstance(item := items[0], MessageItem) and item.role in ("system", "developer"):
            system.append(_joined(item.content))
            del items[0]
        if system:
            yield {"role": "system", "content": "\n\n".join(system)}
        for is_answer, group in itertools.groupby(items, _is_answers):
            if is_answer:
                yield _answer([*group])
            else:
                yield from map(_message, group)


def _is_answers(item: Item) -> bool:
    return isinstance(item, CallItem | ReasoningItem) or (isinstance(item, MessageItem) and item.role == "assistant")


def _answer(items: Sequence[Item]) -> dict[str, Any]:
    """Return the items of one answer as a message."""
    texts = [_joined(item.content) for item in items if isinstance(item, MessageItem)]
    message: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(texts)}
    if thoughts := [item.text for item in items if isinstance(item, ReasoningItem) and item.text]:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls := [item for item in items if isinstance(item, CallItem)]:
        message["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": _full(call.namespace, call.name), "arguments": call.arguments},
            }
            for call in calls
        ]
    return message


def _message(item: Item) -> dict[str, Any]:
    if isinstance(item, OutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
    assert isinstance(item, MessageItem)
    return {"role": item.role, "content": _joined(item.content)}


def _joined(parts: Sequence[ContentPart]) -> str:
    return "\n\n".join(part.text for part in parts)


def _full(namespace: str | None, name: str) -> str:
    """Return the name under which the model is offered a function."""
    return name if namespace is None else f"{namespace}.{name}"


def _function(tool: ResponsesTool, namespace: str | None = None) -> dict[str, Any]:
    given = tool.model_dump(exclude={"type"} | (set() if tool.strict else {"strict"}), exclude_none=True)
    return {"type": "function", "function": given | {"name": _full(namespace, tool.name)}}
