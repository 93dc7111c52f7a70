"""Text that is cut where one of some strings begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Of one text that comes in pieces. What may be the beginning of such a string is held back until it is known."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.ended = False

    def take(self, item: Any) -> list[Any]:
        """What may be passed on, where ``item`` came: a piece of text; None, for the end; or anything else, which goes
        through in its turn. After the end nothing is passed on any more."""
        if self.ended:
            return []
        if type(item) is not str:  # transformers has kinds of text that are none of the answer's: subclasses
            self.ended = item is None
            held, self._held = self._held, ""
            return [held, item] if held else [item]
        text = self._held + item
        found = [at for at in map(text.find, self._strings) if at >= 0]
        if found:
            self.ended = True
            text = text[: min(found)]
            return [text, None] if text else [None]
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        text = text[: len(text) - keep]
        return [text] if text else []


def _overlap(text: str, string: str) -> int:
    """How long the longest end of ``text`` is with which ``string`` begins."""
    most = min(len(text), len(string) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(string[:length])), 0)
