"""Chat and text completions: endpoints that check a request, submit its job to the engine, and send the answer."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response, StreamingResponse
from transformers.cli.serving.utils import ReasoningText, ToolCall

from moetier.runtime.engine.sequence import Finish, Request
from moetier.runtime.generation.conversation import PLAIN_STOP, PLAIN_TEMPLATE
from moetier.runtime.generation.decoding import SAMPLING, penalties_of, sampling_of
from moetier.runtime.model.context import counted, first_ids, longest_context
from moetier.runtime.model.vocabulary import unknown_token

from .answers import Answer, AnswerService, Job
from .messages import for_template
from .middleware import Message, Receive, Send
from .parsing import AnswerParser, form_of
from .refusal import Refusal
from .replay import Turns
from .request import Body, ChatBody, TextBody, UnknownFields, checked, parsed, unknown_fields
from .waiting import kept_alive, on_thread

DONE = "data: [DONE]\n\n"  # ends a complete stream
ALIVE_SECONDS = 10.0  # longest silence of a stream
NEW_TOKENS = 1024  # limit of an answer's tokens if the request has none; generation_config.json may raise it


class Completions(ABC):
    """ASGI endpoint of one kind of completions."""

    body: ClassVar[type[Body]]
    prompt: ClassVar[str]  # field of the body that has the prompt
    object: ClassVar[str]  # OpenAI's name for the type of a whole answer
    chunk: ClassVar[str]  # OpenAI's name for the type of a piece of an answer
    opening: ClassVar[tuple[dict[str, Any], ...]] = ()  # choices that are sent before the first piece
    stop: tuple[str, ...] = ()  # strings that end every answer
    adds_special_tokens = True  # whether the tokenizer adds its special tokens to the prompt

    def __init__(
        self, name: str, service: AnswerService, unknown: UnknownFields, alive_seconds: float = ALIVE_SECONDS
    ) -> None:
        """Serve the service's model under ``name``, and note requests' unknown fields in ``unknown``.

        In ``alive_seconds`` a stream sends at least a comment.
        """
        self._name = name
        self._service = service
        self._unknown = unknown
        self._alive_seconds = alive_seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request. Stop computing if the client disconnects. Raises Refusal if the request is invalid."""
        # on a thread, because turning a long prompt into tokens takes seconds
        job, is_stream = await on_thread(
            partial(self._job, (await receive())["body"], Headers(scope=scope).get("content-type", ""))
        )
        answer = self._service.submit(job)
        try:
            response: Response
            async with aclosing(kept_alive(self._events(answer, job), self._alive_seconds, answer.say)) as events:
                if is_stream:
                    response = StreamingResponse(events, media_type="text/event-stream")
                else:
                    response = JSONResponse(self._whole([chunk async for chunk in self._chunks(answer, job)]))
                response.headers["x-request-id"] = answer.id
                await response(scope, receive, send)
        finally:
            answer.cancel()

    def _job(self, content: bytes, content_type: str) -> tuple[Job, bool]:
        """Return the job that a request's body asks for, and whether to stream its answer.

        Raises Refusal if the body is invalid, or the prompt is empty or exceeds the context.
        """
        given = parsed(content, content_type)
        body = checked(given, self.body, self._name)
        self._unknown.note(unknown_fields(given, self.body))
        model, context = self._service.model, self._service.context
        text, opening = self._text(body)
        ids = self._continued(body) or first_ids(
            self._service.tokenizer, text, context, add_special_tokens=self.adds_special_tokens
        )
        if not ids:
            raise Refusal(400, f"{self.prompt}: the prompt has no tokens.", param=self.prompt)
        if len(ids) >= context:
            is_models = context == longest_context(model.config)
            whose = "the model's maximum context" if is_models else "the context of this server (--context)"
            raise Refusal(
                400,
                f"The prompt has {counted(len(ids), context)} tokens, but {whose} is {context:,} for prompt and answer "
                "together.",
                param=self.prompt,
                code="context_length_exceeded",
            )
        if (token := unknown_token(model, self._service.tokenizer, ids)) is not None:
            message = f"The prompt has the token {token!r}, for which the model has no embedding."
            raise Refusal(400, message, param=self.prompt)
        most = max(NEW_TOKENS, model.generation_config.max_new_tokens or 0)
        asked = {name: body[name] for name in SAMPLING if name in body}
        request = Request(
            tuple(ids),
            min(body.get("max_completion_tokens", body.get("max_tokens", most)), context - len(ids)),
            {**sampling_of(asked), **penalties_of(asked)},
            seed=body.get("seed"),
        )
        job = Job(
            request,
            stop=[*body.get("stop", ()), *self.stop],
            parser=self._parser(body, opening),
            one_call=body.get("parallel_tool_calls") is False,
            messages=self._messages(body),
            opening=opening,
        )
        return job, body.get("stream", False)

    async def _events(self, answer: Answer, job: Job) -> AsyncIterator[str]:
        """Yield an answer as server-sent events: its chunks, then DONE. If the answer fails, its error comes last."""
        try:
            async for chunk in self._chunks(answer, job):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield DONE
        except Refusal as refusal:
            yield f"data: {json.dumps(refusal.body())}\n\n"

    async def _chunks(self, answer: Answer, job: Job) -> AsyncIterator[dict[str, Any]]:
        """Yield an answer as chunks in OpenAI's form; the last one has the token counts.

        Raises Refusal if the answer fails.
        """
        head = {"id": answer.id, "object": self.chunk, "created": int(time.time()), "model": self._name}

        def chunk(choice: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {**head, "choices": [{"index": 0, **choice, "finish_reason": reason}]}

        calls, sent = 0, list[dict[str, Any]]()
        for choice in self.opening:
            yield chunk(choice)
        async for piece in answer.pieces():
            sent.append(self._choice(piece, calls))
            calls += isinstance(piece, ToolCall)
            yield chunk(sent[-1])
        self._note(job, answer, sent)
        prompt, new = len(job.request.ids), answer.new_tokens
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": answer.kept_tokens},
        }
        reason = "tool_calls" if calls else "length" if new >= job.request.max_new_tokens else "stop"
        yield {**chunk(self._choice("", calls), reason), "usage": usage}

    def _continued(self, body: dict[str, Any]) -> list[int]:
        """Return the tokens of a prompt that begins with those of an earlier answer; none if it does not."""
        return []

    def _note(self, job: Job, answer: Answer, choices: list[dict[str, Any]]) -> None:
        """Note a complete answer, which was sent as ``choices``: a later prompt may begin with its tokens."""
        return

    def _messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the messages of the prompt, for the chat template; none if it has none."""
        return []

    @abstractmethod
    def _text(self, body: dict[str, Any]) -> tuple[str, str]:
        """Return the text of the prompt, and its end that begins the answer.

        Raises Refusal if the chat template refuses the messages.
        """

    @abstractmethod
    def _parser(self, body: dict[str, Any], opening: str) -> AnswerParser | None:
        """Return a parser for the answer, which begins with ``opening``; None if all of the answer is text."""

    @abstractmethod
    def _choice(self, piece: Any, calls: int) -> dict[str, Any]:
        """Return the fields of OpenAI's "choice" object that hold ``piece``, a part of the answer.

        ``piece`` is "" in the last chunk. ``calls`` is the number of earlier tool calls in the answer.
        """

    @abstractmethod
    def _whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """Return OpenAI's object for a whole answer, made from all ``chunks`` of the answer."""


class ChatCompletions(Completions):
    """Endpoint of chat completions. The model's chat template turns the messages into the prompt."""

    body, prompt, object, chunk = ChatBody, "messages", "chat.completion", "chat.completion.chunk"
    opening = ({"delta": {"role": "assistant"}},)

    def __init__(
        self, name: str, service: AnswerService, unknown: UnknownFields, alive_seconds: float = ALIVE_SECONDS
    ) -> None:
        """As in Completions; with PLAIN_TEMPLATE if the model has no chat template."""
        super().__init__(name, service, unknown, alive_seconds)
        self._form = form_of(service.model, service.tokenizer)
        self._is_plain = not service.tokenizer.chat_template
        self._turns = Turns()
        self.adds_special_tokens = self._is_plain
        if self._is_plain:
            self.stop = (PLAIN_STOP,)

    def _messages(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        return for_template(body["messages"])

    def _text(self, body: dict[str, Any]) -> tuple[str, str]:
        messages, tools = self._messages(body), _tools(body)
        text = self._render(body, tools, messages)
        if tools and text == self._render(body, None, messages):
            raise Refusal(400, "tools: the model's chat template does not support tools.", param="tools")
        # only what the template adds to the messages may open a region: messages may have marks, too
        told = self._render(body, tools, messages, begins_answer=False)
        return text, text.removeprefix(told) if text.startswith(told) else ""

    def _continued(self, body: dict[str, Any]) -> list[int]:
        try:
            return self._turns.continued(
                self._messages(body),
                partial(self._render, body, _tools(body)),
                self._service.tokenizer,
                self._service.context,
                add_special_tokens=self.adds_special_tokens,
            )
        except Refusal:  # the template takes the messages, but not without their calls
            return []

    def _note(self, job: Job, answer: Answer, choices: list[dict[str, Any]]) -> None:
        sequence, is_last_call = answer.sequence, job.one_call and "tool_calls" in choices[-1]["delta"]
        if sequence is not None and (is_last_call or sequence.finish in (Finish.END, Finish.LENGTH)):
            ids = sequence.ids[len(job.request.ids) :]
            end = self._service.tokenizer.decode(ids[-1:]) if sequence.finish is Finish.END else ""
            self._turns.note(job.messages, [choice["delta"] for choice in choices], ids, job.opening, end)

    def _render(
        self, body: dict[str, Any], tools: list[Any] | None, messages: Sequence[Any], *, begins_answer: bool = True
    ) -> str:
        try:
            text: str = self._service.tokenizer.apply_chat_template(
                [*messages],
                chat_template=PLAIN_TEMPLATE if self._is_plain else None,
                add_generation_prompt=begins_answer,
                tools=tools,
                tokenize=False,
                **{name: body[name] for name in ("reasoning_effort",) if name in body}
                | body.get("chat_template_kwargs", {}),
            )
        except Exception as error:  # a template may raise any exception
            message = f"The model's chat template refuses these messages: {str(error).partition(chr(10))[0]}"
            raise Refusal(400, message, param="messages") from None
        return text

    def _parser(self, body: dict[str, Any], opening: str) -> AnswerParser | None:
        return None if self._form is None else self._form.parser(opening, _tools(body))

    def _choice(self, piece: Any, calls: int) -> dict[str, Any]:
        if isinstance(piece, ToolCall):
            function = {"name": piece.name, "arguments": piece.arguments}
            call = {"index": calls, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
            return {"delta": {"tool_calls": [call]}}
        field = "reasoning_content" if isinstance(piece, ReasoningText) else "content"
        return {"delta": {field: piece} if piece else {}}

    def _whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        message: dict[str, Any] = {"role": "assistant"}
        message["content"] = "".join(delta.get("content", "") for delta in deltas)
        if reasoning := "".join(delta.get("reasoning_content", "") for delta in deltas):
            message["reasoning_content"] = reasoning
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        if calls:
            message["tool_calls"] = [{key: call[key] for key in call if key != "index"} for call in calls]
        choice = {"index": 0, "message": message, "finish_reason": chunks[-1]["choices"][0]["finish_reason"]}
        return {**chunks[-1], "object": self.object, "choices": [choice]}


def _tools(body: dict[str, Any]) -> list[Any] | None:
    """Return the tools that the model may call."""
    return None if body.get("tool_choice") == "none" else body.get("tools")


class TextCompletions(Completions):
    """Endpoint of text completions. The request gives the prompt as text."""

    body, prompt, object, chunk = TextBody, "prompt", "text_completion", "text_completion"

    def _text(self, body: dict[str, Any]) -> tuple[str, str]:
        return body["prompt"], ""

    def _parser(self, body: dict[str, Any], opening: str) -> AnswerParser | None:
        return None

    def _choice(self, piece: Any, calls: int) -> dict[str, Any]:
        return {"text": piece}

    def _whole(self, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        return {**chunks[-1], "choices": [{**chunks[-1]["choices"][0], "text": text}]}
