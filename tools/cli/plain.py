"""Texts of others and of models, without what a terminal would obey: none may move its cursor, or write to it."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import fields
from functools import cache
from typing import Any

_TLS = {name: f"tls_{name}" for name in ("ca", "cert", "key")}  # their options, where those have another name
# all controls of ASCII and of C1, DEL, and what turns the direction of letters: embeddings, overrides and isolates
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_READABLE = dict.fromkeys(_CONTROLS, "?") | {ord("\t"): "\t", ord("\n"): "\n", ord("\r"): ""}


def plain(text: str) -> str:
    """In one line, of what can be read; "?" for all else, the beginning of an escape sequence among it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def readable(text: str) -> str:
    """``text`` with "?" for each character that a terminal would obey. Lines and tabs stay; carriage returns are left
    out. Each character is judged by itself, so that a text may come in pieces."""
    return text.translate(_READABLE)


def show(text: str) -> None:
    """Print a piece of generated text at once: readable on a terminal, unchanged into a file or a pipe."""
    print(readable(text) if sys.stdout.isatty() else text, end="", flush=True)


def as_options(text: str) -> str:
    """Name options where an error names parameters of ``load``: `device_memory` becomes --device-memory."""

    def option(found: re.Match[str]) -> str:
        name = found[1] or _TLS.get(found[2], found[2])
        return f"--{name.replace('_', '-')}"

    return _parameters().sub(option, text)


@cache
def _parameters() -> re.Pattern[str]:
    """A parameter of ``load`` as an error names it."""
    from moetier.runtime.config import OPTIONS
    from moetier.runtime.wire.address import Credentials

    return re.compile(
        rf"`(?:({'|'.join(OPTIONS)})|credentials\.({'|'.join(each.name for each in fields(Credentials))}))`"
    )


class PlainFormatter(logging.Formatter):
    """A record is one line, and what can be read; the lines of a traceback stay lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the message in one line of printable characters."""
        return plain(as_options(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:
        """Return a traceback whose lines are printable."""
        return "\n".join(map(plain, super().formatException(ei).split("\n")))


class ReadableFormatter(logging.Formatter):
    """For messages of libraries, which may have lines of their own and cite a model's files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record without characters that a terminal would obey."""
        return readable(super().format(record))
