"""OpenAI's chat completions."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field
from pydantic import ValidationInfo as Info
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from .body import MAX_TOKENS, Open, arguments_of
from .bounded_json import BoundedJson
from .events import Answered, Call, End, Events, ScoredToken, Text
from .openai_body import MAX_TOP, OpenAIBody
from .openai_chunks import REASONS, Chunks, logprobs_of, object_of, total, usage_of
from .protocol import ApiProtocol, Reply
from .query import ChatPrompt, Query, must_call
from .refusal import Refusal

Effort = Annotated[str, Field(max_length=32)]
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


def of_template(given: dict[str, Any]) -> dict[str, Any]:
    """Return ``given``, variables for the model's chat template, unchanged.

    Raises PydanticCustomError if a name is in NOT_OF_TEMPLATES. Such a variable would replace the template, or change
    how it is rendered.
    """
    if taken := sorted(given.keys() & NOT_OF_TEMPLATES):
        raise PydanticCustomError("template", "the variable {name} is not supported", {"name": taken[0]})
    return given


class TextPart(Open):
    """Part of a message's content."""

    type: Literal["text"]
    text: str


class FunctionCall(Open):
    """Function that a tool call names, with its arguments."""

    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])]


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
    content: Annotated[Any, BeforeValidator(_text, json_schema_input_type=str | list[TextPart] | None)] = None
    tool_calls: Annotated[list[ToolCall] | None, FailFast()] = None
    tool_call_id: str | None = None


class NamedFunction(Open):
    """Name of a function."""

    name: str


class NamedTool(Open):
    """Function that the answer must call."""

    type: Literal["function"]
    function: NamedFunction


class Switch(Open):
    """Whether to reason, as several servers have it."""

    type: Literal["enabled", "disabled", "adaptive", "auto"]


class ReasoningOptions(Open):
    """Whether and how much to reason, as OpenRouter has it. A budget of tokens is a hint, which is not used."""

    enabled: bool | None = None
    effort: Effort | None = None
    exclude: Literal[False] | None = None


class ChatBody(OpenAIBody):
    """Body of a chat completion request."""

    prompt_field = "messages"
    neutral: ClassVar[dict[str, Any]] = OpenAIBody.neutral | {"echo": False}

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    tools: Annotated[list[Tool] | None, FailFast()] = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = None
    thinking: Switch | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(of_template)] | None = None

    def query(self) -> Query:
        """Return what the request asks for. Raises Refusal for top_logprobs without logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: set that to true, too.", param="top_logprobs")
        given = self.model_dump(include={"messages", "tools"}, exclude_none=True)
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        effort = self.reasoning_effort or (self.reasoning.effort if self.reasoning else None)
        chat = ChatPrompt(
            given["messages"],
            None if self.tool_choice == "none" else given.get("tools"),
            must_call(self.tool_choice == "required", named, [tool.function.name for tool in self.tools or ()]),
            self.chat_template_kwargs or {},
            effort=effort,
            reasons=self._reasons(effort),
        )
        return self.query_of(
            [chat],
            max_tokens=self.max_completion_tokens or self.max_tokens,
            one_call=self.parallel_tool_calls is False or named is not None,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def _reasons(self, effort: str | None) -> bool | None:
        """Return whether the model is to reason; None if the request does not say so."""
        if self.enable_thinking is not None:
            return self.enable_thinking
        if self.thinking is not None:
            return self.thinking.type != "disabled"
        if self.reasoning is not None and self.reasoning.enabled is not None:
            return self.reasoning.enabled
        return False if effort == "none" else None


class ChatProtocol(ApiProtocol):
    """Chat completions."""

    path = "/v1/chat/completions"
    body: ClassVar = ChatBody

    async def stream(self, reply: Reply, events: Events) -> AsyncIterator[str]:
        """Yield a chunk for each event, then DONE. By default the last chunk has the token counts, too."""

        def choice(number: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {"index": number, "delta": delta, "finish_reason": reason}

        assert isinstance(reply.body, ChatBody)
        chunks = Chunks(reply, "chat.completion.chunk", reply.body)
        for number in range(reply.body.n or 1):
            yield chunks.chunk(choice(number, {"role": "assistant"}))
        calls = Counter[int]()
        async for number, part in events:
            if isinstance(part, End):
                yield chunks.last(choice(number, {}, REASONS[part.reason]), part)
            else:
                logprobs = {"logprobs": _logprobs(part.tokens)} if isinstance(part, Text) and part.tokens else {}
                yield chunks.chunk(choice(number, _delta(part, calls[number])) | logprobs)
                calls[number] += isinstance(part, Call)
        for end in chunks.end():
            yield end

    def response(self, reply: Reply, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return OpenAI's object for whole answers."""
        choices = [_choice(number, answer, reply) for number, answer in enumerate(answers)]
        return object_of(reply, "chat.completion", choices) | {"usage": usage_of(total(answers))}


def _choice(number: int, answer: Answered, reply: Reply) -> dict[str, Any]:
    assert answer.end is not None
    assert isinstance(reply.body, ChatBody)
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_call(call) for call in answer.calls]
    logprobs = {"logprobs": _logprobs(answer.tokens)} if reply.body.logprobs else {}
    return {"index": number, "message": message, "finish_reason": REASONS[answer.end.reason], **logprobs}


def _delta(part: Text | Call, calls: int) -> dict[str, Any]:
    """Return the part of a message that an event adds, after ``calls`` tool calls."""
    match part:
        case Call():
            return {"tool_calls": [{"index": calls, **_call(part)}]}
        case Text(text, is_reasoning):
            return {"reasoning_content" if is_reasoning else "content": text}


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """Return log probabilities of the tokens of reasoning, text and calls."""
    return {"content": logprobs_of(tokens), "refusal": None}
