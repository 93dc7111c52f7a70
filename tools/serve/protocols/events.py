"""Parts of an answer as they come, and the whole answer, in the terms of no protocol."""

from __future__ import annotations

import enum
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log probability; None for the first token of a prompt."""

    raw: bytes  # of its text, which may be a part of a character
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()  # the most likely tokens in its place, the most likely one first

    @property
    def text(self) -> str:
        """Its text."""
        return self.raw.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Text:
    """Further text of an answer, and the tokens that were computed for it if the query wants log probabilities."""

    text: str
    is_reasoning: bool = False
    tokens: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A whole tool call."""

    id: str
    name: str
    arguments: str  # a JSON object


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens."""

    prompt: int = 0
    cached: int = 0  # of the prompt, those whose keys and values were there already
    new: int = 0
    reasoning: int = 0  # of the new ones, those of reasoning

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.new + other.new,
            self.reasoning + other.reasoning,
        )


class Reason(enum.Enum):
    """Why an answer has ended."""

    END = "end"  # the model has ended it
    STOP = "stop"  # it has one of the request's stop strings
    LENGTH = "length"
    CALLS = "calls"  # the model waits for the results of its tool calls


@dataclass(frozen=True, slots=True)
class End:
    """The last event of an answer."""

    reason: Reason
    usage: Usage
    stop: str | None = None  # the stop string


Event = Text | Call | End
Events = AsyncIterator[tuple[int, Event]]  # each with the number of its answer: a query may want several


class Answered:
    """A whole answer, made of its events."""

    def __init__(self) -> None:
        self._parts: list[Text | Call] = []
        self.end: End | None = None  # None until the answer is complete

    def add(self, event: Event) -> None:
        """Add the next event."""
        if isinstance(event, End):
            self.end = event
        else:
            self._parts.append(event)

    @property
    def text(self) -> str:
        """All text that is no reasoning."""
        return "".join(part.text for part in self._parts if isinstance(part, Text) and not part.is_reasoning)

    @property
    def reasoning(self) -> str:
        """All reasoning."""
        return "".join(part.text for part in self._parts if isinstance(part, Text) and part.is_reasoning)

    @property
    def tokens(self) -> list[ScoredToken]:
        """All tokens, if the query wants log probabilities."""
        return [token for part in self._parts if isinstance(part, Text) for token in part.tokens]

    @property
    def calls(self) -> list[Call]:
        """All tool calls."""
        return [part for part in self._parts if isinstance(part, Call)]

    @property
    def blocks(self) -> list[Text | Call]:
        """The answer in as few parts as possible, in order. Blank text is left out, as ``without_blank`` does."""
        blocks = list[Text | Call]()
        for is_reasoning, group in itertools.groupby(
            self._parts, lambda part: part.is_reasoning if isinstance(part, Text) else None
        ):
            parts = [*group]
            texts = [part for part in parts if isinstance(part, Text)]
            text = "".join(part.text for part in texts).lstrip("\n")
            blocks += [part for part in parts if isinstance(part, Call)]
            if text.strip():
                blocks.append(Text(text, bool(is_reasoning), tuple(token for part in texts for token in part.tokens)))
        return blocks


async def without_blank(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """Yield events without text that is blank between others, and without line ends before a text.

    Models write line ends between reasoning, text and tool calls, which APIs with blocks have no place for.
    """
    held, is_begun = Text(""), False  # what was not passed on of the present text; whether some of it was
    async for event in events:
        if not isinstance(event, Text):
            held, is_begun = Text(""), False
            yield event
            continue
        if event.is_reasoning != held.is_reasoning:
            held, is_begun = Text("", event.is_reasoning), False
        text = held.text + event.text if is_begun else (held.text + event.text).lstrip("\n")
        held = Text(text, event.is_reasoning, held.tokens + event.tokens)
        if text.strip() or (is_begun and text):
            is_begun = True
            yield held
            held = Text("", event.is_reasoning)
