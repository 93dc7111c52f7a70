"""Replays what the model has sampled, so that the next prompt of a conversation begins with tokens that are computed.

A chat template may render an answer in other ways than the model wrote it: tool calls, reasoning, and blanks. Even the
same text may have other tokens. So the tokens of each answer are kept, and found again by what the client got of it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetier.runtime.model.context import first_ids

from .protocols.events import Answered

ANSWER_TOKENS = 256  # a kept answer takes as much memory besides its tokens as so many of them
MAX_TOKENS = 1 << 22  # of answers that are kept; those that were found or kept longest ago are forgotten first
TRIALS = 3  # a template may drop some of the answers: so often others are tried
MARK_LETTERS = 64  # most letters of the mark between the beginning of an answer and its reasoning

ChatMessage = Mapping[str, Any]
Render = Callable[[Sequence[ChatMessage]], str]  # renders messages, and the beginning of an answer


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """A complete answer.

    Attributes:
        ids: its tokens.
        content, reasoning, calls: what the client got of it; of a call its name and arguments.
        opening: end of the prompt's text, which began the answer.
        end: text of the last token, if that ended the answer.
    """

    ids: array[int]
    content: str
    reasoning: str
    calls: tuple[tuple[str, Any], ...]
    opening: str
    end: str

    def is_said_by(self, message: ChatMessage) -> bool:
        """Return whether a message is this answer as its client got it.

        The client may have trimmed the text. If the answer has tool calls, whose ids identify it, the client may also
        have left out text and reasoning.
        """
        content, reasoning = (str(message.get(name) or "").strip() for name in ("content", "reasoning_content"))
        return (
            _calls(message) == self.calls
            and (content == self.content.strip() or bool(self.calls and not content))
            and (reasoning == self.reasoning.strip() or bool(self.calls and not reasoning))
        )


class SampledTokens:
    """The last answers of all conversations. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards: ``_sampled``, ``_tokens``
        self._sampled = OrderedDict[bytes, SampledAnswer]()
        self._tokens = 0

    def keep(
        self,
        messages: Sequence[ChatMessage],
        answered: Answered,
        ids: Sequence[int],
        opening: str,
        end: str,
        *,
        user: str = "",
    ) -> None:
        """Keep an answer. Only prompts of the same ``user`` have it.

        Args:
            messages: those before it, for the chat template.
            answered: what the client got of the answer.
            ids: tokens of the answer.
            opening: end of the prompt's text, which began the answer.
            end: text of the last token, if that ended the answer.
        """
        calls = tuple((call.name, _parsed(call.arguments)) for call in answered.calls)
        answer = SampledAnswer(array("i", ids), answered.text, answered.reasoning, calls, opening, end)
        *_, history = _histories(messages, user)
        key = _key(user, history, answered.text, [call.id for call in answered.calls])
        with self._lock:
            self._forget(key)
            self._sampled[key] = answer
            self._tokens += len(answer.ids) + ANSWER_TOKENS
            while self._tokens > MAX_TOKENS:
                self._forget(next(iter(self._sampled)))

    def continued(
        self,
        messages: Sequence[ChatMessage],
        render: Render,
        tokenizer: Any,
        most: int,
        *,
        user: str = "",
        **options: Any,
    ) -> list[int]:
        """Return the tokens of a prompt, with those of the kept answers among its messages as they were sampled.

        The result is empty if none of them is kept. An answer is replayed only where the template keeps all of it. Of
        a prompt with far more than ``most`` tokens, only a prefix is returned. ``options``: keyword arguments of the
        tokenizer for the beginning of the prompt.
        """
        answers = self._kept(messages, user)
        for trial in range(TRIALS):
            if not answers:
                break
            parts, dropped = _split(messages, render, answers)
            dropped = dropped or _wrong(parts, render(_restored(messages, answers)), [*answers])
            if not dropped:
                return _joined(parts, tokenizer, most, options)
            if trial == TRIALS - 2:  # what is left is a prefix, which is what matters: earlier answers may be right
                dropped = [place for place in answers if place >= min(dropped)]
            answers = {place: answer for place, answer in answers.items() if place not in dropped}
        return []

    def _kept(self, messages: Sequence[ChatMessage], user: str) -> dict[int, SampledAnswer]:
        """Return the kept answers that are said by messages, by their places."""
        answers = dict[int, SampledAnswer]()
        for place, (message, history) in enumerate(zip(messages, _histories(messages, user), strict=False)):
            if message["role"] != "assistant":
                continue
            calls = [call.get("id") or "" for call in message.get("tool_calls") or ()]
            key = _key(user, history, message.get("content") or "", calls)
            with self._lock:
                answer = self._sampled.get(key)
                if answer is not None and answer.is_said_by(message):
                    self._sampled.move_to_end(key)
                    answers[place] = answer
        return answers

    def _forget(self, key: bytes) -> None:
        """Forget an answer. The caller holds ``_lock``."""
        answer = self._sampled.pop(key, None)
        self._tokens -= 0 if answer is None else len(answer.ids) + ANSWER_TOKENS


def _split(
    messages: Sequence[ChatMessage], render: Render, answers: Mapping[int, SampledAnswer]
) -> tuple[list[str | array[int]], list[int]]:
    """Render messages, and return the text between the ``answers``, with their tokens in their places.

    Returns, too, the places of answers that can't be replayed, because the template does not keep all of them.
    """
    nonce = secrets.token_hex(8)  # no message contains the marks that stand for answers
    replaced, dropped = [*messages], list[int]()
    parts: list[str | array[int]] = []
    for place, answer in answers.items():
        reasoning = {"reasoning_content": f"reasoning-{nonce}-{place}."} if answer.reasoning else {}
        replaced[place] = {"role": "assistant", "content": f"answer-{nonce}-{place}.", **reasoning}
    rest = render(replaced)
    for place, answer in answers.items():
        head, _, tail = rest.partition(f"answer-{nonce}-{place}.")
        start = _start(head, answer, f"reasoning-{nonce}-{place}.")
        if start is None or not tail.startswith(answer.end):
            dropped.append(place)
        else:
            parts += [head[:start], answer.ids]
            rest = tail.removeprefix(answer.end)
    return [*parts, rest], dropped


def _restored(messages: Sequence[ChatMessage], answers: Mapping[int, SampledAnswer]) -> list[ChatMessage]:
    """Return messages with the text and the reasoning that clients have left out of the ``answers``."""
    restored = [*messages]
    for place, answer in answers.items():
        reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
        restored[place] = {**messages[place], "content": answer.content, **reasoning}
    return restored


def _wrong(parts: Sequence[str | array[int]], text: str, places: Sequence[int]) -> list[int]:
    """Return the place of the first answer after which the prompt differs from ``text``, the template's own rendering.

    Returns [] if none does. A template may render results of tools by the calls before them, which are not in an
    answer's mark.

    Args:
        parts: the prompt, as ``_split`` returns it.
        text: the same messages, as the template renders them.
        places: the places of the answers in ``parts``.
    """
    at = 0
    for number, part in enumerate(parts[::2]):  # texts, between which the answers are
        assert isinstance(part, str)
        is_last = number == len(places)
        at = (len(text) - len(part) if text.endswith(part) else -1) if is_last else text.find(part, at)
        if at < 0:
            return [places[max(0, number - 1)]]
        at += len(part)
    return []


def _start(head: str, answer: SampledAnswer, reasoning: str) -> int | None:
    """Return where an answer starts in ``head``, the text before its content.

    None if the template now begins the answer in another way than when it was given.
    """
    if not answer.opening:
        return None
    if not answer.reasoning:
        return len(head) if head.endswith(answer.opening) else None
    place = head.rfind(answer.opening)
    start = place + len(answer.opening)
    return start if place >= 0 and reasoning in head[start : start + MARK_LETTERS + len(reasoning)] else None


def _joined(parts: Iterable[str | array[int]], tokenizer: Any, most: int, options: Mapping[str, Any]) -> list[int]:
    """Return the tokens of all parts, or a prefix of them that has far more than ``most``."""
    ids = list[int]()
    for part in parts:
        if isinstance(part, str):
            ids += first_ids(tokenizer, part, most, **options) if part else ()
            options = {"add_special_tokens": False}
        else:
            ids += part
        if len(ids) > 2 * most:
            break
    return ids


def _calls(message: ChatMessage) -> tuple[tuple[str, Any], ...]:
    """Return the name and the arguments of each tool call of a message. Clients may write the arguments anew."""
    calls = [call.get("function") or call for call in message.get("tool_calls") or ()]
    return tuple((call.get("name", ""), _parsed(call.get("arguments"))) for call in calls)


def _parsed(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _histories(messages: Iterable[ChatMessage], user: str) -> Iterator[bytes]:
    """Yield a digest of the messages before each message, and of all. Reasoning is left out, as clients drop it."""
    digest = hashlib.blake2b(user.encode() + b"\0")
    yield digest.digest()
    for message in messages:
        told = {name: value for name, value in message.items() if name != "reasoning_content"}
        digest.update(json.dumps(told, sort_keys=True).encode())
        yield digest.digest()


def _key(user: str, history: bytes, content: str, calls: Sequence[str]) -> bytes:
    """Return a key of an answer: the ids of its calls, which no other answer has, or its history and trimmed text."""
    told = "\0".join([user, *calls]).encode() if any(calls) else history + content.strip().encode()
    return hashlib.blake2b(told).digest()
