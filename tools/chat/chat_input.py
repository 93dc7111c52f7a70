"""Input of a conversation: lines from a terminal or a pipe, as messages and commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from moetier.tiers.errors import ConfigError
from moetier.tools.cli.parser import check_utf8

from .state import LineHistory

QUOTES = '"""'
PROMPT, MORE = ">>> ", "... "
_BLOCK = re.compile(rf"(/\w+ +)?{QUOTES}")  # what begins a text of several lines


class ChatInput:
    """Reader of standard input. On a terminal it shows a prompt and, if Python has readline, lets lines be edited.

    The arrow keys bring back the lines of ``history``, and those that are typed are added to it.
    """

    def __init__(self, history: LineHistory | None = None) -> None:
        self.is_terminal = sys.stdin.isatty()
        self._prompts = (PROMPT, MORE) if self.is_terminal else ("", "")
        self._history = history
        self._readline: Any = None
        self._buffer: Callable[[], str] = str  # returns the text typed so far
        self._in_block = False
        if self.is_terminal and sys.stdout.isatty():
            with suppress(ImportError):
                import readline  # importing it turns editing on

                self._readline = readline
                self._buffer = readline.get_line_buffer
                for line in () if history is None else history.lines:
                    readline.add_history(line)

    def read(self) -> tuple[str, bool]:
        """Return the next message or command, and whether it is a command: a line that begins with /.

        Triple quotes at the beginning of a line, or behind the name of a command, begin a block, a text of several
        lines. Triple quotes at the end of a line end the block. Raises EOFError at the end of the input,
        KeyboardInterrupt for Ctrl-C, and ConfigError if the input is not UTF-8 text or ends within a block.
        """
        first, more = self._prompts
        self._in_block = False
        line = self._line(first)
        if (begun := _BLOCK.match(line)) is None:
            return line, line.startswith("/")
        self._in_block = True
        command, block = begun[1] or "", line[begun.end() :]
        while not block.rstrip().endswith(QUOTES):
            try:
                block += "\n" + self._line(more)
            except EOFError:
                raise ConfigError(
                    f"A message that began with {QUOTES} did not end.", f"End its last line with {QUOTES}."
                ) from None
        return command + block.rstrip().removesuffix(QUOTES).strip("\n"), bool(command)

    def was_empty(self) -> bool:
        """Return whether the line that Ctrl-C interrupted was empty, and not in a block."""
        return not self._in_block and not self._buffer()

    def _line(self, prompt: str) -> str:
        if prompt and not sys.stdout.isatty():  # only answers go to standard output
            print(prompt, end="", file=sys.stderr, flush=True)
            prompt = ""
        count = 0 if self._readline is None else self._readline.get_current_history_length()
        try:
            line = check_utf8(input(prompt), "Standard input")  # in the C locale, Python accepts any bytes
        except UnicodeDecodeError:
            raise ConfigError(
                "Standard input is not UTF-8 text.", "Convert it, for example with iconv -t UTF-8."
            ) from None
        is_new = self._readline is not None and self._readline.get_current_history_length() > count
        if is_new and self._history is not None:  # readline leaves out empty lines and repeated ones
            self._history.add(line)
        return line
