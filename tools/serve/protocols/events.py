"""Parts of an answer as they come, and the whole answer, in the terms of no protocol."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Text:
    """Further text of an answer."""

    text: str
    is_reasoning: bool = False


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


@dataclass(slots=True)
class Answered:
    """A whole answer, made of its events."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    end: End | None = None  # None until the answer is complete

    def add(self, event: Event) -> None:
        """Add the next event."""
        match event:
            case Text(text, is_reasoning=True):
                self.reasoning += text
            case Text(text):
                self.text += text
            case Call():
                self.calls.append(event)
            case End():
                self.end = event
