"""Text as it is generated, with the moments at which its tokens came."""

from __future__ import annotations

import time

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer


class TimedStreamer(TextStreamer):
    """Prints new text as it comes if ``echo``, keeps it in ``text``, counts tokens, times the first and the last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, echo: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self.text = ""
        self._echo = echo
        self._moments: list[float] = []
        self._start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """generate() hands over the prompt first, then token after token."""
        if not (self.skip_prompt and self.next_tokens_are_prompt):
            self._moments.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if self._echo:
            print(text, end="\n" if stream_end else "", flush=True)

    @property
    def tokens(self) -> int:
        return len(self._moments)

    @property
    def seconds(self) -> tuple[float, float]:
        """From this streamer's making to the first new token, and to the last."""
        return self._moments[0] - self._start, self._moments[-1] - self._start
