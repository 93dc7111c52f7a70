"""Endpoint that answers the requests of one protocol: checks a request, submits its job, and sends the answer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Generic

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response, StreamingResponse

from .answers import AnswerService, Job
from .choices import Choices
from .middleware import USER, Message, Receive, Send
from .prompts import Prompts
from .protocols.body import AnyBody, QueryBody, UnknownFields
from .protocols.events import Answered
from .protocols.protocol import Protocol, Reply
from .protocols.refusal import Refusal
from .waiting import kept_alive, on_thread

ALIVE_SECONDS = 10.0  # longest silence of a stream
# log probabilities of an answer in one piece: more would take 100 MB, and stop other threads for a fifth of a second
MOST_SCORES = 1 << 17


class Endpoint:
    """ASGI endpoint of one protocol."""

    def __init__(
        self,
        protocol: Protocol,
        name: str,
        service: AnswerService,
        prompts: Prompts,
        unknown: UnknownFields,
        alive_seconds: float = ALIVE_SECONDS,
    ) -> None:
        """Answer requests for the model ``name``, and note their unknown fields in ``unknown``.

        In ``alive_seconds`` a stream sends at least a sign of life.
        """
        self._protocol = protocol
        self._name = name
        self._service = service
        self._prompts = prompts
        self._unknown = unknown
        self._alive_seconds = alive_seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request. Stop computing if the client disconnects. Raises Refusal if the request is invalid."""
        # on a thread, because turning a long prompt into tokens takes seconds
        content, content_type = (await receive())["body"], Headers(scope=scope).get("content-type", "")
        body, jobs = await on_thread(partial(self._jobs, content, content_type, scope.get(USER, "")))
        choices = Choices(self._service, self._prompts, jobs)
        try:
            reply = Reply(choices.id, self._name, int(time.time()), body, choices.prompt_tokens, choices.count)
            response: Response
            async with aclosing(self._stream(reply, choices)) as events:
                if body.stream:
                    response = StreamingResponse(events, media_type="text/event-stream")
                else:
                    answers = await self._whole(choices)
                    write = partial(self._written, reply, answers)  # with log probabilities, it takes up to a second
                    response = await on_thread(write) if any(each.tokens for each in answers) else write()
                response.headers["x-request-id"] = response.headers["request-id"] = choices.id
                await response(scope, receive, send)
        finally:
            choices.cancel()

    def _jobs(self, content: bytes, content_type: str, user: str) -> tuple[QueryBody, list[list[Job]]]:
        """Return a request's valid body, and the jobs that it asks for. ``user`` is the name of its API key.

        Raises Refusal if the body is invalid, a prompt is empty or exceeds the context, or there could be too many log
        probabilities.
        """
        body = self._unknown.checked(content, content_type, self._protocol.body, self._name)
        jobs = self._prompts.jobs(body.query(), body.prompt_field, user)
        check_scores(jobs, is_streamed=bool(body.stream))
        return body, jobs

    def _stream(self, reply: Reply, choices: Choices) -> AsyncGenerator[str]:
        """Return a stream of server-sent events. If an answer fails, its error comes last."""

        async def sent() -> AsyncIterator[str]:
            try:
                async for event in self._protocol.stream(reply, choices.events()):
                    yield event
            except Refusal as refusal:
                yield self._protocol.error(reply, refusal)

        return kept_alive(sent(), self._alive_seconds, lambda: self._protocol.alive(choices.say()))

    async def _whole(self, choices: Choices) -> list[Answered]:
        answers = defaultdict[int, Answered](Answered)
        async for number, event in choices.events():
            answers[number].add(event)
        return [answers[number] for number in sorted(answers)]

    def _written(self, reply: Reply, answers: list[Answered]) -> JSONResponse:
        return JSONResponse(self._protocol.whole(reply, answers))


def check_scores(jobs: Sequence[Sequence[Job]], *, is_streamed: bool) -> None:
    """Raise Refusal if answers could have more than MOST_SCORES log probabilities.

    Those of new tokens do not count if they are streamed, because they are not kept.
    """
    requests = [job.request for each in jobs for job in each if job.request.logprobs is not None]
    scores = sum(
        (1 + (request.logprobs or 0))
        * (len(request.ids) * request.scores_prompt + (0 if is_streamed else request.max_new_tokens))
        for request in requests
    )
    if scores > MOST_SCORES:
        message = (
            f"logprobs: the answers could have {scores:,} log probabilities, and {MOST_SCORES:,} are possible. Ask for "
            "fewer answers, tokens or likely tokens, or stream them."
        )
        raise Refusal(400, message, param="logprobs")


class BodyEndpoint(Generic[AnyBody]):
    """ASGI endpoint that answers a request with JSON, for which nothing is generated."""

    def __init__(
        self, name: str, body: type[AnyBody], answer: Callable[[AnyBody, str], dict[str, Any]], unknown: UnknownFields
    ) -> None:
        """Answer requests for the model ``name``.

        ``answer`` is called on a thread with the valid body of a request and the name of its key.
        """
        self._name = name
        self._body = body
        self._answer = answer
        self._unknown = unknown

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request. Raises Refusal if the request is invalid."""
        content, content_type = (await receive())["body"], Headers(scope=scope).get("content-type", "")
        answer = await on_thread(
            lambda: self._answer(
                self._unknown.checked(content, content_type, self._body, self._name), scope.get(USER, "")
            )
        )
        await JSONResponse(answer)(scope, receive, send)
