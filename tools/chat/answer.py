"""One answer of a model in a conversation."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from moetier.runtime.engine.sequence import Finish, Request
from moetier.runtime.generation.conversation import PLAIN_STOP
from moetier.runtime.model.vocabulary import check_ids
from moetier.tools.cli.failure import show
from moetier.tools.cli.progress import prompt_bar
from moetier.tools.cli.report import Timing, tokens_text

from .options import AnswerOptions

if TYPE_CHECKING:  # it imports transformers, which ``loaded`` does in less time and memory
    from moetier.runtime.engine.engine import Engine

END, CUT, INTERRUPTED = "stop", "length", "interrupted"
REASONS = {Finish.END: END, Finish.LENGTH: CUT, Finish.CANCELLED: INTERRUPTED}


class Leave(KeyboardInterrupt):
    """Raised by a second Ctrl-C that comes before the answer has stopped after the first."""


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed within the block. A second Ctrl-C raises Leave at once.

    Must be called on the main thread, because Python handles signals only there.
    """
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise Leave
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(frozen=True, slots=True)
class ChatReply:
    """One answer: its text, the reason why it ended, and its counts and times."""

    text: str
    finish_reason: str  # END, CUT (the limit of tokens was reached) or INTERRUPTED
    prompt_tokens: int
    cached_tokens: int  # prompt tokens whose keys and values were kept
    timing: Timing  # its prompt tokens are those computed or, after an interruption, those added to the cache
    hits: int  # demands that found their record in the fastest tier
    misses: int  # all other demands
    ids: tuple[int, ...] = ()  # tokens of the prompt and the answer

    @property
    def hit_ratio(self) -> float:
        """Hits divided by demands; 0 without demands."""
        return self.hits / ((self.hits + self.misses) or 1)

    def to_json(self) -> dict[str, Any]:
        """Return the answer as a JSON object: a message of the assistant, with its counts and times."""
        return {
            "role": "assistant",
            "content": self.text,
            "finish_reason": self.finish_reason,
            **self.timing.to_json(),
            "prompt_tokens": self.prompt_tokens,
            "kept_tokens": self.cached_tokens,
            "computed_tokens": self.timing.prompt_tokens,
            "hit_ratio": self.hit_ratio,
        }

    def line(self) -> str:
        """Return the answer's counts, speed and hit ratio as a line of text."""
        timing = self.timing
        why = {END: "", CUT: ", cut short", INTERRUPTED: ", interrupted"}[self.finish_reason]
        if not timing.new_tokens:
            done = self.cached_tokens + timing.prompt_tokens
            return (
                f"[no tokens{why} after {timing.total:.2f} s: {done} of {self.prompt_tokens} prompt tokens are kept, "
                f"{timing.prompt_tokens} of them new; hits {self.hit_ratio:.1%}]"
            )
        return (
            f"[{tokens_text(timing.new_tokens)}{why}, {timing.decode_rate:.1f} tokens/s; first after "
            f"{timing.first_token:.2f} s, {timing.prompt_tokens} of {self.prompt_tokens} prompt tokens new; "
            f"hits {self.hit_ratio:.1%}]"
        )


class Answering:
    """A loaded model that answers the prompts of one conversation, one after the other."""

    def __init__(self, model: Any, tokenizer: Any, engine: Engine, options: AnswerOptions, *, is_plain: bool) -> None:
        """Answer with ``engine``, each time with what ``options`` are then.

        ``is_plain`` means that the model has no chat template. Such a model may go on to write the user's next message,
        so its text is cut at PLAIN_STOP.
        """
        self._model = model
        self._tokenizer = tokenizer
        self._engine = engine
        self._options = options
        self._stop = PLAIN_STOP if is_plain else ""

    def answer(self, ids: list[int], *, most: int, is_interrupted: Callable[[], bool], echo: bool) -> ChatReply:
        """Return an answer of at most ``most`` tokens to the prompt ``ids``, a list of token ids.

        If ``echo``, print the text while it is generated. The answer ends when ``is_interrupted`` returns True, at the
        next layer of the prompt or the next token. Raises ConfigError if the model has no embedding for one of ``ids``.
        """
        from moetier.runtime.generation.streamer import TimedStreamer

        check_ids(self._model, self._tokenizer, ids)
        before = self._model.tiers.stats()[-1]
        streamer = TimedStreamer(
            self._tokenizer, echo=show if echo else None, skip_special_tokens=True, stop=self._stop
        )
        stream = self._engine.stream(Request(tuple(ids), most, self._options.decoding(), self._options.next_seed()))
        sequence = stream.sequence
        try:
            with prompt_bar(self._model, sequence):
                streamer.take(stream.tokens(is_interrupted))
        finally:
            if echo and not sequence.new_tokens:  # an error or Ctrl-C may have come within a line of text
                print(flush=True)
        after = self._model.tiers.stats()[-1]
        assert sequence.finish is not None
        computed = min(sequence.computed, len(ids)) - sequence.cached
        return ChatReply(
            streamer.text.strip() if self._stop else streamer.text,
            END if streamer.is_stopped else REASONS[sequence.finish],
            len(ids),
            sequence.cached,
            Timing(computed, streamer.tokens, *streamer.seconds, min(streamer.tokens, 1)),
            after.hits - before.hits,
            after.misses - before.misses,
            tuple(sequence.ids),
        )
