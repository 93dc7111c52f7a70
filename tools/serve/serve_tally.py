"""What a server was asked for, and what it has answered, counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

OUTCOMES = ("answered", "cancelled", "failed")


@dataclass(frozen=True, slots=True)
class Tallied:
    """Since the server's start; requests that were refused are not among them."""

    requests: dict[str, int]  # that are over, by OUTCOMES
    under_way: int  # requests that are computed, or wait for their turn
    prompt_tokens: int  # of requests that are computed, or were
    kept_tokens: int  # of these: that an earlier request had computed, as far as it is known
    new_tokens: int  # generated


@dataclass(slots=True)
class Tally:
    """Thread-safe. A request begins, has a prompt and new tokens, and ends in one of OUTCOMES."""

    _now: Tallied = field(default_factory=lambda: Tallied(dict.fromkeys(OUTCOMES, 0), 0, 0, 0, 0))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        """Count a request as under way."""
        self._add(under_way=1)

    def prompt(self, tokens: int, kept: int) -> None:
        """Count the tokens of a prompt, and those of them that an earlier request had computed."""
        self._add(prompt_tokens=tokens, kept_tokens=kept)

    def new(self, tokens: int) -> None:
        """Count generated tokens."""
        self._add(new_tokens=tokens)

    def end(self, outcome: str) -> None:
        """Count a request that was under way under its outcome, one of OUTCOMES."""
        with self._lock:
            requests = self._now.requests | {outcome: self._now.requests[outcome] + 1}
            self._now = replace(self._now, requests=requests, under_way=self._now.under_way - 1)

    def tallied(self) -> Tallied:
        """Return the present counts."""
        return self._now

    def _add(self, **more: int) -> None:
        with self._lock:
            self._now = replace(self._now, **{name: getattr(self._now, name) + count for name, count in more.items()})
