"""Answers that clients wait for: the text of sequences that an engine computes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import ReasoningText, ToolCall

from moetier.runtime.engine.engine import Engine
from moetier.runtime.engine.pages.saved_pages import SavedPages
from moetier.runtime.engine.sequence import EngineError, Finish, Request, Sampled, TokenSequence
from moetier.runtime.generation.stop_strings import StopStrings

from .metrics import Tally
from .parsing import AnswerParser
from .protocols.events import Call, End, Event, Reason, ScoredToken, Text, Usage
from .protocols.query import ChatPrompt
from .protocols.refusal import ENDING, FAILED, Refusal, log_failure
from .token_bytes import TokenBytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A request to the engine, and the parser that takes the answer's text apart."""

    engine_request: Request
    stop: Sequence[str] = ()  # strings that end the answer
    ends: Sequence[str] = ()  # strings by which the model ends an answer
    parser: AnswerParser | None = None  # of reasoning and tool calls; None if all of the answer is text
    one_call: bool = False  # whether the first tool call ends the answer
    chat: ChatPrompt | None = None  # the messages of the prompt; None if it has none
    opening: str = ""  # what the chat template has added to them, which begins the answer
    echo: str | None = None  # text of the prompt, if the answer begins with it
    is_silent: bool = False  # whether no token is wanted: the engine must generate one, and it is left out
    counts_prompt: bool = True  # whether its prompt is counted; of several answers to one prompt, the first one's is


class Answer:
    """Queue that carries the text of one answer from the engine to the request that waits for it.

    The engine adds tokens, on any thread. The request's coroutine takes pieces of the text, in the event loop in which
    the answer was made. An answer ends once, with one of OUTCOMES: answered, cancelled or failed. Tokens that are added
    after the end are ignored.
    """

    def __init__(self, job: Job, service: AnswerService) -> None:
        self.id = str(uuid.uuid4())
        self.job: Job | None = job  # None after the end: this frees the prompt while a queue still holds the answer
        self.sequence: TokenSequence | None = None  # None until the engine has it
        self._prompt_tokens = len(job.engine_request.ids) if job.counts_prompt else 0
        self._counts_prompt = job.counts_prompt
        self._service = service
        self._decoder = DecodeStream([], skip_special_tokens=job.parser is None)
        self._parser = job.parser
        self._one_call = job.one_call
        self._stops = StopStrings((*job.stop, *job.ends))
        self._ends = job.ends
        self._calls = 0
        self._reasoning_tokens = self._counted_tokens = 0  # of reasoning; all whose text was sent
        self._is_silent = job.is_silent
        self._echo = job.echo
        self._tokens: list[ScoredToken] = []  # with log probabilities, whose text was not sent yet
        self._queue: asyncio.Queue[Event | Refusal] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()  # guards: ``job``, so that the answer ends only once
        self._user = job.engine_request.user
        self._submitted = time.monotonic()
        self._first: float | None = None  # time of the first new token
        self._tally = service.tally
        self._tally.add(self._user, under_way=1)

    @property
    def is_over(self) -> bool:
        """Whether the answer has ended, with any outcome."""
        return self.job is None

    @property
    def new_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return 0 if self.sequence is None or self._is_silent else self.sequence.new_tokens

    def note_submitted(self, sequence: TokenSequence) -> None:
        """Note that the engine has the answer's sequence. It may have ended the answer already."""
        self.sequence = sequence
        self._tally.add(self._user, prompt_tokens=self._prompt_tokens)
        if self.is_over:
            sequence.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events of the answer, an End as the last one.

        Raises Refusal if the answer fails, or the server shuts down before the answer is complete.
        """
        event: Event | None = None
        while not isinstance(event, End):
            event = await self._take_event()
            if self._echo is not None:
                yield self._echoed(self._echo)
                self._echo = None
            yield event

    async def _take_event(self) -> Event:
        event = await self._queue.get()
        if isinstance(event, Refusal):
            raise event
        return event

    def _echoed(self, prompt: str) -> Text:
        """Return the prompt as the beginning of the answer."""
        assert self.sequence is not None
        request = self.sequence.request
        if request.logprobs is None:
            return Text(prompt)
        first = ScoredToken(self._service.bytes_of(request.ids[0]), None)
        scores = self.sequence.prompt_scores
        return Text(prompt, tokens=(first, *(self._service.token(scores[at]) for at in range(1, len(request.ids)))))

    @property
    def cached_tokens(self) -> int:
        """Counted prompt tokens whose keys and values were there already."""
        return self.sequence.cached if self.sequence is not None and self._counts_prompt else 0

    def progress_text(self) -> str:
        """Return how far the computation is, for a client that waits."""
        if self.sequence is None or self.sequence.began is None:
            return "waiting"
        progress = self.sequence.progress
        return f"computing: {progress if progress.done < progress.total else f'{self.new_tokens:,} new tokens'}"

    def on_token(self, sequence: TokenSequence, sampled: Sampled) -> None:
        """Add a new token, and pass on its text. End the answer if its text contains a stop string.

        Like all methods of an answer, this raises nothing: the engine computes other answers, too. If it can't take
        the token, the answer fails.
        """
        if self.is_over or self._is_silent:
            return
        self.sequence = sequence  # the first token may come before ``note_submitted``
        if self._first is None:
            self._first = time.monotonic()
        self._tally.add(self._user, new_tokens=1)  # before the text is sent: a client that has it may read counts
        try:
            if sampled.logprob is not None:
                self._tokens.append(self._service.token(sampled))
            self._take(sampled.token)
        except Exception as error:
            self.fail(error)

    def on_end(self, sequence: TokenSequence) -> None:
        """End the answer as its sequence has ended."""
        if self.is_over:
            return
        match sequence.finish:
            case Finish.FAILED | Finish.DEADLINE:
                assert sequence.error is not None
                self.fail(sequence.error)
            case Finish.CANCELLED:  # by the engine: if the client leaves, the answer has ended before
                self.cut()
            case finish:
                try:
                    if self._parser is not None:
                        self._pass_on(self._parser.finish())
                    self._pass_on([None], Reason.LENGTH if finish is Finish.LENGTH else Reason.END)
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
        text = self._decoder.step(self._service.tokenizer.backend_tokenizer, token)
        if text is not None:
            self._pass_on([text] if self._parser is None else self._parser.feed(text))

    def _pass_on(self, pieces: Iterable[Any], reason: Reason = Reason.STOP) -> None:
        """Send pieces of the answer as events. ``reason``: why it ends, if it ends at None or a stop string in them."""
        for piece in pieces:
            is_last = self._one_call and isinstance(piece, ToolCall)
            for passed in (*self._stops.feed(piece), *(self._stops.feed(None) if is_last else ())):
                if passed is None:
                    self._send_end(reason)
                elif passed:
                    self._send(self._event(passed))

    def _event(self, piece: Any) -> Event:
        if isinstance(piece, ReasoningText):
            self._reasoning_tokens += self.new_tokens - self._counted_tokens
        self._counted_tokens = self.new_tokens
        if isinstance(piece, ToolCall):
            self._calls += 1
            return Call(f"call_{uuid.uuid4().hex}", piece.name, piece.arguments)
        tokens, self._tokens = tuple(self._tokens), []
        return Text(str(piece), isinstance(piece, ReasoningText), tokens)

    def _send_end(self, reason: Reason) -> None:
        """Send what is left of the answer, which is complete, and its end."""
        if self._tokens and reason is not Reason.STOP:  # those whose text is empty, and the end
            self._send(Text("", tokens=tuple(self._tokens)))
        if reason is Reason.STOP and self._stops.found in self._ends:
            reason = Reason.END
        usage = Usage(self._prompt_tokens, self.cached_tokens, self.new_tokens, self._reasoning_tokens)
        if self._end("answered"):
            stop = self._stops.found if reason is Reason.STOP else None
            self._send(End(Reason.CALLS if self._calls else reason, usage, stop))

    def _send(self, event: Event | Refusal) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)
        except RuntimeError:  # the event loop is closed, so no request waits any longer
            self._end("cancelled")

    def _measured(self) -> dict[str, float]:
        """Return values for the HISTOGRAMS: those of tokens, and those of times that are known."""
        values: dict[str, float] = {"prompt": self._prompt_tokens, "cached": self.cached_tokens, "new": self.new_tokens}
        if self.sequence is not None and self.sequence.began is not None:
            values["queue"] = max(0.0, self.sequence.began - self._submitted)
        if self._first is not None:
            values["first_token"] = self._first - self._submitted
            if self.new_tokens > 1:
                values["per_token"] = (time.monotonic() - self._first) / (self.new_tokens - 1)
        return values

    def _end(self, outcome: str) -> bool:
        """End the answer with ``outcome``, one of OUTCOMES. Return False if the answer had ended before."""
        with self._lock:
            if self.is_over:
                return False
            self.job = None
        self._tally.add(self._user, under_way=-1, cached_tokens=self.cached_tokens, **{outcome: 1})
        self._tally.observe(self._user, **self._measured())
        _log.info(
            "%s: %d prompt tokens (%d of them cached), %d new tokens",
            outcome,
            self._prompt_tokens,
            self.cached_tokens,
            self.new_tokens,
        )
        try:
            self._service.drop(self)
        except Exception as error:  # the client must get the end of its answer nevertheless
            log_failure("Removing an answer from the engine", error)
        return True


class AnswerService:
    """Submits jobs to an engine, and has the answers that have not ended.

    ``context`` is the maximum number of tokens of a prompt and its answer together, ``max_scored`` that of a prompt
    whose tokens have log probabilities. ``bytes_of`` returns the bytes of a token's text.
    """

    def __init__(self, model: Any, tokenizer: Any, engine: Engine, tally: Tally | None = None) -> None:
        """``tally`` counts requests and tokens; None: a new one, without API keys."""
        self.model = model
        self.tokenizer = tokenizer
        self.context = engine.context
        self.max_scored = engine.max_scored
        self.bytes_of = TokenBytes(tokenizer)
        self.tally = tally or Tally()
        self._engine = engine
        self._answers: set[Answer] = set()
        self._is_ending = False

    def token(self, sampled: Sampled) -> ScoredToken:
        """Return a token and the most likely ones with their texts."""
        top = tuple((self.bytes_of(token), logprob) for token, logprob in sampled.top)
        return ScoredToken(self.bytes_of(sampled.token), sampled.logprob, top)

    @property
    def is_alive(self) -> bool:
        """Whether the engine can still compute answers."""
        return self._engine.is_alive

    def submit(self, job: Job) -> Answer:
        """Submit a job, and return its answer, which has no text yet. Must be called in the event loop.

        Raises Refusal if the engine has failed.
        """
        if self._is_ending:
            raise Refusal(503, ENDING)
        answer = Answer(job, self)
        self._answers.add(answer)
        try:
            answer.note_submitted(self._engine.submit(job.engine_request, answer.on_token, answer.on_end))
        except BaseException as error:
            answer.cancel()
            if isinstance(error, EngineError):
                raise Refusal(503, FAILED) from None
            raise
        return answer

    @property
    def disk(self) -> SavedPages | None:
        """Keys and values on disk; None: they are kept in memory only."""
        return self._engine.saved

    def prompt_tokens_left(self) -> tuple[int, float]:
        """Return how many prompt tokens of all answers are not computed yet, and the seconds until they are."""
        under_way = [answer.sequence.progress for answer in [*self._answers] if answer.sequence is not None]
        return sum(each.total - each.done for each in under_way), sum(each.seconds_left or 0.0 for each in under_way)

    def drop(self, answer: Answer) -> None:
        """Remove an answer that has ended, and let the engine compute no more of it."""
        self._answers.discard(answer)
        if answer.sequence is not None:
            answer.sequence.cancel()

    def cut(self) -> None:
        """End all answers, and refuse others, because the server shuts down."""
        self._is_ending = True
        for answer in list(self._answers):
            answer.cut()
