"""What a person types or a pipe brings: lines, and blocks of lines between triple quotes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from moetier.tiers.errors import ConfigError

QUOTES = '"""'
PROMPT, MORE = ">>> ", "... "


@dataclass(frozen=True, slots=True)
class Entry:
    """Line or block that was entered: a message or a command."""

    text: str
    is_command: bool  # a line that begins with /


class ChatInput:
    """Standard input: on a terminal with prompts, and with editing and the lines of this run where Python has readline,
    whose import turns that on."""

    def __init__(self) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._prompts = (PROMPT, MORE) if self.is_terminal else ("", "")
        is_edited = self.is_terminal and sys.stdout.isatty()
        self._in_block = False
        self._buffer: Callable[[], str] = str  # what stands on the line
        if is_edited:
            with contextlib.suppress(ImportError):
                import readline

                self._buffer = readline.get_line_buffer

    def read(self) -> Entry:
        """The next line; one that begins with triple quotes goes on to the line that ends with them, and is what stands
        between. Raises EOFError at the end, KeyboardInterrupt for Ctrl-C, ConfigError for what is no text."""
        first, more = self._prompts
        self._in_block = False
        line = _line(first)
        if not line.startswith(QUOTES):
            return Entry(line, line.startswith("/"))
        self._in_block = True
        line = line.removeprefix(QUOTES)
        while not line.rstrip().endswith(QUOTES):
            try:
                line += "\n" + _line(more)
            except EOFError:
                raise ConfigError(f"{QUOTES} was opened, and not closed.", f"End the block with {QUOTES}.") from None
        return Entry(line.rstrip().removesuffix(QUOTES).strip("\n"), is_command=False)

    def was_empty(self) -> bool:
        """Whether there was nothing that Ctrl-C could clear."""
        return not self._in_block and not self._buffer()


def _line(prompt: str) -> str:
    if prompt and not sys.stdout.isatty():  # what goes into a file or a pipe is answers
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        line = input(prompt)
        line.encode()  # in the locale C what is no text passes as surrogates
        return line
    except UnicodeError:
        raise ConfigError("Standard input is not UTF-8.", "Give a text.") from None
