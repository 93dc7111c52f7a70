"""Text as it is generated, with the moments at which its tokens came."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer


class TimedStreamer(TextStreamer):
    """Gives new text to ``echo`` as it comes, keeps it in ``text``, counts tokens, times the first and the last.

    The last piece ends with a newline that is not part of the text. Nor are ``stop`` and what is behind it; what may be
    its beginning waits for what follows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        echo: Callable[[str], object] | None = None,
        skip_special_tokens: bool = False,
        stop: str = "",
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=skip_special_tokens)
        self.text = ""
        self.stopped = False  # by ``stop``
        self._echo = echo
        self._stop = stop
        self._held = ""
        self._moments: list[float] = []
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """generate() hands over the prompt first, then token after token."""
        if not (self.skip_prompt and self.next_tokens_are_prompt):
            self._moments.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text, self._held = self._held + text, ""
        if self._stop:
            text, found, _ = ("", "", "") if self.stopped else text.partition(self._stop)
            self.stopped = self.stopped or bool(found)
            if not (self.stopped or stream_end):
                held = next((n for n in range(len(self._stop), 0, -1) if text.endswith(self._stop[:n])), 0)
                text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        if self._echo is not None:
            self._echo(text + "\n" if stream_end else text)

    @property
    def tokens(self) -> int:
        return len(self._moments)

    @property
    def seconds(self) -> tuple[float, float]:
        """From this streamer's making to the first new token, and to the last; to now, where there is none."""
        moments = self._moments or [time.perf_counter()]
        return moments[0] - self._start, moments[-1] - self._start
