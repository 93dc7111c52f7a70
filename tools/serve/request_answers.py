"""The answers that one request wants, computed beside each other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from .answers import Answer, AnswerService, Job
from .prompts import Prompts
from .protocols.events import Answered, End, Event

AT_ONCE = 8  # answers of one request that are submitted at a time, so that other requests do not wait for all of them


class RequestAnswers:
    """Answers to one or several prompts, several to each.

    The first answer to a prompt computes it; the others begin with its keys and values.
    """

    def __init__(self, service: AnswerService, prompts: Prompts, jobs: Sequence[Sequence[Job]]) -> None:
        """Submit the first of ``jobs``, which are those of each prompt. Must be called in the event loop.

        Raises Refusal if no answers can be computed.
        """
        self._service = service
        self._prompts = prompts
        self._jobs = jobs
        self._room = asyncio.Semaphore(AT_ONCE)
        self._is_cancelled = False
        self._queue: asyncio.Queue[tuple[int, Event] | BaseException | None] = asyncio.Queue()
        self._answers = [service.submit(jobs[0][0])]

    @property
    def id(self) -> str:
        """Id of the first answer."""
        return self._answers[0].id

    @property
    def count(self) -> int:
        """Number of answers."""
        return sum(map(len, self._jobs))

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of all prompts."""
        return sum(len(jobs[0].engine_request.ids) for jobs in self._jobs)

    def progress_text(self) -> str:
        """Return how far the computation is, for a client that waits."""
        return next((answer for answer in self._answers if not answer.is_over), self._answers[-1]).progress_text()

    def cancel(self) -> None:
        """End all answers because their client no longer waits for them. No further one is submitted."""
        self._is_cancelled = True
        for answer in self._answers:
            answer.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of all answers, each with the number of its answer. Raises Refusal if one of them fails."""
        if self.count == 1:
            async for event in self._noted(self._answers[0], self._jobs[0][0]):
                yield 0, event
            return
        followers = [
            asyncio.ensure_future(self._follow_prompt(number * len(jobs), jobs))
            for number, jobs in enumerate(self._jobs)
        ]
        left = len(followers)
        try:
            while left:
                item = await self._queue.get()
                if isinstance(item, BaseException):
                    raise item
                left -= item is None
                if item is not None:
                    yield item
        finally:
            for follower in followers:
                follower.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await follower

    async def _follow_prompt(self, first: int, jobs: Sequence[Job]) -> None:
        """Put the events of the answers to one prompt into the queue, None or an error as the last item."""
        begun = asyncio.Event()  # when the first answer has a token, the prompt is computed
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(first, jobs[0], begun))
                for number, job in enumerate(jobs[1:], first + 1):
                    group.create_task(self._follow(number, job, begun, waits=True))
            self._queue.put_nowait(None)
        except* Exception as errors:
            self._queue.put_nowait(errors.exceptions[0])

    async def _follow(self, number: int, job: Job, begun: asyncio.Event, *, waits: bool = False) -> None:
        if waits:
            await begun.wait()
        async with self._room:
            answer = self._submit(job) if number else self._answers[0]
            async for event in self._noted(answer, job):
                begun.set()
                self._queue.put_nowait((number, event))

    def _submit(self, job: Job) -> Answer:
        if self._is_cancelled:
            raise asyncio.CancelledError
        answer = self._service.submit(job)
        self._answers.append(answer)
        return answer

    async def _noted(self, answer: Answer, job: Job) -> AsyncIterator[Event]:
        """Yield an answer's events. Later prompts may begin with its tokens once it is complete."""
        answered = Answered()
        async for event in answer.events():
            answered.add(event)
            if isinstance(event, End):
                self._prompts.note(job, answer, answered)
            yield event
