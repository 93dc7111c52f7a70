"""Texts of others as a terminal may have them: a name of another host must not move its cursor, or write to it."""

from __future__ import annotations

import logging
from typing import Any


def plain(text: str) -> str:
    """In one line, of what can be read; "?" for all else, the beginning of an escape sequence among it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class PlainFormatter(logging.Formatter):
    """A record is one line, and what can be read; the lines of a traceback stay lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return plain(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(plain, super().formatException(ei).split("\n")))
