"""The tokens of an answer, for the thread that waits for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from queue import Empty

from moetier.tiers.inbox import Inbox

from .sequence import TokenSequence

POLL_SECONDS = 0.05  # a stream asks this often whether its caller still wants it


class Stream:
    """The tokens of one sequence, as they are sampled."""

    def __init__(self, sequence: TokenSequence, tokens: Inbox[int | None]) -> None:
        """``tokens`` gets the sequence's tokens, then None."""
        self.sequence = sequence
        self._tokens = tokens

    def __iter__(self) -> Iterator[int]:
        return self.tokens()

    def tokens(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[int]:
        """Yield the tokens. If ``should_stop`` returns True, or the iterator is closed, the rest is not computed.

        The sequence has ended when the iterator ends. Raises the error with which the sequence has failed.
        """
        try:
            while (token := self._next(should_stop)) is not None:
                yield token
        finally:
            self.sequence.cancel()
            while self.sequence.finish is None:
                with contextlib.suppress(Empty):
                    self._tokens.get(POLL_SECONDS)
        if self.sequence.error is not None:
            raise self.sequence.error

    def _next(self, should_stop: Callable[[], bool]) -> int | None:
        while True:
            if should_stop():
                self.sequence.cancel()
            try:
                return self._tokens.get(POLL_SECONDS)
            except Empty:
                continue
