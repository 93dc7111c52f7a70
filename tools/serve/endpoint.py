"""Endpoint that answers the requests of one protocol: checks a request, submits its job, and sends the answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from typing import Any, Generic

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response, StreamingResponse

from .answers import Job
from .middleware import USER, AsgiMessage, Receive, Send
from .models import Models
from .pins import Pin
from .protocols.body import AnyBody, QueryBody, UnknownFields
from .protocols.events import Answered
from .protocols.protocol import ApiProtocol, Reply
from .protocols.query import Query
from .protocols.refusal import Refusal
from .request_answers import RequestAnswers
from .serving import Served
from .waiting import ended, kept_alive, on_thread, read_ahead

ALIVE_SECONDS = 10.0  # longest silence of a stream
# log probabilities of an answer in one piece: more would take 100 MB, and stop other threads for a fifth of a second
MAX_SCORES = 1 << 17
# done once all answers of a request are submitted, or it is refused
Submission = asyncio.Future[tuple[Reply, RequestAnswers]]


class Endpoint:
    """ASGI endpoint of one protocol."""

    def __init__(
        self, protocol: ApiProtocol, models: Models, unknown: UnknownFields, alive_seconds: float = ALIVE_SECONDS
    ) -> None:
        """Answer requests with ``models``, and note their unknown fields in ``unknown``.

        In ``alive_seconds`` a stream sends at least a sign of life.
        """
        self._protocol = protocol
        self._models = models
        self._unknown = unknown
        self._alive_seconds = alive_seconds

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        """Answer a request. Stop computing if the client disconnects. Raises Refusal if the request is invalid.

        If it takes long to load the model of a stream, the stream begins before, and has any refusal as its last event.
        """
        # on a thread, because a long body takes time
        content, content_type = (await receive())["body"], Headers(scope=scope).get("content-type", "")
        name, body, query = await on_thread(partial(self._checked, content, content_type))
        submitted = self._submitted(name, body, query, scope.get(USER, ""))
        # a client may read slowly: what is left to be sent refers to no model
        if not body.stream:
            response = await self._whole(submitted)
            await response(scope, receive, send)
            return
        async with aclosing(read_ahead(self._stream(submitted))) as events:
            headers = _id_headers(await anext(events))
            response = StreamingResponse(events, headers=headers, media_type="text/event-stream")
            # RequestLimits cancels this task when the client disconnects. A call of the response would watch for that
            # too, and cancel in each turn of the event loop until the stream has ended
            await response.stream_response(send)

    @contextlib.asynccontextmanager
    async def _submitted(
        self, name: str, body: QueryBody, query: Query, user: str
    ) -> AsyncIterator[tuple[Pin, Submission]]:
        """Begin the answers of a request, and end them, and the request's hold on the model, after the block."""
        with self._models.pin(name) as pin:
            submission = asyncio.ensure_future(self._submit(pin, body, query, user))
            try:
                yield pin, submission
            finally:
                await _end(submission)

    def _checked(self, content: bytes, content_type: str) -> tuple[str, QueryBody, Query]:
        """Return the model, the valid body of a request, and what it asks for. Raises Refusal if that is invalid."""
        body = self._unknown.checked(content, content_type, self._protocol.body)
        return self._models.find(body.model), body, body.query()

    async def _submit(self, pin: Pin, body: QueryBody, query: Query, user: str) -> tuple[Reply, RequestAnswers]:
        """Submit the answers that a request asks for, once its model is loaded. ``user`` is the name of its API key.

        Raises Refusal if the model can't be loaded, a prompt is empty or exceeds the context, or there could be too
        many log probabilities.
        """
        served = await pin.served()
        # on a thread, because turning a long prompt into tokens takes seconds
        jobs = await on_thread(partial(served.prompts.jobs, query, body.prompt_field, user))
        check_scores(jobs, are_kept=not body.stream or self._protocol.repeats_scores)
        answers = RequestAnswers(served.service, served.prompts, jobs)
        return Reply(answers.id, pin.name, int(time.time()), body, answers.prompt_tokens, answers.count), answers

    async def _stream(self, submitted: AbstractAsyncContextManager[tuple[Pin, Submission]]) -> AsyncGenerator[str]:
        """Yield the id of a stream, "" if there is none yet, and its server-sent events.

        If an answer fails, its error comes last. Raises Refusal if the request is refused before there is an id.
        """
        async with submitted as (pin, submission):
            await asyncio.wait({submission}, timeout=self._alive_seconds)
            yield (await submission)[1].id if submission.done() else ""

            def progress_text() -> str:
                return submission.result()[1].progress_text() if submission.done() else pin.progress_text()

            events = kept_alive(
                self._sent(submission), self._alive_seconds, lambda: self._protocol.alive(progress_text())
            )
            async with aclosing(events):
                async for event in events:
                    yield event

    async def _sent(self, submission: Submission) -> AsyncIterator[str]:
        """Yield the answers as server-sent events. If an answer fails, its error comes last."""
        try:
            reply, answers = await submission
            async for event in self._protocol.stream(reply, answers.events()):
                yield event
        except Refusal as refusal:
            yield self._protocol.error(refusal)

    async def _whole(self, submitted: AbstractAsyncContextManager[tuple[Pin, Submission]]) -> Response:
        """Return the complete answers. Raises Refusal if they can't be computed."""
        async with submitted as (_, submission):
            reply, answers = await submission
            complete = defaultdict[int, Answered](Answered)
            async for number, event in answers.events():
                complete[number].add(event)
            write = partial(self._written, reply, [complete[number] for number in sorted(complete)])
            has_scores = any(answered.tokens for answered in complete.values())  # to write them takes up to a second
            response = await on_thread(write) if has_scores else write()
            response.headers.update(_id_headers(answers.id))
            return response

    def _written(self, reply: Reply, answers: list[Answered]) -> JSONResponse:
        return JSONResponse(self._protocol.response(reply, answers))


def _id_headers(answer: str) -> dict[str, str]:
    """Return the headers that name the id of an answer, if it has one."""
    return dict.fromkeys(("x-request-id", "request-id"), answer) if answer else {}


def check_scores(jobs: Sequence[Sequence[Job]], *, are_kept: bool) -> None:
    """Raise Refusal if answers could have more than MAX_SCORES log probabilities.

    Those of new tokens count only if they ``are_kept`` until the end of the answer; most streams keep them, as text,
    only until they are sent.
    """
    scored = [job.engine_request for each in jobs for job in each if job.engine_request.logprobs is not None]
    scores = sum(
        (1 + (each.logprobs or 0)) * (len(each.ids) * each.scores_prompt + (each.max_new_tokens if are_kept else 0))
        for each in scored
    )
    if scores > MAX_SCORES:
        message = (
            f"logprobs: the answers could have {scores:,} log probabilities, and {MAX_SCORES:,} are possible. Ask for "
            "fewer answers, tokens or likely tokens. A stream of chat or text completions may have more."
        )
        raise Refusal(400, message, param="logprobs")


async def _end(submission: Submission) -> None:
    """End the answers of a request, once no thread works for it any longer."""
    submission.cancel()
    await ended(submission)
    if not submission.cancelled() and submission.exception() is None:
        submission.result()[1].cancel()


class BodyEndpoint(Generic[AnyBody]):
    """ASGI endpoint that answers a request with JSON, for which nothing is generated."""

    def __init__(
        self,
        models: Models,
        body: type[AnyBody],
        answer: Callable[[Served, AnyBody, str], dict[str, Any]],
        unknown: UnknownFields,
    ) -> None:
        """Answer requests with ``models``.

        ``answer`` is called on a thread with a loaded model, the valid body of a request and the name of its key.
        """
        self._models = models
        self._body = body
        self._answer = answer
        self._unknown = unknown

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        """Answer a request. Raises Refusal if the request is invalid."""
        content, content_type = (await receive())["body"], Headers(scope=scope).get("content-type", "")

        def check() -> tuple[str, AnyBody]:
            body = self._unknown.checked(content, content_type, self._body)
            return self._models.find(body.model), body

        name, body = await on_thread(check)
        with self._models.pin(name) as pin:
            answer = await on_thread(partial(self._answer, await pin.served(), body, scope.get(USER, "")))
        await JSONResponse(answer)(scope, receive, send)
