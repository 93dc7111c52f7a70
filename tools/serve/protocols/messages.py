"""Anthropic's messages."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, FailFast, Field, Tag

from .body import MAX_TOKENS, Body, NotEmpty, Open, QueryBody
from .events import Answered, Call, End, Events, Reason, Text, Usage, without_blank
from .protocol import ApiProtocol, Reply, event
from .query import AnswerFormat, ChatPrompt, Query, must_call
from .refusal import MESSAGES, Refusal

SIGNATURE = "moetier"  # of thinking blocks; clients only send it back
REASONS = {
    Reason.END: "end_turn",
    Reason.STOP: "stop_sequence",
    Reason.LENGTH: "max_tokens",
    Reason.CALLS: "tool_use",
}


class TextBlock(Open):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Open):
    """Reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Open):
    """Reasoning that only Anthropic can read."""

    type: Literal["redacted_thinking"]


class CallBlock(Open):
    """Tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


def _as_blocks(given: Any) -> Any:
    """Return a text as a list of one text block; anything else unchanged."""
    return [{"type": "text", "text": given}] if isinstance(given, str) else [] if given is None else given


TextBlocks = Annotated[
    list[TextBlock] | None, FailFast(), BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock] | None)
]


class ResultBlock(Open):
    """Result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextBlocks = None


def _type_of(block: Any) -> str | None:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedBlock, Tag("redacted_thinking")]
    | Annotated[CallBlock, Tag("tool_use")]
    | Annotated[ResultBlock, Tag("tool_result")],
    Discriminator(
        _type_of,
        custom_error_type="block",
        custom_error_message="only text, thinking, tool_use and tool_result are supported, no images or documents",
    ),
]


class AnthropicMessage(Open):
    """Message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Block], FailFast(), BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]


class ClientTool(Open):
    """Tool that the client runs."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Open):
    """Whether the model may or must call tools, and which one."""

    type: Literal["auto", "none", "any", "tool"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @property
    def named(self) -> str | None:
        """Name of the tool that must be called; None if none is named."""
        return (self.name or "") if self.type == "tool" else None


class Thinking(Open):
    """Whether the model is to reason. A budget is a hint, which is not used."""

    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Open):
    """Form of an answer's text."""

    type: Literal["json_schema"]
    definition: dict[str, Any] | bool = Field(alias="schema")


class OutputConfig(Open):
    """How much effort an answer is worth, and the form of its text."""

    effort: Annotated[str, Field(max_length=32)] | None = None
    format: OutputFormat | None = None


class CountBody(Body):
    """Body of a request for the number of tokens of a message's prompt."""

    ignored: ClassVar = (
        "metadata", "context_management", "service_tier", "inference_geo", "betas", "cache_control", "container",
        "diagnostics", "user_profile_id",
    )  # fmt: skip
    neutral: ClassVar[dict[str, Any]] = {"mcp_servers": []}

    messages: Annotated[list[AnthropicMessage], FailFast()] = Field(min_length=1)
    system: TextBlocks = None
    tools: Annotated[list[ClientTool] | None, FailFast()] = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @property
    def chat(self) -> ChatPrompt:
        """The prompt. Raises Refusal if its last message is one of the assistant."""
        if self.messages[-1].role == "assistant":
            message = "messages: the last message must not be one of the assistant: an answer can't be begun for it."
            raise Refusal(400, message, param="messages")
        choice = self.choice
        return ChatPrompt(
            [*self._chat()],
            None if choice.type == "none" or not self.tools else [_function(tool) for tool in self.tools],
            must_call(choice.type == "any", choice.named, [tool.name for tool in self.tools or ()]),
            effort=None if self.output_config is None else self.output_config.effort,
            reasons=self.thinking is not None and self.thinking.type != "disabled",
        )

    @property
    def choice(self) -> ToolChoice:
        """Whether the model may or must call tools."""
        return self.tool_choice or ToolChoice(type="auto")

    def _chat(self) -> Iterator[dict[str, Any]]:
        """Yield the messages in the form of chat completions. Texts of the user that follow each other are one."""
        if self.system:
            yield {"role": "system", "content": _joined(self.system)}
        messages = [one for message in self.messages for one in _plain(message)]
        for is_users, group in itertools.groupby(messages, lambda message: message["role"] == "user"):
            if is_users:
                yield {"role": "user", "content": "\n\n".join(message["content"] for message in group)}
            else:
                yield from group


class MessagesBody(CountBody, QueryBody):
    """Body of a request for a message."""

    prompt_field = "messages"

    max_tokens: int = Field(ge=1, le=MAX_TOKENS)
    stop_sequences: Annotated[list[NotEmpty], Field(max_length=64)] | None = None

    def query(self) -> Query:
        """Return what the request asks for. Raises Refusal if its last message is one of the assistant."""
        form = None if self.output_config is None else self.output_config.format
        return Query(
            prompts=[self.chat],
            max_tokens=self.max_tokens,
            sampling=self.sampling_options,
            seed=self.seed,
            stop=self.stop_sequences or (),
            one_call=bool(self.choice.disable_parallel_tool_use) or self.choice.named is not None,
            form=None if form is None else AnswerFormat.of_json(form.definition, None, "output_config"),
        )


class MessagesProtocol(ApiProtocol):
    """Anthropic's messages."""

    path = MESSAGES
    body: ClassVar = MessagesBody

    async def stream(self, reply: Reply, events: Events) -> AsyncIterator[str]:
        """Yield the beginning of a message, its blocks one after the other, and its end."""

        def block(kind: str, **data: Any) -> str:
            return event({"type": f"content_block_{kind}", "index": index, **data}, f"content_block_{kind}")

        begun = _message(reply, [], None) | {"usage": _usage(Usage(reply.prompt_tokens))}
        yield event({"type": "message_start", "message": begun}, "message_start")
        index, is_open = 0, None  # number of the present block; for text, whether it is reasoning
        async for part in without_blank(part async for _, part in events):
            if is_open is not None and not (isinstance(part, Text) and part.is_reasoning == is_open):
                if is_open:
                    yield block("delta", delta={"type": "signature_delta", "signature": SIGNATURE})
                yield block("stop")
                index, is_open = index + 1, None
            match part:
                case Text(text, is_reasoning):
                    kind = "thinking" if is_reasoning else "text"
                    if is_open is None:
                        is_open = is_reasoning
                        yield block("start", content_block=_block(Text("", is_reasoning)))
                    yield block("delta", delta={"type": f"{kind}_delta", kind: text})
                case Call(id, name, arguments):
                    yield block("start", content_block=_block(Call(id, name, "{}")))
                    yield block("delta", delta={"type": "input_json_delta", "partial_json": arguments})
                    yield block("stop")
                    index += 1
                case End():
                    delta = {"stop_reason": REASONS[part.reason], "stop_sequence": part.stop}
                    yield event({"type": "message_delta", "delta": delta, "usage": _usage(part.usage)}, "message_delta")
        yield event({"type": "message_stop"}, "message_stop")

    def response(self, reply: Reply, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return a message."""
        (answer,) = answers
        return _message(reply, [_block(part) for part in answer.blocks], answer.end)

    def error(self, refusal: Refusal) -> str:
        """Return the event of an error."""
        return event(refusal.body(self.path), "error")

    def alive(self, progress: str) -> str:
        """Return a comment with the progress, and a ping."""
        return f": {progress}\n" + event({"type": "ping"}, "ping")


def _message(reply: Reply, content: list[dict[str, Any]], end: End | None) -> dict[str, Any]:
    return {
        "id": reply.id,
        "type": "message",
        "role": "assistant",
        "model": reply.model,
        "content": content,
        "stop_reason": None if end is None else REASONS[end.reason],
        "stop_sequence": None if end is None else end.stop,
        "usage": None if end is None else _usage(end.usage),
    }


def _block(part: Text | Call) -> dict[str, Any]:
    match part:
        case Call(id, name, arguments):
            return {"type": "tool_use", "id": id, "name": name, "input": json.loads(arguments)}
        case Text(text, is_reasoning=True):
            return {"type": "thinking", "thinking": text, "signature": SIGNATURE if text else ""}
        case Text(text):
            return {"type": "text", "text": text}


def _usage(usage: Usage) -> dict[str, int]:
    """Return numbers of tokens in Anthropic's form, where the input does not count what was cached."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.new,
    }


def _joined(blocks: Sequence[Any]) -> str:
    """Return the texts of blocks as one text."""
    return "\n\n".join(block.text for block in blocks if isinstance(block, TextBlock))


def _plain(message: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """Yield a message in the form of chat completions; of the user, one for each block."""
    match message.role:
        case "system":
            yield {"role": "system", "content": _joined(message.content)}
        case "assistant":
            yield _answer(message.content)
        case "user":
            for block in message.content:
                if isinstance(block, ResultBlock):
                    content = _joined(block.content or ())
                    yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
                elif isinstance(block, TextBlock):
                    yield {"role": "user", "content": block.text}


def _answer(blocks: Sequence[Any]) -> dict[str, Any]:
    """Return an earlier answer in the form of chat completions."""
    message: dict[str, Any] = {"role": "assistant", "content": _joined(blocks)}
    if thoughts := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls := [block for block in blocks if isinstance(block, CallBlock)]:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.input}}
            for call in calls
        ]
    return message


def _function(tool: ClientTool) -> dict[str, Any]:
    more = {"description": tool.description} if tool.description is not None else {}
    strict = {"strict": True} if tool.strict else {}
    return {"type": "function", "function": {"name": tool.name, **more, "parameters": tool.input_schema, **strict}}
