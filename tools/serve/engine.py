"""Engines compute answers to jobs; an answer carries its text from an engine to the client that waits for it."""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import response_events_to_chunks

from moetier.runtime.generation.stop_strings import StopStrings

from .metrics import Tally
from .refusal import ENDING, FAILED, Refusal, log_failure

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """Prompt of a request, and the options with which an engine continues it."""

    ids: list[int]  # tokens of the prompt: one or more, and fewer than the engine's context
    most: int  # most tokens of the answer
    asked: dict[str, float] = field(default_factory=dict)  # sampling options (SAMPLING) that the request gives
    seed: int | None = None
    stop: Sequence[str] = ()
    parser: Any = None  # transformers' ResponseParser, for models whose tool calls and reasoning it knows


class Answer:
    """Text of one answer, piece by piece.

    An engine adds tokens on any thread. The client's coroutine takes pieces, in the event loop in which the answer was
    made. An answer ends once, as answered, cancelled or failed; tokens that come later are ignored.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self.id = str(uuid.uuid4())
        self.job: Job | None = job  # None after the end, to free the prompt: a queue may hold the answer for longer
        self.new_tokens = 0
        self.kept_tokens: int | None = None  # tokens of the prompt that were not computed again; None: unknown
        self._prompt_tokens = len(job.ids)
        self._engine = engine
        self._decoder = DecodeStream([], skip_special_tokens=job.parser is None)
        self._parser = job.parser
        self._stops = StopStrings(job.stop)
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # held to end the answer, which happens once
        engine.tally.add(under_way=1)
        if job.parser is not None:
            self._pass_on(response_events_to_chunks(job.parser.initial_events))

    @property
    def ended(self) -> bool:
        """Whether the answer is answered, cancelled or failed."""
        return self.job is None

    async def pieces(self) -> AsyncIterator[Any]:
        """Yield text, transformers' ReasoningText and ToolCall. Raises Refusal if the answer failed."""
        while (piece := await self._queue.get()) is not None:
            if isinstance(piece, Refusal):
                raise piece
            yield piece

    def add(self, tokens: Sequence[int]) -> None:
        """Add new tokens, and pass on their text. A stop string ends the answer."""
        if self.ended:
            return
        self._engine.tally.add(new_tokens=len(tokens))  # before a client has the text, as it may read the count
        self.new_tokens += len(tokens)
        for token in tokens:
            text = self._decoder.step(self._engine.tokenizer._tokenizer, token)
            if text is not None:
                self._pass_on([text] if self._parser is None else response_events_to_chunks(self._parser.feed(text)))

    def close(self) -> None:
        """End a complete answer."""
        if self.ended:
            return
        if self._parser is not None:
            try:
                self._pass_on(response_events_to_chunks(self._parser.finalize()[1]))
            except (ValueError, RuntimeError):  # the last token is within a tool call
                _log.info("the answer ends within a tool call")
        self._pass_on([None])

    def fail(self, error: BaseException) -> None:
        """End the answer because its computation failed."""
        if self._end("failed"):
            log_failure("An answer", error)
            self._send(Refusal(500, FAILED))

    def cut(self) -> None:
        """End the answer because the server ends."""
        if self._end("cancelled"):
            self._send(Refusal(503, ENDING))

    def cancel(self) -> None:
        """End the answer because its client no longer waits for it."""
        self._end("cancelled")

    def _pass_on(self, pieces: Iterable[Any]) -> None:
        for piece in pieces:
            for found in self._stops.feed(piece):
                if found is None:
                    self._end("answered")
                self._send(found)

    def _send(self, piece: Any) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    def _end(self, outcome: str) -> bool:
        """End the answer with one of OUTCOMES; return False if it has ended already."""
        with self._lock:
            if self.ended:
                return False
            self.job = None
        self._engine.tally.add(under_way=-1, **{outcome: 1})
        kept = "" if self.kept_tokens is None else f" ({self.kept_tokens} kept)"
        _log.info("%s: prompt %d%s, new %d", outcome, self._prompt_tokens, kept, self.new_tokens)
        self._engine.drop(self)
        return True


class Engine(ABC):
    """Compute answers with one model. ``context`` is the most tokens of a prompt with its answer."""

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = context
        self.tally = Tally()
        self._answers: set[Answer] = set()  # those that have not ended

    @property
    def is_alive(self) -> bool:
        """Whether the engine still computes."""
        return True

    @abstractmethod
    def submit(self, job: Job) -> Answer:
        """Queue a job and return its answer. Must be called in the event loop. Raises Refusal."""

    def drop(self, answer: Answer) -> None:
        """Remove an answer that has ended from the engine."""
        self._answers.discard(answer)

    def cut(self) -> None:
        """End all answers because the server ends."""
        for answer in list(self._answers):
            answer.cut()

    @abstractmethod
    def stop(self) -> None:
        """Stop computing, once the step or answer that is being computed is done."""

    def _begin(self, job: Job) -> Answer:
        answer = Answer(job, self)
        self._answers.add(answer)
        return answer
