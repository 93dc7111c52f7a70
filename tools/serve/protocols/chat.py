"""OpenAI's chat completions."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field
from pydantic import ValidationInfo as Info
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .body import MOST_TOKENS, Open, arguments_of
from .bounded_json import BoundedJson
from .events import Answered, Call, End, Event, Events, Reason, Text, Usage
from .openai_body import OpenAIBody
from .protocol import Protocol, Reply, event
from .query import Dialogue, Query

DONE = "data: [DONE]\n\n"  # ends a complete stream
REASONS = {Reason.END: "stop", Reason.STOP: "stop", Reason.LENGTH: "length", Reason.CALLS: "tool_calls"}
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
    return arguments_of(given, info.context)


def _of_template(given: dict[str, Any]) -> dict[str, Any]:
    """Return ``given``, variables for the model's chat template, unchanged.

    Raises PydanticCustomError if a name is in NOT_OF_TEMPLATES. Such a variable would replace the template, or change
    how it is rendered.
    """
    if taken := sorted(given.keys() & NOT_OF_TEMPLATES):
        raise PydanticCustomError("template", "the variable {name} is not supported", {"name": taken[0]})
    return given


class FunctionCall(Open):
    """Function that a tool call names, with its arguments."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class ToolCall(Open):
    """Tool call in a message of the assistant."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Function(Open):
    """Function of a tool, with the schema of its parameters."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Open):
    """Tool that a request offers to the model: a function."""

    type: Literal["function"]
    function: Function


class Message(Open):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, BeforeValidator(_text)] = None
    tool_calls: Annotated[list[ToolCall] | None, FailFast()] = None
    tool_call_id: str | None = None


class ChatBody(OpenAIBody):
    """Body of a chat completion request."""

    prompt_field = "messages"

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    tools: Annotated[list[Tool] | None, FailFast()] = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_of_template)] | None = None

    def query(self) -> Query:
        """Return what the request asks for."""
        given = self.model_dump(include={"messages", "tools"}, exclude_none=True)
        dialogue = Dialogue(
            given["messages"],
            None if self.tool_choice == "none" else given.get("tools"),
            self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
        )
        return Query(
            prompts=[dialogue],
            max_tokens=self.max_completion_tokens or self.max_tokens,
            sampling=self.sampling_options,
            seed=self.seed,
            stop=self.stop or (),
            one_call=self.parallel_tool_calls is False,
        )


class Chat(Protocol):
    """Chat completions."""

    path = "/v1/chat/completions"
    body: ClassVar = ChatBody

    async def stream(self, reply: Reply, events: Events) -> AsyncIterator[str]:
        """Yield a chunk for each event, then DONE. The last chunk has the token counts."""
        head = {"id": reply.id, "object": "chat.completion.chunk", "created": reply.created, "model": reply.model}

        def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
            return event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **more})

        yield chunk({"role": "assistant"})
        calls = 0
        async for _, part in events:
            if isinstance(part, End):
                yield chunk({}, REASONS[part.reason], usage=usage_of(part.usage))
            else:
                yield chunk(_delta(part, calls))
                calls += isinstance(part, Call)
        yield DONE

    def whole(self, reply: Reply, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return OpenAI's object for a whole answer."""
        (answer,) = answers
        assert answer.end is not None
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        choice = {"index": 0, "message": message, "finish_reason": REASONS[answer.end.reason]}
        head = {"id": reply.id, "object": "chat.completion", "created": reply.created, "model": reply.model}
        return {**head, "choices": [choice], "usage": usage_of(answer.end.usage)}


def _delta(part: Event, calls: int) -> dict[str, Any]:
    """Return the part of a message that an event adds, after ``calls`` tool calls."""
    match part:
        case Call():
            return {"tool_calls": [{"index": calls, **_call(part)}]}
        case Text(text, is_reasoning):
            return {"reasoning_content" if is_reasoning else "content": text}
    return {}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return numbers of tokens in the form of chat and text completions."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.new,
        "total_tokens": usage.prompt + usage.new,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }
