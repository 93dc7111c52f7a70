"""Replays what the model has sampled, so that the next prompt of a conversation begins with tokens that are computed.

A chat template may render an answer in other ways than the model wrote it: tool calls, reasoning, and blanks. Even the
same text may have other tokens. So the tokens of each answer are kept, and found again by what the client got of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetier.runtime.model.context import first_ids

from .protocols.events import Answered

MOST = 256  # answers that are kept; those that were found or kept longest ago are forgotten first
TEXT, REASONING = "moetier-answer-7f3a", "moetier-reasoning-7f3a"  # stand for an answer in a rendered prompt

Render = Callable[[Sequence[Mapping[str, Any]]], str]  # renders messages, and the beginning of an answer


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and its complete answer."""

    ids: array[int]  # tokens of both
    content: str
    reasoning: str
    calls: tuple[tuple[str, Any], ...]  # name and arguments of each
    end: str  # text of the last token, which ends the answer

    def is_said_by(self, message: Mapping[str, Any]) -> bool:
        """Return whether a message is this answer as its client got it.

        The client may trim its text, and beside tool calls, whose ids nobody else knows, leave out text and reasoning.
        """
        content, reasoning = (str(message.get(name) or "").strip() for name in ("content", "reasoning_content"))
        return (
            _calls(message) == self.calls
            and (content == self.content.strip() or bool(self.calls and not content))
            and (reasoning == self.reasoning.strip() or bool(self.calls and not reasoning))
        )


class Turns:
    """The last turns of all conversations. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards ``_turns``
        self._turns = OrderedDict[bytes, Turn]()

    def note(self, prompt: str, answered: Answered, ids: Sequence[int], end: str, *, user: str = "") -> None:
        """Keep a turn. Only prompts of the same ``user`` continue it.

        Args:
            prompt: text of the prompt.
            answered: what the client got of the answer.
            ids: tokens of the prompt and the answer.
            end: text of the last token, which ends the answer.
        """
        calls = tuple((call.name, _parsed(call.arguments)) for call in answered.calls)
        turn = Turn(array("i", ids), answered.text, answered.reasoning, calls, end)
        with self._lock:
            self._turns[_key(user, prompt, answered.text, [call.id for call in answered.calls])] = turn
            while len(self._turns) > MOST:
                self._turns.popitem(last=False)

    def continued(
        self, messages: Sequence[Mapping[str, Any]], render: Render, tokenizer: Any, most: int, *, user: str = ""
    ) -> list[int]:
        """Return the tokens of a prompt that continues the turn of the last answer in ``messages``.

        The result is empty if no such turn is kept, or the template does not keep all of its answer. Of a prompt with
        far more than ``most`` tokens, only a prefix is returned.
        """
        last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        before, message = render(messages[:last]) if last else "", messages[last]
        calls = [call.get("id", "") for call in message.get("tool_calls") or ()]
        with self._lock:
            turn = self._turns.get(key := _key(user, before, message.get("content") or "", calls)) if last else None
            if turn is None or not turn.is_said_by(message):
                return []
            self._turns.move_to_end(key)
        answer = {"role": "assistant", "content": TEXT}
        if turn.reasoning:
            answer["reasoning_content"] = REASONING
        head, _, tail = render([*messages[:last], answer, *messages[last + 1 :]]).partition(TEXT)
        keeps = head.startswith(before) and REASONING in head if turn.reasoning else head == before
        if not keeps or not tail.startswith(turn.end):
            return []
        more = first_ids(tokenizer, tail.removeprefix(turn.end), most, add_special_tokens=False)
        return [*turn.ids, *more]


def _calls(message: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the name and the arguments of each tool call of a message. Clients may write the arguments anew."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    return tuple((call.get("name", ""), _parsed(call.get("arguments"))) for call in calls)


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _key(user: str, prompt: str, content: str, calls: Sequence[str]) -> bytes:
    """Return a key of a turn. Clients may trim an answer's text, or leave it out beside tool calls."""
    answer = "\0".join(calls) if calls else content.strip()
    return hashlib.blake2b(f"{user}\0{len(prompt)}\0{prompt}{answer}".encode()).digest()
