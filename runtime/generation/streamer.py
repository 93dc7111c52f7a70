"""Stream generated text, and time its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from .stop_strings import StopStrings


class TimedStreamer(TextStreamer):
    """Pass new text to ``echo``, collect it in ``text``, count the tokens, and time the first and the last token.

    At the end, ``echo`` also gets a newline, which is not part of the text. The text ends where ``stop`` begins.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        echo: Callable[[str], object] | None = None,
        skip_special_tokens: bool = False,
        stop: str = "",
    ) -> None:
        super().__init__(tokenizer, skip_special_tokens=skip_special_tokens)
        self.text = ""
        self.is_stopped = False  # whether ``stop`` was found
        self._echo = echo
        self._stops = StopStrings([stop] if stop else [])
        self._moments: list[float] = []
        self._start = time.perf_counter()

    def take(self, tokens: Iterable[int]) -> None:
        """Take the tokens of an answer, until they end or ``stop`` is found."""
        for token in tokens:
            self._moments.append(time.perf_counter())
            self.put(torch.tensor([token]))
            if self.is_stopped:
                break
        self.end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that has been decoded."""
        pieces = self._stops.feed(text)
        self.is_stopped = self._stops.is_over
        if stream_end:
            pieces += self._stops.feed(None)
        text = "".join(piece for piece in pieces if piece is not None)
        self.text += text
        if self._echo is not None:
            self._echo(text + "\n" if stream_end else text)

    @property
    def tokens(self) -> int:
        """Number of new tokens so far."""
        return len(self._moments)

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds from construction to the first and to the last new token; up to now if there is no token yet."""
        moments = self._moments or [time.perf_counter()]
        return moments[0] - self._start, moments[-1] - self._start
