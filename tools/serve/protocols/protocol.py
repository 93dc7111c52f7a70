"""Interface of protocols, and the form of server-sent events."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .body import QueryBody
from .events import Answered, Events
from .refusal import Refusal

LINE_ENDS = {end: f"\\u{end:04x}" for end in (0x85, 0x2028, 0x2029)}  # some clients take them for the end of a line


@dataclass(frozen=True, slots=True)
class Reply:
    """What is certain of a response before its first event."""

    id: str
    model: str
    created: int  # seconds since 1970
    body: QueryBody  # of the request
    prompt_tokens: int
    answers: int  # number of them


class ApiProtocol(ABC):
    """An API: how requests and answers are written."""

    path: ClassVar[str]  # of its route
    body: ClassVar[type[QueryBody]]
    repeats_scores: ClassVar[bool] = False  # whether the end of a stream repeats the log probabilities of all tokens

    @abstractmethod
    def stream(self, reply: Reply, events: Events) -> AsyncIterator[str]:
        """Yield the answers as server-sent events. Raises what ``events`` raises."""

    @abstractmethod
    def response(self, reply: Reply, answers: Sequence[Answered]) -> dict[str, Any]:
        """Return the answers as one JSON object."""

    def error(self, refusal: Refusal) -> str:
        """Return the last server-sent event of a stream that fails."""
        return event(refusal.body())

    def alive(self, progress: str) -> str:
        """Return what a stream sends while there is no event. ``progress`` says how far the computation is."""
        return f": {progress}\n\n"


def event(data: Mapping[str, Any], name: str | None = None) -> str:
    """Return a server-sent event with JSON as its data, in one line."""
    text = f"data: {json.dumps(data, ensure_ascii=False).translate(LINE_ENDS)}\n\n"
    return text if name is None else f"event: {name}\n{text}"
