"""Reads the record of scripted_server.py, and computes how many tokens of each prompt must be cached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_model import TOOLS


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for one answer.

    Attributes:
        path, body: of the request.
        usage: what the response tells.
        prompt, answer: token ids.
        text: text of the prompt.
        cached: number of the prompt's tokens that were not computed.
    """

    path: str
    body: dict[str, Any]
    usage: Usage
    prompt: list[int]
    answer: list[int]
    text: str
    cached: int

    @property
    def has_tools(self) -> bool:
        """Whether the request belongs to a session; others are side requests, as for a title."""
        return TOOLS in self.text


def recorded(path: Path, tokenizer: Any) -> list[Asked]:
    """Return the requests in the order in which they ended. All must have been answered."""
    found = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        assert entry["status"] == 200, entry
        (sequence,) = entry["sequences"]
        found.append(
            Asked(
                entry["path"],
                entry["body"],
                usage_in(entry["response"]),
                sequence["prompt"],
                sequence["answer"],
                tokenizer.decode(sequence["prompt"]),
                sequence["cached"],
            )
        )
    return found


def common(some: list[int], others: list[int]) -> int:
    """Return the length of the common prefix."""
    pairs = zip(some, others, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(some), len(others)))


def computed_before(asked: Asked, earlier: list[Asked]) -> int:
    """Return how many first tokens of a prompt were computed for earlier requests.

    The last token of an answer was not, and the last one of a prompt is computed in any case.
    """
    return max((common(asked.prompt[:-1], [*each.prompt, *each.answer][:-1]) for each in earlier), default=0)


def events_of(response: str) -> list[dict[str, Any]]:
    """Return the data of server-sent events; a response that is no stream is one event."""
    events = [line.removeprefix("data: ") for line in response.splitlines() if line.startswith("data: {")]
    return [json.loads(event) for event in events or [response]]


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens that a response tells: of the prompt, those of it that were cached, and of the answer."""

    prompt: int
    cached: int
    new: int


def usage_in(response: str) -> Usage:
    """Return the last usage in a response of any of the APIs."""
    found = [usage for event in events_of(response) if (usage := _usage_of(event))]
    match found[-1]:
        case {"prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": cached}, "completion_tokens": new}:
            return Usage(prompt, cached, new)
        case {"input_tokens": prompt, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": new}:
            return Usage(prompt, cached, new)
        case {"input_tokens": rest, "cache_read_input_tokens": cached, "output_tokens": new}:
            return Usage(rest + cached, cached, new)
    raise AssertionError(found[-1])


def _usage_of(event: dict[str, Any]) -> dict[str, Any] | None:
    usage: dict[str, Any] | None = event.get("usage") or (event.get("response") or {}).get("usage")
    return usage
