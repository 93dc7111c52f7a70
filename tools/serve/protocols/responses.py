"""OpenAI's responses: an answer is a list of items, and its stream says when each begins and ends."""

from __future__ import annotations

import base64
import itertools
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ClassVar

from .events import Answered, Call, End, Events, Reason, ScoredToken, Text, Usage, without_blank
from .openai_chunks import logprobs_of
from .protocol import ApiProtocol, Reply, event
from .refusal import TOO_LONG, Refusal
from .responses_body import ENCRYPTED, ResponsesBody

Sent = Callable[..., str]  # writes an event of a type with its fields


class ResponsesProtocol(ApiProtocol):
    """OpenAI's responses."""

    path = "/v1/responses"
    body: ClassVar = ResponsesBody
    repeats_scores: ClassVar = True

    async def stream(self, reply: Reply, events: Events) -> AsyncIterator[str]:
        """Yield the beginning of the response, the events of its items one after the other, and its end."""
        numbers = itertools.count()

        def sent(kind: str, **data: Any) -> str:
            kind = f"response.{kind}"
            return event({"type": kind, "sequence_number": next(numbers), **data}, kind)

        for kind in "created", "in_progress":
            yield sent(kind, response=_response(reply, [], None))
        items, text = list[dict[str, Any]](), None  # finished items; the present one, if it is a text
        try:
            async for part in without_blank(part async for _, part in events):
                if text is not None and not (isinstance(part, Text) and part.is_reasoning == text.is_reasoning):
                    for closing in text.end(sent):
                        yield closing
                    items.append(text.item())
                    text = None
                match part:
                    case Text():
                        if text is None:
                            text = _TextItem(reply, len(items), Text("", part.is_reasoning))
                            for opening in text.begin(sent):
                                yield opening
                        yield text.add(sent, part)
                    case Call():
                        for whole in _call_events(sent, _call_item(reply, part), len(items)):
                            yield whole
                        items.append(_call_item(reply, part))
                    case End():
                        response = _response(reply, items, part)
                        yield sent(response["status"], response=response)
        except Refusal as refusal:
            code = TOO_LONG if refusal.code == TOO_LONG else "server_error"
            failed = _response(reply, items, None) | {"status": "failed"}
            yield sent("failed", response=failed | {"error": {"code": code, "message": refusal.detail}})

    def error(self, refusal: Refusal) -> str:
        """Return the only event of a stream for which there is no response yet."""
        about = {"code": refusal.code, "message": refusal.detail, "param": refusal.param}
        return event({"type": "error", **about, "sequence_number": 0}, "error")

    def response(self, reply: Reply, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return a response."""
        (answer,) = answers
        items = list[dict[str, Any]]()
        for part in answer.blocks:
            if isinstance(part, Call):
                items.append(_call_item(reply, part))
            else:
                items.append(_TextItem(reply, len(items), part).item())
        return _response(reply, items, answer.end)


class _TextItem:
    """Item of text or of reasoning, and the events that say how it comes about."""

    def __init__(self, reply: Reply, index: int, text: Text) -> None:
        """Begin with ``text``. ``index`` is the number of the item in the response."""
        assert isinstance(reply.body, ResponsesBody)
        self.is_reasoning = text.is_reasoning
        # whether reasoning is also there in a form that clients send back
        self._is_encrypted = ENCRYPTED in (reply.body.include or ())
        self._index = index
        self._text = text.text
        self._tokens = [*text.tokens]
        self._id = f"{'rs' if text.is_reasoning else 'msg'}_{uuid.uuid4().hex}"
        self._type = "reasoning_text" if text.is_reasoning else "output_text"

    def item(self, status: str = "completed") -> dict[str, Any]:
        """Return the item. One that is in progress has no content."""
        content = [self._part(self._text)] if status == "completed" else []
        if not self.is_reasoning:
            return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}
        item = {"id": self._id, "type": "reasoning", "status": status, "summary": [], "content": content}
        if self._is_encrypted:  # it is no secret
            item["encrypted_content"] = base64.b64encode(self._text.encode()).decode()
        return item

    def begin(self, sent: Sent) -> Iterator[str]:
        """Yield the events before the first text."""
        yield sent("output_item.added", output_index=self._index, item=self.item("in_progress"))
        yield sent("content_part.added", **self._position, part=self._part(""))

    def add(self, sent: Sent, text: Text) -> str:
        """Return the event of further text."""
        self._text += text.text
        self._tokens += text.tokens
        return sent(f"{self._type}.delta", **self._position, delta=text.text, **self._logprobs(text.tokens))

    def end(self, sent: Sent) -> Iterator[str]:
        """Yield the events after the last text."""
        yield sent(f"{self._type}.done", **self._position, text=self._text, **self._logprobs(self._tokens))
        yield sent("content_part.done", **self._position, part=self._part(self._text))
        yield sent("output_item.done", output_index=self._index, item=self.item())

    @property
    def _position(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self._index, "content_index": 0}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        return {} if self.is_reasoning else {"logprobs": logprobs_of(tokens)}

    def _part(self, text: str) -> dict[str, Any]:
        more: dict[str, Any] = {} if self.is_reasoning else {"annotations": []}
        return {"type": self._type, "text": text, **more, **self._logprobs(self._tokens if text else ())}


def _call_item(reply: Reply, call: Call) -> dict[str, Any]:
    assert isinstance(reply.body, ResponsesBody)
    item = {"id": f"fc_{call.id}", "type": "function_call", "status": "completed", "call_id": call.id}
    return {**item, **reply.body.names(call.name), "arguments": call.arguments}


def _call_events(sent: Sent, item: dict[str, Any], index: int) -> Iterator[str]:
    place = {"item_id": item["id"], "output_index": index}
    yield sent("output_item.added", output_index=index, item=item | {"status": "in_progress", "arguments": ""})
    yield sent("function_call_arguments.delta", **place, delta=item["arguments"])
    yield sent("function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"])
    yield sent("output_item.done", output_index=index, item=item)


def _response(reply: Reply, items: Sequence[dict[str, Any]], end: End | None) -> dict[str, Any]:
    """Return the object of a response with its finished items; ``end`` is None while it is in progress."""
    body = reply.body
    assert isinstance(body, ResponsesBody)
    is_cut = end is not None and end.reason is Reason.LENGTH
    given = body.model_dump(include={"tools", "reasoning", "text", "tool_choice"}, exclude_none=True, by_alias=True)
    return {
        "id": f"resp_{reply.id}",
        "object": "response",
        "created_at": reply.created,
        "status": "in_progress" if end is None else "incomplete" if is_cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": {},
        "model": reply.model,
        "output": [*items],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None} | given.get("reasoning", {}),
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}} | given.get("text", {}),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None if end is None else _usage(end.usage),
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.new,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.new,
    }
