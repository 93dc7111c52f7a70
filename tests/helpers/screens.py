"""A terminal that something draws on, as a person sees it."""

from __future__ import annotations

import select
import termios
import time
from collections.abc import Callable

import pyte
from prepared import Prepared
from terminals import PATIENCE, Terminal


class DrawnTerminal(Terminal):
    """``text`` is what stands on the screen now; ``attributes`` are the terminal's own, as termios has them."""

    def __init__(
        self,
        *arguments: str,
        columns: int = 150,
        lines: int = 40,
        scripts: Prepared | None = None,
        **environment: str,
    ) -> None:
        colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        super().__init__(*arguments, size=(columns, lines), scripts=scripts, **(colours | environment))
        self.before = self.attributes
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)

    def resize(self, columns: int, lines: int) -> None:
        self._screen.resize(lines, columns)
        termios.tcsetwinsize(self._master, (lines, columns))

    @property
    def attributes(self) -> list[object]:
        return termios.tcgetattr(self._master)

    @property
    def text(self) -> str:
        return "\n".join(self._screen.display)

    @property
    def written(self) -> str:
        """All of it, with what moves the cursor and colours."""
        return self.screen

    def colour(self, column: int, line: int) -> str:
        """Return the colour of a letter: "rrggbb"."""
        return str(self._screen.buffer[line][column].fg)

    def shows(self, *words: str) -> str:
        """Waits until all of them stand on the screen together; its text."""
        return self.shows_that(lambda: all(word in self.text for word in words), f"{words}")

    def shows_that(self, condition: Callable[[], bool], name: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            left = deadline - time.monotonic()  # a screen that changes all the time is no reason to go on
            ready = left > 0 and select.select([self._master], [], [], left)[0]
            piece = self._read() if ready else b""
            assert piece, f"never {name}:\n{self.text}"
        return self.text

    def _read(self) -> bytes:
        piece = super()._read()
        self._stream.feed(piece)
        self.screen += self._decoder.decode(piece)
        return piece
