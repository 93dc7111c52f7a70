"""Cut streamed text where one of several stop strings begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Cut a text at its first stop string. The text comes in pieces.

    If the end of a piece may be the beginning of a stop string, it is held back until later text decides.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.is_over = False
        self.found: str | None = None  # the stop string that has ended the text

    def feed(self, item: Any) -> list[Any]:
        """Return the items to pass on after ``item``, which is a piece of text, None for the end, or another object.

        Another object is passed on unchanged. If a stop string is found, the result ends with None. After the end, the
        result is empty.
        """
        if self.is_over:
            return []
        if type(item) is not str:  # transformers marks text outside the answer by subclasses of str
            self.is_over = item is None
            held, self._held = self._held, ""
            return [held, item] if held else [item]
        text = self._held + item
        found = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            self.is_over = True
            begin, self.found = min(found)
            text = text[:begin]
            return [text, None] if text else [None]
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        return [text] if text else []


def _overlap(text: str, string: str) -> int:
    """Return the length of the longest suffix of ``text`` with which ``string`` begins."""
    most = min(len(text), len(string) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(string[:length])), 0)
