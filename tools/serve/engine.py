"""Base class of engines, which compute answers; the jobs that an engine gets; the answers that clients wait for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import ToolCall

from moetier.runtime.generation.stop_strings import StopStrings

from .metrics import Tally
from .parsing import AnswerParser
from .refusal import ENDING, FAILED, Refusal, log_failure

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """Prompt of a request, and the options for generating its answer."""

    ids: list[int]  # token ids of the prompt: at least one, and fewer than the engine's context
    most: int  # maximum number of tokens of the answer
    asked: dict[str, float] = field(default_factory=dict)  # sampling options (SAMPLING) that the request gives
    seed: int | None = None
    stop: Sequence[str] = ()  # strings that end the answer
    parser: AnswerParser | None = None  # of reasoning and tool calls; None if all of the answer is text
    one_call: bool = False  # whether the first tool call ends the answer


class Answer:
    """Queue that carries the text of one answer from the engine to the request that waits for it.

    The engine adds tokens, on any thread. The request's coroutine takes pieces of the text, in the event loop in which
    the answer was made. An answer ends once, with one of OUTCOMES: answered, cancelled or failed. Tokens that are added
    after the end are ignored.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self.id = str(uuid.uuid4())
        self.job: Job | None = job  # None after the end: this frees the prompt while a queue still holds the answer
        self.new_tokens = 0
        self.kept_tokens: int | None = None  # prompt tokens that were in the prompt cache; None: unknown
        self._prompt_tokens = len(job.ids)
        self._engine = engine
        self._decoder = DecodeStream([], skip_special_tokens=job.parser is None)
        self._parser = job.parser
        self._one_call = job.one_call
        self._stops = StopStrings(job.stop)
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # guards: ``job``, so that the answer ends only once
        engine.tally.add(under_way=1)

    @property
    def ended(self) -> bool:
        """Whether the answer has ended, with any outcome."""
        return self.job is None

    async def pieces(self) -> AsyncIterator[Any]:
        """Yield the answer as pieces of text, and as transformers' ReasoningText and ToolCall objects.

        Raises Refusal if the answer fails, or the server shuts down before the answer is complete.
        """
        while (piece := await self._queue.get()) is not None:
            if isinstance(piece, Refusal):
                raise piece
            yield piece

    def add(self, tokens: Sequence[int]) -> None:
        """Add new token ids, and pass on their text. End the answer if its text contains a stop string.

        Like all methods of an answer, this raises nothing: the engine computes other answers, too. If it can't take
        the tokens, the answer fails.
        """
        if self.ended:
            return
        self._engine.tally.add(new_tokens=len(tokens))  # before the text is sent: a client that has it may read counts
        self.new_tokens += len(tokens)
        try:
            for token in tokens:
                self._take(token)
        except Exception as error:
            self.fail(error)

    def close(self) -> None:
        """End the answer because it is complete."""
        if self.ended:
            return
        try:
            if self._parser is not None:
                self._pass_on(self._parser.finish())
            self._pass_on([None])
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the answer because its computation failed with ``error``."""
        if self._end("failed"):
            log_failure("An answer", error)
            self._send(Refusal(500, FAILED))

    def cut(self) -> None:
        """End the answer because the server shuts down."""
        if self._end("cancelled"):
            self._send(Refusal(503, ENDING))

    def cancel(self) -> None:
        """End the answer because its client no longer waits for it."""
        self._end("cancelled")

    def _take(self, token: int) -> None:
        if self._parser is not None and token in self._parser.skipped:
            return
        text = self._decoder.step(self._engine.tokenizer.backend_tokenizer, token)
        if text is not None:
            self._pass_on([text] if self._parser is None else self._parser.feed(text))

    def _pass_on(self, pieces: Iterable[Any]) -> None:
        for piece in pieces:
            is_last = self._one_call and isinstance(piece, ToolCall)
            for found in (*self._stops.feed(piece), *(self._stops.feed(None) if is_last else ())):
                if found is None:
                    self._end("answered")
                self._send(found)

    def _send(self, piece: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:  # the event loop is closed, so no request waits any longer
            self._end("cancelled")

    def _end(self, outcome: str) -> bool:
        """End the answer with ``outcome``, one of OUTCOMES. Return False if the answer had ended before."""
        with self._lock:
            if self.ended:
                return False
            self.job = None
        self._engine.tally.add(under_way=-1, **{outcome: 1})
        kept = "" if self.kept_tokens is None else f" ({self.kept_tokens} of them cached)"
        _log.info("%s: %d prompt tokens%s, %d new tokens", outcome, self._prompt_tokens, kept, self.new_tokens)
        try:
            self._engine.drop(self)
        except Exception as error:  # the client must get the end of its answer nevertheless
            log_failure("Removing an answer from the engine", error)
        return True


class Engine(ABC):
    """Base class of engines, which compute answers with one model.

    It computes in the block of ``running``. ``context`` is the maximum number of tokens of a prompt and its answer
    together.
    """

    def __init__(self, model: Any, tokenizer: Any, context: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = context
        self.tally = Tally()
        self._answers: set[Answer] = set()  # answers that have not ended

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still compute answers."""
        return True

    @abstractmethod
    def submit(self, job: Job) -> Answer:
        """Queue a job, and return its answer, which has no text yet. Must be called in the event loop.

        Raises Refusal if the engine can't compute the job.
        """

    def drop(self, answer: Answer) -> None:
        """Remove a finished answer from the engine."""
        self._answers.discard(answer)

    def cut(self) -> None:
        """End all answers because the server shuts down."""
        for answer in list(self._answers):
            answer.cut()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start the engine, and stop it after the block.

        An exception stops it at any moment, such as one of Ctrl-C while it starts: Python's exit would wait for its
        thread. Raises ConfigError if the engine can't compute the model.
        """
        try:
            self._start()
            yield
        finally:
            self._stop()

    @abstractmethod
    def _start(self) -> None:
        """Start to compute. Raises ConfigError if the engine can't compute the model."""

    @abstractmethod
    def _stop(self) -> None:
        """Stop computing after the present step or answer. The engine may not have started, or only partly."""

    @contextlib.contextmanager
    def _begun(self, job: Job) -> Iterator[Answer]:
        """Yield the answer of a job. Cancel the answer if the block raises an exception."""
        answer = Answer(job, self)
        self._answers.add(answer)
        try:
            yield answer
        except BaseException:
            answer.cancel()
            raise
